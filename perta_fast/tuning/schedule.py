"""How long and how fast a tuning goes by default: so that a few rows are learnt as well as many."""

import math
from dataclasses import dataclass

_BATCHES = ((512, 4), (2048, 8))  # up to so many rows, so many in a step
_LARGEST = 16
LEARNT = 0.1  # nats: below it the mean loss of the rows should be


@dataclass(frozen=True)
class Schedule:
    """Samples of a step, passes over the data, highest rate. chosen: which of them followed from the rows."""

    batch_size: int
    epochs: int
    lr: float
    chosen: tuple[str, ...] = ()

    @classmethod
    def of(cls, rows: int, full: bool, batch_size: int | None, epochs: int | None, lr: float | None) -> "Schedule":
        """What was given, and for None what ``rows`` call for.

        At least 10 epochs and 60 steps for an adapter, 8 and 30 for a checkpoint. The documentation ("Tuning") has
        what was measured with these.
        """
        given = {"batch_size": batch_size, "epochs": epochs, "lr": lr}
        batch_size = batch_size or next((size for most, size in _BATCHES if rows <= most), _LARGEST)
        least, steps, rate = (8, 30, 1e-4) if full else (10, 60, 5e-4)
        epochs = epochs or max(least, math.ceil(steps / math.ceil(rows / batch_size)))
        chosen = tuple(name for name, value in given.items() if value is None)
        return cls(batch_size, epochs, rate if lr is None else lr, chosen)

    @property
    def is_default(self) -> bool:
        """Whether length and rate of the tuning followed from the rows."""
        return {"epochs", "lr"} <= set(self.chosen)

    def line(self) -> str:
        """For a person: what was chosen."""
        said = {
            "batch_size": f"batches of {self.batch_size}",
            "epochs": f"{self.epochs} epochs",
            "lr": f"rate {self.lr:g}",
        }
        return f"chosen for this number of rows: {', '.join(said[name] for name in self.chosen)}"
