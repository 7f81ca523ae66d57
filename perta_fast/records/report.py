"""What a run did, as ``perta_report.json`` beside its output."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from perta_fast.data.chat import Told
from perta_fast.data.given import IN_WORDS, GivenRows, is_given
from perta_fast.errors import InputError, names_shown, printable, printable_lines
from perta_fast.files.hashing import hash_files
from perta_fast.files.journal import check_finished
from perta_fast.files.reading import checked_path, exists, read_json
from perta_fast.progress import LOGGER
from perta_fast.records.check import Check, CheckedData
from perta_fast.records.file_record import FileRecord
from perta_fast.records.importance_record import ImportanceRecord
from perta_fast.records.notebook import Shown
from perta_fast.records.preconditioned import Preconditioned
from perta_fast.records.removal import Removal
from perta_fast.records.report_version_1 import from_version_1
from perta_fast.records.setting_choice import SettingChoice
from perta_fast.records.strength_choice import StrengthChoice
from perta_fast.records.typed_json import typed, write_readable_json
from perta_fast.rules import Rule

FILE_NAME = "perta_report.json"
FORMAT_VERSION = 2
Scalar = str | int | float | bool
_OF_A_MERGE = {"subtracted": "merged", "copied: task vector is zero": "copied: the adapter does not change it"}
_OVERLAP = (
    "of this: computing {compute_seconds:.2f} s; "
    "reading {read_seconds:.2f} s, {read_hidden_seconds:.2f} s of it hidden; "
    "writing {write_seconds:.2f} s, {write_hidden_seconds:.2f} s of it hidden"
)


class DirectoryRecord(TypedDict):
    """One input or output. kept: False if the directory was temporary or was changed by the run."""

    path: str
    files: dict[str, FileRecord]
    kept: NotRequired[bool]


class DataRecord(TypedDict):
    """One data set; samples, and how many of them were cut to the length limit.

    path: "" of rows that were given in Python; their hash is that of them as JSON lines.
    tokenised: how many of the samples were, where the search for lam or the check has read some of them alone.
    read_as: which fields were taken for what, if they had other names (``forms.Row``).
    """

    path: str
    blake3: str
    samples: int
    truncated: int
    tokenised: NotRequired[int]
    read_as: NotRequired[str]


def data_record(
    source: str | Path | GivenRows, digest: str, samples: int, truncated: int = 0, read_as: str = ""
) -> DataRecord:
    """The record of a data file, or of rows given in Python."""
    record: DataRecord = {"path": data_path(source), "blake3": digest, "samples": samples, "truncated": truncated}
    if read_as:
        record["read_as"] = read_as
    return record


def data_path(source: str | Path | GivenRows) -> str:
    """Where data lies, as records have it: "" for rows given in Python."""
    return "" if isinstance(source, GivenRows) or is_given(source) else str(Path(source).resolve())


def data_place(record: Mapping[str, Any]) -> str:
    """For a person: where the data lies."""
    return str(record["path"] or IN_WORDS)


def read_as_lines(data: Mapping[str, DataRecord]) -> list[str]:
    """For a person: which fields were taken for what."""
    return [f"{role} data: {record['read_as']}" for role, record in data.items() if record.get("read_as")]


def truncation_warnings(data: Mapping[str, DataRecord]) -> list[str]:
    """A warning for each data set of which samples were cut."""
    warnings = []
    for role, record in data.items():
        of = f"{record['samples']} {role} samples"
        if "tokenised" in record:
            of = f"the {record['tokenised']} {role} samples that were tokenised"
        if record["truncated"]:
            warnings.append(f"{record['truncated']} of {of} were cut to the length limit")
    return warnings


class EstimationSettings(TypedDict):
    """How ``unlearn`` estimated the importances.

    max_length: tokens that samples were cut to; None if neither the run nor the model has a limit. schedule: the fields
    of ``streaming.schedule.Schedule``, if the run was streamed to a new directory. system_prompt, date_string: as they
    were given; date: what the chat template was told, None if it did not ask. Older reports lack these three.
    """

    at: str
    estimator: str
    batch_size: int
    max_length: int | None
    dtype: str | None
    device: str
    stream: bool
    schedule: dict[str, Any] | None
    processes: int
    system_prompt: NotRequired[str | None]
    date_string: NotRequired[str | None]
    date: NotRequired[str | None]


class Phase(TypedDict):
    """One part of the run. bytes: each byte read and each byte written, once."""

    seconds: float
    bytes: int
    gb_per_s: float


@dataclass
class TensorReport:
    """What was done to one tensor, and how much it changed.

    action: "subtracted", or "copied: " and the reason. mean_weight: mean of w. relative_change:
    ||theta_out - theta|| / ||theta|| (Frobenius), after rounding; None if it is not finite. changed: elements whose
    stored value differs. kept_rows: rows at the end that not all inputs have, so that they are as in the model;
    mean_weight and relative_change are of the others.
    """

    name: str
    dtype: str
    shape: list[int]
    action: str
    mean_weight: float | None = None
    relative_change: float | None = None
    changed: int = 0
    kept_rows: int = 0


@dataclass
class Report:
    """The record of one run. Paths are absolute; hashes are BLAKE3.

    data: by ``forget`` and ``retain``. overlap: seconds that a streamed run spent computing, reading weights and
    writing results, and how many of the last two were hidden behind computing. settings: how the run estimated the
    importances, if it did, and what chat templates were told.
    recipe: the arguments of ``unlearn``, by the names of the options (``recipe.as_recipe``).
    check: what was forgotten and kept; None if the run did not look. choice: how lam was chosen; None if it was given.
    setting_choice: how rule, lam and the rest were chosen, by ``choose`` or a sweep; None if they were not.
    preconditioned: what the run did to θ_f before it subtracted it, if anything. removal: how the retain importance was
    made from a whole one; None if it was estimated.
    merged: whether the run has added an adapter to its base, which is the formula with λ = -1 and θ_full = θ_0.
    common_rows: whether a resized vocabulary was allowed. only, leave: the patterns that chose which parameters are
    changed. other_weights: files in the model's directory that may hold weights a second time, or an adapter: a new
    directory does not have them; in place they are as they were.
    file_list: name of the list of the output's files; "" in reports of versions that wrote none.
    """

    rule: str
    lam: float
    p: float
    alpha: float
    threshold: float | None
    inputs: dict[str, DirectoryRecord]
    data: dict[str, DataRecord] = field(default_factory=dict)
    output: DirectoryRecord = field(default_factory=lambda: DirectoryRecord(path="", files={}))
    settings: EstimationSettings | dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Scalar] = field(default_factory=dict)
    choice: StrengthChoice | None = None
    setting_choice: SettingChoice | None = None
    preconditioned: Preconditioned | None = None
    removal: Removal | None = None
    importance: dict[str, ImportanceRecord] = field(default_factory=dict)
    tensors: list[TensorReport] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    merged: bool = False
    common_rows: bool = False
    only: list[str] = field(default_factory=list)
    leave: list[str] = field(default_factory=list)
    other_weights: list[str] = field(default_factory=list)
    file_list: str = ""
    check: Check | None = None
    phases: dict[str, Phase] = field(default_factory=dict)
    overlap: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    threads: int = 1
    instruction_set: str = ""
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    started: str = ""
    finished: str = ""
    in_place: bool = False
    resumed: int = 0
    format_version: int = FORMAT_VERSION

    def add_phase(self, name: str, seconds: float, byte_count: int) -> None:
        """Record a phase, and its rate."""
        rate = byte_count / seconds / 1e9 if seconds > 0 else 0.0
        self.phases[name] = {"seconds": seconds, "bytes": byte_count, "gb_per_s": rate}

    def warn(self, text: str) -> None:
        """Add a warning, here and to the log, unless it is there."""
        if text in self.warnings:
            return
        self.warnings.append(text)
        LOGGER.warning("%s", printable(text))

    def save(self, directory: Path) -> None:
        """Write ``perta_report.json`` into ``directory``."""
        write_readable_json(checked_path(directory) / FILE_NAME, self.as_record())

    def as_record(self) -> dict[str, Any]:
        """What is written to the file."""
        return asdict(self)

    @classmethod
    def load(cls, directory: Path) -> "Report":
        """Read the report of a run. Raises InputError if it is missing or malformed, or a run in place was stopped."""
        check_finished(directory)  # a report that is there is of an earlier run
        return cls.read(directory / FILE_NAME)

    @classmethod
    def read(cls, path: Path) -> "Report":
        """``load`` of a file, wherever it lies."""
        content = read_json(path, "is this the output of a run?")
        unknown = f"{path}: is not a report that this version understands"
        try:
            if isinstance(content, dict) and content.get("format_version") == 1:
                content = from_version_1(content)
            report: Report = typed(content, cls)
        except InputError as error:
            raise InputError(f"{unknown}: {error}") from error
        if report.format_version != FORMAT_VERSION:
            raise InputError(f"{unknown}: its format_version is {report.format_version}")
        return report

    def chosen_rule(self) -> Rule:
        """The rule with its rescaling. Raises InputError if the report contradicts itself."""
        return Rule.of(self.rule, self.lam, self.p, self.alpha, self.threshold)

    def prompts(self) -> list[str]:
        """For a person, what the chat template was told for each importance, if anything."""
        told = {role: Told.read(record).in_words() for role, record in self.importance.items()}
        return [f"{role.replace('_', ' ')}: {words}" for role, words in told.items() if words]

    @property
    def changed_share(self) -> float:
        """Share of the elements whose stored value differs."""
        elements = sum(prod(row.shape) for row in self.tensors)
        return sum(row.changed for row in self.tensors) / elements if elements else 0.0

    def __repr__(self) -> str:
        how = "the base with its adapter" if self.merged else f"rule {self.rule_words()}, lambda {self.lam:.6g}"
        return printable(
            f"<Report: {how}, {self.changed_share:.1%} of the elements changed, {self.output['path'] or 'no output'}>"
        )

    def rule_words(self) -> str:
        """The rule as it was asked for: what a preconditioned θ_f goes through is rule tv."""
        return self.rule if self.preconditioned is None else f"preconditioned, mu {self.preconditioned.mu:g}"

    def action_counts(self) -> dict[str, int]:
        """How many tensors each action was done to; of a merge, in words of a merge."""
        words = _OF_A_MERGE if self.merged else {}
        return {words.get(action, action): count for action, count in self.counts.items()}

    def _repr_html_(self) -> str:
        whole = self.check if self.check is not None and self.check.is_whole else None
        rows = [data.cells(role) for role, data in whole.data.items()] if whole is not None else []
        lines = [repr(self).strip("<>")]
        lines += [] if self.choice is None else self.choice.lines()
        lines += [] if self.setting_choice is None else self.setting_choice.lines()
        title = whole.verdict() if whole is not None else "What was forgotten and kept was not measured."
        return Shown(title, CheckedData.HEAD if rows else (), rows, lines, self.warnings).as_html()

    def summary(self) -> str:
        """A few lines for a person."""
        counts = ", ".join(f"{number} {action}" for action, number in self.action_counts().items())
        how = "the base with its adapter" if self.merged else f"rule {self.rule_words()}, lambda {self.lam:.10g}"
        if self.rule != "tv":  # which has no weights
            how += f", p {self.p:g}, alpha {self.alpha:g}"
        lines = [how, f"tensors: {counts}"]
        lines += [] if self.preconditioned is None else [self.preconditioned.line()]
        lines += [] if self.removal is None else [self.removal.line()]
        lines += [] if self.choice is None else self.choice.lines()
        lines += [] if self.setting_choice is None else self.setting_choice.lines()
        lines += scope_lines(self.only, self.leave) + read_as_lines(self.data)
        lines += self.prompts()
        if kept := [f"{row.name} {row.kept_rows}" for row in self.tensors if row.kept_rows]:
            lines.append(f"rows kept as the model has them, as not all inputs have them: {names_shown(kept)}")
        if self.other_weights and not self.in_place:  # in place it is a warning
            lines.append(f"not copied, as other weights or an adapter: {names_shown(self.other_weights)}")
        for name, phase in self.phases.items():
            rate = f", {phase['gb_per_s']:.1f} GB/s" if phase["bytes"] else ""
            lines.append(f"{name}: {phase['seconds']:.2f} s{rate}")
        if self.overlap:
            lines.append(_OVERLAP.format_map(self.overlap))
        if self.memory.get("peak_anonymous_bytes"):
            own = self.memory["peak_anonymous_bytes"] / 2**20
            start = self.memory.get("anonymous_bytes_at_start", 0) / 2**20
            mapped = self.memory.get("peak_mapped_file_bytes", 0) / 2**20
            lines.append(
                f"peak memory: {own:.0f} MiB of its own ({start:.0f} MiB at the start), "
                f"{mapped:.0f} MiB of mapped files"
            )
        if self.check is not None:
            lines += self.check.lines()
        lines += [f"warning: {warning}" for warning in self.warnings]
        return printable_lines(lines)


def scope_lines(only: Sequence[str] | None, leave: Sequence[str] | None) -> list[str]:
    """For a person: which parameters were chosen to be changed, by their patterns."""
    said = (("changed only", only), ("left alone", leave))
    return [f"{what}: {', '.join(patterns)}" for what, patterns in said if patterns]


def describe_files(hashes: Mapping[Path, str], directory: Path) -> DirectoryRecord:
    """The files of one input or output: absolute directory, and size and hash of each."""
    return {
        "path": str(directory.resolve()),
        "files": {
            path.name: {"bytes": path.stat().st_size, "blake3": digest}
            for path, digest in hashes.items()
            if path.parent == directory
        },
    }


def gone_files(record: DirectoryRecord) -> list[Path]:
    """The files of a run's directory that are no longer there."""
    paths = (Path(record["path"]) / name for name in record["files"])
    return [path for path in paths if not exists(path)]


def changed_files(record: DirectoryRecord, advance: Callable[[int], None] | None = None) -> list[Path]:
    """The files of a run's directory that are there, but no longer hold what the run has seen.

    advance: see ``hash_file``. Raises RunError if a file cannot be read.
    """
    paths = {Path(record["path"]) / name: file for name, file in record["files"].items()}
    present = [path for path in paths if exists(path)]
    hashes = hash_files(present, os.cpu_count() or 1, advance)
    return [path for path in present if hashes[path] != paths[path]["blake3"]]
