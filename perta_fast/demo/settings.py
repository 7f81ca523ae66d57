"""The sizes of a demo."""

from dataclasses import dataclass

from perta_fast.rules import PRECONDITIONED


@dataclass(frozen=True)
class Settings:
    """Authors of each kind, shape of the model, length of each training, and the strengths to try.

    threads: of torch; None does not change their number.
    """

    forget_authors: int = 10
    retain_authors: int = 40
    other_authors: int = 100
    hidden_size: int = 128
    layers: int = 4
    batch_size: int = 32
    pretraining_epochs: int = 5
    pretraining_rate: float = 2e-3
    tuning_epochs: int = 20
    tuning_rate: float = 1e-3
    lams: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.45, 1.6, 1.8, 2.0, 2.3)
    preconditioned_lams: tuple[float, ...] = (1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0, 16.0)
    threads: int | None = None

    def lams_of(self, rule: str) -> tuple[float, ...]:
        """The strengths to try for one rule; a preconditioned task vector is shorter."""
        return self.preconditioned_lams if rule == PRECONDITIONED else self.lams


FULL = Settings()
FAST = Settings(
    forget_authors=2,
    retain_authors=4,
    other_authors=16,
    hidden_size=64,
    layers=2,
    batch_size=16,
    pretraining_epochs=6,
    tuning_epochs=20,
    tuning_rate=3e-3,
    lams=(0.5, 1.0),
    preconditioned_lams=(2.0, 4.0),
    threads=1,  # with matrices this small a second one mostly waits, and on a busy machine both do
)
