"""The end of a check: the result, which is complete, is measured, and its report written again."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from perta_fast.checkpoints.companions import CARD
from perta_fast.data.chat import Told
from perta_fast.data.forms import fields_from
from perta_fast.distributed.ranks import Ranks
from perta_fast.dtypes import torch_dtype
from perta_fast.errors import Interrupted, PertaError, RunError, is_out_of_memory, shell_command
from perta_fast.files.durable import move, remove, sync
from perta_fast.files.own import make_own_directory
from perta_fast.progress import Progress
from perta_fast.records.check import Check
from perta_fast.records.file_hashes import HASHES, write_hashes
from perta_fast.records.model_card import add_verdict
from perta_fast.records.report import FILE_NAME, Report
from perta_fast.records.versions import now
from perta_fast.runs.checked_rows import ROLES, Checkpoints, Rows, load_checked, read_again
from perta_fast.subtraction.journal_directory import clear_leftover

PHASE = "before and after"
_BESIDE = ".check.perta-partial"  # in the output: the new report until it takes the place of the old one


def finish_check(
    report: Report,
    directory: Path,
    checkpoints: Checkpoints,
    rows: "Rows | Callable[[], Rows] | None",
    ranks: Ranks,
    seconds: float,
) -> Report:
    """Measure the result in ``directory`` if it is due, and write its report again.

    rows: what reads them, or None on a rank that measures nothing. seconds: that the check has taken so far.
    """
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
                    check.left_out = reason_of_failure(error)
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
    subject = load_checked(directory, checkpoints)
    after = {role: rows.measure(subject, role, "after") for role in ROLES}
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
            {role: read_again(report, role, fields) for role in ROLES},
            chat=Told.read(report.settings).again(),
            max_length=int(given["max-length"]) if "max-length" in given else None,
            batch_size=int(given["batch-size"]),
            progress=progress,
        )

    return finish_check(report, directory, checkpoints, read if ranks.first else None, ranks, 0.0)


def reason_of_failure(error: Exception) -> str:
    """Why nothing could be measured, for the report."""
    if is_out_of_memory(error):
        return "the memory was too small"
    if isinstance(error, PertaError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
