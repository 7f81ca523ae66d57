"""What a sweep has measured: forget loss against retain loss by strength, as a table, a file and a plot."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from perta_fast.importance.store import ImportanceMetadata
from perta_fast.report import DataRecord, write_readable_json

LARGEST = 1024.0  # the search for a strength goes no further up,
SMALLEST = 1 / 1024  # and no further down
FILE_NAME = "sweep.json"
PLOT_NAME = "sweep.png"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Row:
    """One strength, measured.

    forget_loss, retain_loss: mean over the samples of each one's mean token cross-entropy, in nats; not finite
    where the strength has broken the model. changed: share of the parameters' elements, in [0, 1], whose stored
    value differs from theta_full's. seconds: what subtraction, scoring and restoring took.
    """

    lam: float
    forget_loss: float
    retain_loss: float
    changed: float
    seconds: float

    @property
    def is_finite(self) -> bool:
        """Whether both losses are numbers that can be compared."""
        return math.isfinite(self.forget_loss) and math.isfinite(self.retain_loss)

    def keeps(self, limit: float) -> bool:
        """Whether the retain loss is at most ``limit``; never where a loss is not finite."""
        return self.is_finite and self.retain_loss <= limit


@dataclass
class Sweep:
    """The record of one sweep. Paths are absolute; hashes are BLAKE3.

    rows: by strength; the one at 0 is the model as it is. limit: the largest retain loss that was allowed, None
    where the strengths were given. importance: by ``forget`` and ``retain``; empty for rule ``tv``.
    """

    rows: list[Row]
    limit: float | None
    settings: dict[str, Any]
    inputs: dict[str, str]
    data: dict[str, DataRecord]
    importance: dict[str, ImportanceMetadata] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    started: str = ""
    finished: str = ""

    @property
    def best(self) -> Row | None:
        """The largest measured strength that keeps the limit; None where the strengths were given."""
        if self.limit is None:
            return None
        return max((row for row in self.rows if row.keeps(self.limit)), key=lambda row: row.lam)

    def summary(self) -> str:
        """A line a strength, what the search came to, and notes."""
        lines = [f"{'lambda':>12}{'forget loss':>13}{'retain loss':>13}{'changed':>10}{'seconds':>9}"]
        lines += [
            f"{row.lam:12g}{row.forget_loss:13.4f}{row.retain_loss:13.4f}"
            f"{100 * row.changed:8.1f} %{row.seconds:9.1f}"
            for row in self.rows
        ]
        lines += self._outcome()
        return "\n".join([*lines, *self.notes])

    def _outcome(self) -> list[str]:
        best = self.best
        if best is None:
            return []
        within = f"keeps the retain loss within {self.limit:.6g}"
        if best.lam == LARGEST:
            return [f"Even lambda {LARGEST:g} {within}, and no larger one is tried."]
        broken = min((row for row in self.rows if row.lam > best.lam), key=lambda row: row.lam)
        if best.lam == 0:
            return [f"No lambda that was tried {within}, down to {broken.lam!r}; none smaller is tried."]
        return [
            f"Lambda {best.lam!r} {within}, at {best.retain_loss:.6g}; the next larger that was tried, "
            f"{broken.lam!r}, does not, at {broken.retain_loss:.6g}."
        ]

    def save(self, directory: Path) -> None:
        """Write ``sweep.json`` into ``directory``, and ``sweep.png`` where matplotlib is there to draw it."""
        if not _draw(self.rows, self.limit, directory / PLOT_NAME):
            self.notes.append(f"{PLOT_NAME} was not drawn: matplotlib is not installed.")
        best = self.best
        content = asdict(self) | {
            "format_version": FORMAT_VERSION,
            "best": None if best is None else best.lam,
            "rows": [{key: _finite_or_none(value) for key, value in asdict(row).items()} for row in self.rows],
        }
        write_readable_json(directory / FILE_NAME, content)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no other word for it


def _draw(rows: Sequence[Row], limit: float | None, path: Path) -> bool:
    """Plot forget loss against retain loss, a point a strength; return whether matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    shown = [row for row in rows if row.is_finite]
    axes.plot([row.retain_loss for row in shown], [row.forget_loss for row in shown], marker="o")
    for row in shown:
        place = (row.retain_loss, row.forget_loss)
        axes.annotate(f"λ = {row.lam:g}", place, xytext=(5, 5), textcoords="offset points")
    if limit is not None:
        axes.axvline(limit, color="gray", linestyle="--", label="limit")
        axes.legend()
    axes.set_xlabel("retain loss (nats)")
    axes.set_ylabel("forget loss (nats)")
    figure.savefig(path, dpi=150)
    return True
