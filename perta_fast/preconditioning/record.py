"""The record of one preconditioning, which lies beside what it has made."""

from dataclasses import asdict, dataclass
from pathlib import Path

from perta_fast.checkpoints.companions import PRECONDITIONING
from perta_fast.errors import printable_lines
from perta_fast.files.reading import read_json
from perta_fast.records.preconditioned import Preconditioned
from perta_fast.records.report import DataRecord, Scalar, read_as_lines
from perta_fast.records.typed_json import typed, write_readable_json


@dataclass(frozen=True)
class Preconditioning:
    """The record of one preconditioning.

    base, tuned, seen_at: absolute paths, the last of the model whose inputs were seen on ``retain``. kept: the norm of
    the task vector of all linear maps after, as a share of that before. linear_maps: how many were changed. memory:
    peaks in bytes. seconds: with loading.
    """

    base: str
    tuned: str
    seen_at: str
    retain: DataRecord
    settings: dict[str, Scalar | None]
    linear_maps: int
    kept: float
    warnings: list[str]
    seconds: float
    memory: dict[str, int]
    versions: dict[str, str]
    started: str
    finished: str

    def in_report(self) -> Preconditioned:
        """What the report of a run that subtracts the result says of it."""
        samples, mu = self.retain["samples"], float(self.settings["mu"] or 0)
        return Preconditioned(self.tuned, self.seen_at, samples, mu, self.linear_maps, self.kept)

    def save(self, directory: Path) -> None:
        """Write ``perta_precondition.json`` into ``directory``."""
        write_readable_json(directory / PRECONDITIONING, asdict(self))

    @classmethod
    def read(cls, directory: Path) -> "Preconditioning":
        """The record in ``directory``. Raises InputError if it cannot be read."""
        record: Preconditioning = typed(read_json(directory / PRECONDITIONING), cls)
        return record

    def summary(self) -> str:
        """A few lines for a person."""
        lines = [self.in_report().line(), f"all other parameters are those of the base; {self.seconds:.1f} s"]
        lines += read_as_lines({"retain": self.retain})
        return printable_lines(lines + [f"warning: {warning}" for warning in self.warnings])
