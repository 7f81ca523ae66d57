"""The record of a tuning, ``perta_tune.json``."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from perta_fast.checkpoints.companions import TUNING
from perta_fast.errors import InputError, printable_lines
from perta_fast.files.reading import read_json
from perta_fast.records.report import DataRecord, Scalar, read_as_lines
from perta_fast.records.typed_json import typed, write_readable_json
from perta_fast.tuning.request import FORGET
from perta_fast.tuning.schedule import Schedule

FILE_NAME = TUNING


@dataclass(frozen=True)
class Tuning:
    """The record of one tuning.

    base: absolute path. role: what the data is, rows to ``forget`` or any ``data``. settings: max_length is None for
    the model's own limit; date is what the chat template was told, None if it did not ask. chosen: the settings that
    followed from the number of rows. tuned_parameters: how many elements were trained. loss_before, loss_after: mean
    over the samples of their mean token loss, in nats. epoch_losses: by epoch, the mean over its steps of what was
    minimised: the batch's mean token loss, and with retain_kl the weighted divergence. epoch_divergences: of that, by
    epoch, KL(base ‖ tuned) on retained rows, in nats a token. memory: peaks in bytes. seconds: with loading, and with
    the time before a stop. resumed: how often it was stopped and went on.
    """

    base: str
    data: DataRecord
    settings: dict[str, Scalar | None]
    tuned_parameters: int
    loss_before: float
    loss_after: float
    epoch_losses: list[float]
    warnings: list[str]
    seconds: float
    memory: dict[str, int]
    versions: dict[str, str]
    started: str
    finished: str
    role: str = FORGET
    retain: DataRecord | None = None
    chosen: list[str] = field(default_factory=list)
    epoch_divergences: list[float] = field(default_factory=list)
    resumed: int = 0

    def save(self, directory: Path) -> None:
        """Write ``perta_tune.json`` into ``directory``."""
        write_readable_json(directory / FILE_NAME, self.as_record())

    @classmethod
    def read(cls, directory: Path) -> "Tuning":
        """The record in ``directory``. Raises InputError if it is not one that this version writes."""
        path = directory / FILE_NAME
        content = read_json(path)
        try:
            tuning: Tuning = typed(content, cls)
        except InputError as error:
            raise InputError(f"{path}: is not the record of a tuning: {error}") from error
        return tuning

    def as_record(self) -> dict[str, Any]:
        """The content of ``perta_tune.json``."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for a person."""
        kind = "checkpoint" if self.settings["full"] else f"adapter of rank {self.settings['rank']}"
        whose = "of the forget data" if self.role == FORGET else "of the data"
        lines = [
            f"{kind}: {self.tuned_parameters:,} parameters tuned on {self.data['samples']} samples, "
            f"{self.settings['epochs']} epochs, {self.seconds:.1f} s",
            f"mean loss {whose}: {self.loss_before:.4f} before, {self.loss_after:.4f} after",
        ]
        if self.chosen:
            lines.append(self._schedule().line())
        if self.epoch_divergences:
            lines.append(f"divergence from the base on retained rows: {self.epoch_divergences[-1]:.4f} nats a token")
        data = {self.role: self.data} | ({} if self.retain is None else {"retain": self.retain})
        lines += read_as_lines(data)
        return printable_lines(lines + [f"warning: {warning}" for warning in self.warnings])

    def _schedule(self) -> Schedule:
        batch_size, epochs, lr = (self.settings[name] for name in ("batch_size", "epochs", "lr"))
        return Schedule(int(batch_size or 0), int(epochs or 0), float(lr or 0), tuple(self.chosen))
