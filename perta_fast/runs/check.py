"""The check of ``unlearn``: what theta_full and theta_out say to both data sets, from one forward pass over each row.

A few rows of each data set are measured, evenly spread. An answer is exact if each of its tokens is the likeliest after
those before it, which is when greedy decoding gives it. The check never makes a run fail: if it cannot measure, the
report says why. Torch is imported only where something is measured.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.companions import CARD
from perta_fast.data.chat import ChatSettings, Told
from perta_fast.data.formats import data_files
from perta_fast.data.forms import fields_from, fields_text
from perta_fast.data.given import IN_WORDS, is_given
from perta_fast.data.rows import Row, evenly_spread, read_data
from perta_fast.data.samples import IGNORED
from perta_fast.distributed.ranks import Ranks
from perta_fast.dtypes import torch_dtype
from perta_fast.errors import InputError, Interrupted, PertaError, RunError, is_out_of_memory, shell_command
from perta_fast.files.durable import move, remove, sync
from perta_fast.files.identity import is_same
from perta_fast.files.own import make_own_directory
from perta_fast.memory import available_bytes, format_size
from perta_fast.progress import LOGGER, Progress
from perta_fast.records.check import Check, CheckedData, Measured
from perta_fast.records.file_hashes import HASHES, write_hashes
from perta_fast.records.model_card import add_verdict
from perta_fast.records.report import FILE_NAME, Report
from perta_fast.records.versions import now
from perta_fast.runs.encoded_rows import EncodedRows
from perta_fast.subtraction.journal_directory import clear_leftover

if TYPE_CHECKING:
    import torch

    from perta_fast.models.loading import Subject

ROWS = 24  # of each data set that are measured before and after
PROBED = 8  # of these, how many are measured with base and tuned
PHASE = "before and after"
_BESIDE = ".check.perta-partial"  # in the output: the new report until it takes the place of the old one
_STREAMED = "the run was streamed, as the model may not fit in memory"
_ROLES = ("forget", "retain")


@dataclass(frozen=True)
class Checkpoints:
    """What is loaded, and how."""

    model: Path
    base: Path
    tuned: Path
    common_rows: bool
    device: "str | torch.device | None"
    dtype: "torch.dtype | None"


@dataclass(frozen=True)
class Rows:
    """The rows to measure, by role, of so many. chat, max_length: how they become tokens. encoded: as they have."""

    by_role: Mapping[str, Sequence[Row]]
    totals: Mapping[str, int]
    chat: ChatSettings
    max_length: int | None
    batch_size: int
    progress: Progress
    encoded: EncodedRows = field(default_factory=EncodedRows)

    @classmethod
    def of(cls, data: Mapping[str, Sequence[Row]], **how: Any) -> "Rows":
        """Evenly spread rows of ``data``."""
        chosen = {role: [rows[k] for k in evenly_spread(len(rows), ROWS)] for role, rows in data.items()}
        return cls(chosen, {role: len(rows) for role, rows in data.items()}, **how)

    def measure(self, subject: "Subject", role: str, when: str, most: int | None = None) -> Measured:
        """Loss and exact answers of a loaded model on (the first ``most`` of) the rows of one role."""
        from perta_fast.models.loading import samples_and_told
        from perta_fast.models.token_scores import evaluation_mode, score_rows

        rows = self.by_role[role][:most]
        samples, told = samples_and_told(subject, rows, self.max_length, self.chat)
        if most is None:
            self.encoded.note(role, samples, told)
        with evaluation_mode(subject.module):
            scores = score_rows(
                subject.module,
                samples,
                batch_size=self.batch_size,
                hits=True,
                progress=self.progress,
                description=f"{when}, {role} data",
            )
        loss = -sum(float(score.log_probs.mean()) for score in scores) / len(scores)
        exact = sum(bool(score.hits.all()) for row, score in zip(rows, scores, strict=True) if _has_answer(row))
        return Measured(loss if abs(loss) < float("inf") else None, exact)


@dataclass
class Checking:
    """The check of a run that is going on. rows: None if nothing is to be measured in this process."""

    check: Check
    checkpoints: Checkpoints
    rows: Rows | None
    ranks: Ranks
    seconds: float = 0.0

    @classmethod
    def of(cls, options: Any, rows: Mapping[str, Sequence[Row]], day: date, ranks: Ranks) -> "Checking | None":
        """None unless a check was asked for and there is data of both roles. options: named as those of ``unlearn``."""
        if not options.check or set(rows) != set(_ROLES):
            return None
        out = options.model if options.in_place else options.out
        check = Check.begun(eval_command(out, options), _STREAMED if options.stream else "")
        checkpoints = Checkpoints(
            model=Path(options.model),
            base=Path(options.base),
            tuned=Path(options.tuned),
            common_rows=options.common_rows,
            device=options.device,
            dtype=options.dtype,
        )
        measured = None
        if ranks.first and not options.stream:
            measured = Rows.of(
                rows,
                chat=ChatSettings.of(options.system_prompt, options.date_string, day),
                max_length=options.max_length,
                batch_size=options.batch_size,
                progress=options.progress,
            )
        return cls(check, checkpoints, measured, ranks)

    def look(self, subject: "Subject", path: str | Path) -> None:
        """Measure what the loaded checkpoint ``path`` can tell; a base is turned into theta_f."""
        with self.ranks.together(PHASE), self._explained():
            self._look(subject, path)

    def before(self) -> None:
        """Load and measure, one after the other, what ``look`` has not seen."""
        with self.ranks.together(PHASE), self._explained():
            for path in (self.checkpoints.model, self.checkpoints.base):
                if self.rows is not None and not self._has_seen(path):
                    self._look(_load(path, self.checkpoints), path)

    def annotate(self, report: Report) -> None:
        """Put into the report what is known before the subtraction."""
        report.check = self.check
        for warning in self.check.early_warnings():
            report.warn(warning)

    def finish(self, report: Report) -> Report:
        """Measure the result, which is complete, and write its report again."""
        return _finish(report, Path(report.output["path"]), self.checkpoints, self.rows, self.ranks, self.seconds)

    def _has_seen(self, path: Path) -> bool:
        seen = bool(self.check.data) or not is_same(path, self.checkpoints.model)
        return seen and (bool(self.check.base) or not is_same(path, self.checkpoints.base))

    def _look(self, subject: "Subject", path: str | Path) -> None:
        if self.rows is None or self.check.left_out:
            return
        if is_same(path, self.checkpoints.model):
            self.check.data = {role: self._begun(subject, role) for role in _ROLES}
        if is_same(path, self.checkpoints.base):
            self.check.base = self._probed(subject, "base")
            with suppress(Exception):  # an exchange is then told by the result
                _tune_(subject, self.checkpoints)
                self.check.tuned = self._probed(subject, "tuned")

    def _begun(self, subject: "Subject", role: str) -> CheckedData:
        assert self.rows is not None
        rows = self.rows.by_role[role]
        answers = sum(map(_has_answer, rows))
        before = self.rows.measure(subject, role, "before")
        return CheckedData(len(rows), self.rows.totals[role], answers, before, None)

    def _probed(self, subject: "Subject", name: str) -> dict[str, float | None]:
        assert self.rows is not None
        return {role: self.rows.measure(subject, role, name, PROBED).loss for role in _ROLES}

    @contextmanager
    def _explained(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.check.left_out = _reason(error)
        self.seconds += time.perf_counter() - started


def finish_resumed(report: Report, directory: Path, progress: Progress, ranks: Ranks) -> Report:
    """``Checking.finish`` for a run that ``resume`` has finished: its data is read again.

    directory: of the result, which may have been renamed since the run began.
    """
    check = report.check
    if check is None or not check.is_due:
        return report
    given = {name: str(value) for name, value in report.recipe.items()}
    checkpoints = Checkpoints(
        model=Path(given["model"]),
        base=Path(given["base"]),
        tuned=Path(given["tuned"]),
        common_rows=report.common_rows,
        device=given.get("device"),
        dtype=torch_dtype(given["dtype"]) if "dtype" in given else None,
    )

    def read() -> Rows:
        fields = fields_from(given["fields"]) if "fields" in given else None
        return Rows.of(
            {role: read_again(report, role, fields) for role in _ROLES},
            chat=Told.read(report.settings).again(),
            max_length=int(given["max-length"]) if "max-length" in given else None,
            batch_size=int(given["batch-size"]),
            progress=progress,
        )

    return _finish(report, directory, checkpoints, read if ranks.first else None, ranks, 0.0)


def eval_command(out: str | Path, options: Any) -> str:
    """What measures both data sets on the output with all rows, in the memory that the run had."""
    words: list[str | Path] = ["perta", "eval", "--model", Path(os.path.abspath(out))]
    for role in _ROLES:
        source = getattr(options, role)
        words += [f"--{role}", f"{role.upper()}.jsonl" if is_given(source) else Path(os.path.abspath(source))]
    if options.fields is not None:
        words += ["--fields", fields_text(options.fields)]
    for name in ("max_length", "system_prompt", "date_string"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if options.stream:
        words.append("--stream")
        for name in ("memory", "device_memory"):
            if (limit := getattr(options, name)) is not None:
                words += [f"--{name.replace('_', '-')}", str(limit)]
    return shell_command(*words)


def _finish(
    report: Report,
    directory: Path,
    checkpoints: Checkpoints,
    rows: "Rows | Callable[[], Rows] | None",
    ranks: Ranks,
    seconds: float,
) -> Report:
    check = report.check
    if check is None or not check.is_due:
        return report
    started = time.perf_counter()
    with ranks.together(PHASE):
        if rows is not None:
            try:
                try:
                    _measure_result(check, directory, checkpoints, rows() if callable(rows) else rows)
                except Exception as error:
                    check.left_out = _reason(error)
                changed = any(row.changed for row in report.tensors)
                if check.is_whole and report.lam > 0 and changed:  # others have a warning of their own
                    for warning in check.late_warnings():
                        report.warn(warning)
                report.add_phase(PHASE, seconds + time.perf_counter() - started, 0)
                report.finished = now()
                _save(report, directory)
                if report.in_place:
                    clear_leftover(directory, checked=True)
            except KeyboardInterrupt:
                how = shell_command("perta", "resume", directory) if report.in_place else check.command
                raise Interrupted(
                    f"interrupted; {directory} is complete, and only the check of what was forgotten and kept is not "
                    f"done. Do it with: {how}"
                ) from None
    finished: Report = ranks.share(report)
    return finished


def _measure_result(check: Check, directory: Path, checkpoints: Checkpoints, rows: Rows) -> None:
    subject = _load(directory, checkpoints)
    after = {role: rows.measure(subject, role, "after") for role in _ROLES}
    check.data = {role: replace(data, after=after[role]) for role, data in check.data.items()}


def _save(report: Report, directory: Path) -> None:
    """Put the report, the model card and the list of hashes in the place of the old ones, each whole."""
    beside = directory / _BESIDE
    try:
        make_own_directory(beside)
        names = [FILE_NAME, HASHES]
        if report.check is not None and report.check.is_whole:
            add_verdict(directory / CARD, beside / CARD, report.check)
            names.insert(0, CARD)
        report.save(beside)
        write_hashes(directory, report, {name: beside / name for name in names if name != HASHES})
        for name in names:
            sync(beside / name)
        for name in names:
            move(beside / name, directory / name)
    except OSError as error:
        raise RunError(
            f"{directory}: is complete, but the check could not be put into its report: {error.strerror}"
        ) from error
    finally:
        remove(beside)


def _load(path: Path, checkpoints: Checkpoints) -> "Subject":
    """Load a checkpoint as the run would. Raises InputError if the memory would not hold it."""
    from perta_fast.models.loading import load_subject

    size, available = Checkpoint.open(path).size, available_bytes()
    if available is not None and size > available:
        raise InputError(f"the model has {format_size(size)}, and only {format_size(available)} of the memory are free")
    return load_subject(path, checkpoints.device, checkpoints.dtype)


def _tune_(subject: "Subject", checkpoints: Checkpoints) -> None:
    """Turn a loaded base into theta_f, by adding the task vector: no second model is loaded."""
    from perta_fast.subtraction.on_module import apply_to_module_

    LOGGER.addFilter(_no_record)  # a strength below 0 is warned of, and here it is meant
    try:
        apply_to_module_(
            subject.module,
            checkpoints.base,
            checkpoints.tuned,
            rule="tv",
            lam=-1.0,
            common_rows=checkpoints.common_rows,
            allow_zero=True,
        )
    finally:
        LOGGER.removeFilter(_no_record)


def _no_record(_: Any) -> bool:
    return False


def read_again(report: Report, role: str, fields: Any) -> list[Row]:
    """The rows that a run has read. Raises InputError if the data is gone or has changed since."""
    record = report.data[role]
    if not record["path"]:
        raise InputError(f"the {role} data were {IN_WORDS}, which are not kept")
    gone = InputError(f"the {role} data {record['path']} is gone, or has changed since the run began")
    if not all(map(os.path.isfile, data_files(record["path"]))):  # a pipe would be waited for
        raise gone
    rows, digest = read_data(record["path"], fields)
    if digest != record["blake3"]:
        raise gone
    return rows


def _has_answer(row: Row) -> bool:
    """Whether something of the row carries no loss: what is answered to."""
    if row.is_tokenised:
        return any(IGNORED in sample.labels for sample in row.content["samples"])
    return "text" not in row.content


def _reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return "the memory was too small"
    if isinstance(error, PertaError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
