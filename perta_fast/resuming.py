"""Finish a run that was stopped: by a signal, a crash, a full disk, a power cut."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError, shell_command
from perta_fast.files.journal import JOURNAL
from perta_fast.files.new_directory import (
    EVALUATION_STATE,
    SWEEP_STATE,
    TUNING_STATE,
    has_record,
    has_walk,
    keeping_run,
    partial_path,
)
from perta_fast.files.reading import checked_path, exists
from perta_fast.progress import Progress
from perta_fast.records.report import FILE_NAME, Report
from perta_fast.runs.apply import resume_directory
from perta_fast.runs.check_result import finish_resumed
from perta_fast.subtraction.in_place import finish_leftover_in_place, resume_in_place
from perta_fast.subtraction.journal_directory import is_open
from perta_fast.subtraction.to_directory import finish_leftover
from perta_fast.subtraction.unfinished import STATE
from perta_fast.sweeping.results import Sweep, record_beside

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from perta_fast.evaluation.results import Evaluation
    from perta_fast.tuning.record import Tuning

_Unfinished = Literal["in place", "directory", "sweep", "evaluation", "tuning", "last steps", "journal"]


def resume(
    directory: str | Path, *, progress: Progress = True, group: "ProcessGroup | None" = None
) -> "Report | Sweep | Evaluation | Tuning":
    """Finish what was stopped: a run, sweep, evaluation or tuning; the result is that of an uninterrupted one.

    directory: what was given as ``out`` (of an evaluation, a file), or the model of an in-place run. progress: as in
    ``apply``. group: the processes that finish it, as there: any number, but for a streamed run or evaluation as many
    as began it.
    It is so bit for bit, of importances and of a tuning on the CPU. Returns the report, or the result of the sweep,
    evaluation or tuning. Raises InputError if there is nothing to finish, or an input is no longer what it was (nothing
    is written then), RunError if the run fails again.
    """
    ranks = Ranks.of(group)
    destination = Path(os.path.realpath(checked_path(directory)))
    with ranks.together("the unfinished run"):
        kind = _unfinished(destination) if ranks.first else None
        if ranks.first and kind is None:
            raise InputError(f"{directory}: there is no unfinished run to resume{_advice(destination)}")
        if ranks.world > 1 and kind in ("in place", "journal", "tuning"):
            finishing = shell_command("perta", "resume", Path(directory))
            raise InputError(f"{directory}: is finished by one process: {finishing}")
    kind = ranks.share(kind)
    if kind == "directory":
        return finish_resumed(resume_directory(destination, progress, ranks), destination, progress, ranks)
    if kind == "in place":
        return finish_resumed(resume_in_place(destination, progress), destination, progress, ranks)
    if kind == "journal":
        return finish_resumed(_report_of_journal(destination), destination, progress, ranks)
    if kind == "sweep":
        from perta_fast.sweeping.run import resume_sweep

        return resume_sweep(destination, progress, ranks)
    if kind == "evaluation":
        from perta_fast.runs.evaluate import resume_evaluation

        return resume_evaluation(destination, progress, ranks)
    if kind == "tuning":
        from perta_fast.tuning.run import resume_tuning

        return resume_tuning(destination, progress)
    with ranks.together("the unfinished run"):
        report = finish_leftover(destination) if ranks.first else None
    return finish_resumed(ranks.share(report), destination, progress, ranks)


def is_unfinished(directory: Path) -> bool:
    """Whether ``resume`` has something to finish there."""
    return _unfinished(Path(os.path.realpath(directory))) is not None


def _unfinished(destination: Path) -> _Unfinished | None:
    """What there is to finish at ``destination``."""
    if is_open(destination):
        return "in place"
    if has_record(destination, STATE):
        return "directory"
    if has_record(destination, SWEEP_STATE) or exists(destination / SWEEP_STATE):
        return "sweep"
    if has_record(destination, EVALUATION_STATE):
        return "evaluation"
    if has_record(destination, TUNING_STATE) or exists(destination / TUNING_STATE):
        return "tuning"
    if exists(destination / STATE):
        return "last steps"
    if exists(destination / JOURNAL):
        return "journal"
    return None


def _report_of_journal(model: Path) -> Report:
    """The report of a run in place that was killed when it was complete. Raises InputError if it was not."""
    left = finish_leftover_in_place(model)
    if isinstance(left, Report):
        return left
    if left == "nothing was changed":
        rest = "one in place was stopped before it changed anything: run the same command again"
    else:
        rest = f"one in place was stopped as it began or ended; {FILE_NAME} there says whether it is complete"
    raise InputError(f"{model}: there is no unfinished run to resume; {rest}")


def _advice(destination: Path) -> str:
    """What to do where there is nothing to finish."""
    run = keeping_run(destination) if destination.name else None
    if run is not None:
        return f"; importances of another run are kept here: finish it with: {shell_command('perta', 'resume', run)}"
    if destination.name and has_record(record_beside(destination), SWEEP_STATE):
        from perta_fast.sweeping.unfinished import load_begun

        record = record_beside(destination)
        going_on = load_begun(record).going_on(record)
        return f"; the settings that it is chosen from are not all scored: go on with: {going_on}"
    if destination.name and has_walk(destination):
        return "; its walk through the model was stopped: run the same command again, which goes on with it"
    if destination.name and exists(partial_path(destination)):
        return "; it was stopped before there was work to keep: run the same command again"
    return ""
