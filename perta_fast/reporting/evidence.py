"""Sweeps and evaluations that a page shows beside the run's report, and whether files are unchanged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perta_fast.errors import InputError, RunError
from perta_fast.evaluation.results import EvaluationFile
from perta_fast.records.report import DirectoryRecord, changed_files, gone_files
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.sweeping.plot import is_drawable
from perta_fast.sweeping.results import FILE_NAME as SWEEP
from perta_fast.sweeping.results import Sweep


@dataclass(frozen=True)
class Curve:
    """One curve of ``sweep``: the unchanged model, then the settings of one rule. label: its name."""

    label: str
    path: Path
    rows: list[ScoredSetting]
    sweep: Sweep


@dataclass(frozen=True)
class Scores:
    """One evaluation. values: the aggregate of each metric, None if it is not finite. hashes: of its data.

    stress: scores under stress, by name, in the same way.
    """

    label: str
    path: Path
    model: str
    values: dict[str, float | None]
    hashes: Mapping[str, str]
    stress: Mapping[str, float | None]

    def point(self) -> tuple[float, float] | None:
        """Retain and forget loss, if both can be drawn."""
        retain, forget = self.values.get("retain_loss"), self.values.get("forget_loss")
        if retain is None or forget is None or not (is_drawable(retain) and is_drawable(forget)):
            return None
        return retain, forget


def read_curves(directories: Sequence[str | Path]) -> list[Curve]:
    """Read ``sweep.json`` of each directory.

    Raises InputError if one is missing or malformed, and for sweeps on different data, whose losses are not comparable.
    """
    files = [Path(directory) / SWEEP for directory in directories]
    sweeps = [Sweep.read(path) for path in files]
    for path, sweep in zip(files[1:], sweeps[1:], strict=True):
        if data_hashes(sweep) != data_hashes(sweeps[0]):
            raise InputError(f"{path}: was scored on other data than {files[0]}; make a page for each")
    curves = [
        Curve(label, path, sorted([sweep.original, *rows], key=lambda row: row.lam), sweep)
        for path, sweep in zip(files, sweeps, strict=True)
        for label, rows in sweep.curves().items()
    ]
    labels = distinct([curve.label for curve in curves], [curve.path for curve in curves])
    return [replace(curve, label=label) for curve, label in zip(curves, labels, strict=True)]


def read_scores(paths: Sequence[str | Path]) -> list[Scores]:
    """Read result files of ``perta eval`` or of open-unlearning; no text in them is kept.

    Raises InputError if a file is missing or is not one of these.
    """
    files = [Path(path) for path in paths]
    labels = distinct([path.stem for path in files], files)
    return [_read_scores(path, label) for path, label in zip(files, labels, strict=True)]


def data_hashes(sweep: Sweep) -> dict[str, str]:
    """The hash of each data set that a sweep has chosen by."""
    return {role: sweep.data[role]["blake3"] for role in ("forget", "retain") if role in sweep.data}


def why_not_as_recorded(record: DirectoryRecord) -> str | None:
    """Why a directory no longer holds the files of the run; None if it does. Hashes all its files."""
    if not record.get("kept", True):
        return f"{record['path']} was temporary or has been replaced, so it was not kept"
    if gone := gone_files(record):
        return f"{gone[0]} is gone"
    try:
        changed = changed_files(record)
    except RunError as error:
        return str(error)
    return f"{changed[0]} has changed since the run" if changed else None


def _read_scores(path: Path, label: str) -> Scores:
    file = EvaluationFile.read(path)
    values = file.aggregates()
    if not values:
        raise InputError(f"{path}: has no metric; give the file that perta eval wrote")
    return Scores(label, path, file.model, values, file.data_hashes, file.under_stress())


def distinct(labels: list[str], paths: list[Path]) -> list[str]:
    """The labels. Equal labels get the shortest end of their directories that differs, in brackets."""
    directories: dict[str, list[Path]] = {label: [] for label in labels}
    for label, path in zip(labels, paths, strict=True):
        directories[label].append(path.parent)
    return [
        label if len(directories[label]) == 1 else f"{label} ({_tail(path.parent, directories[label])})"
        for label, path in zip(labels, paths, strict=True)
    ]


def _tail(directory: Path, others: Sequence[Path]) -> Path:
    """The shortest end of ``directory`` that no other directory has; all of it if there is none."""
    for count in range(1, len(directory.parts)):
        tails = [other.parts[-count:] for other in others]
        if tails.count(directory.parts[-count:]) == 1:
            return Path(*directory.parts[-count:])
    return directory
