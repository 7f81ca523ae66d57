"""What tuning did, as ``perta_tune.json`` beside its output."""

from dataclasses import asdict, dataclass
from pathlib import Path

from perta_fast.records.report import DataRecord, Scalar
from perta_fast.records.typed_json import write_readable_json

FILE_NAME = "perta_tune.json"


@dataclass(frozen=True)
class Tuning:
    """The record of one tuning.

    base: absolute path. settings: max_length is None for the model's own limit. tuned_parameters: how many elements
    were trained. loss_before, loss_after: mean over the samples of their mean token loss, in nats. epoch_losses: by
    epoch, the mean over its steps of the batch's mean token loss. memory: peaks in bytes. seconds: with loading.
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

    def save(self, directory: Path) -> None:
        """Write ``perta_tune.json`` into ``directory``."""
        write_readable_json(directory / FILE_NAME, asdict(self))

    def summary(self) -> str:
        """A few lines for a person."""
        kind = "checkpoint" if self.settings["full"] else f"adapter of rank {self.settings['rank']}"
        lines = [
            f"{kind}: {self.tuned_parameters:,} parameters tuned on {self.data['samples']} samples, "
            f"{self.settings['epochs']} epochs, {self.seconds:.1f} s",
            f"mean loss of the forget data: {self.loss_before:.4f} before, {self.loss_after:.4f} after",
        ]
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])
