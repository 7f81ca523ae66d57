"""The checkpoint of the setting that a sweep has chosen, written as ``apply`` writes one."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError
from perta_fast.files.apart import check_inputs_stay
from perta_fast.files.journal import JOB, JOURNAL
from perta_fast.files.new_directory import check_output, check_unfinished
from perta_fast.progress import Progress
from perta_fast.records.report import Report
from perta_fast.rules import Rule
from perta_fast.runs.apply import apply_sources
from perta_fast.runs.check import Checking
from perta_fast.runs.check_result import finish_resumed
from perta_fast.runs.precondition import given_files
from perta_fast.runs.settings import Settings, check_others
from perta_fast.subtraction.in_place import check_in_place, finish_leftover_in_place, resume_in_place
from perta_fast.subtraction.job import Job
from perta_fast.subtraction.journal_directory import is_open
from perta_fast.sweeping.opened import ByEstimator, OpenedSweep, checkpoints_of, open_sources
from perta_fast.sweeping.recorded_choice import chosen_recipe, recorded_choice
from perta_fast.sweeping.results import Sweep
from perta_fast.sweeping.unfinished import Begun
from perta_fast.sweeping.vectors import Vectors


def check_result(opened: OpenedSweep) -> None:
    """Raise InputError, before anything is scored, if no checkpoint could be made of what is chosen."""
    request, inputs = opened.request, opened.paths()
    if not request.makes_result:
        return
    destination = request.result
    if request.in_place:
        check_others(opened.sources.model, True, request.leave_others)
        check_in_place(opened.sources)
        check_inputs_stay(destination, [destination / JOURNAL], inputs)
        return
    check_output(destination, overwrite=request.overwrite, inputs=inputs)
    check_unfinished(destination, overwrite=request.overwrite)


def write_best(opened: OpenedSweep, sweep: Sweep, importances: ByEstimator, vectors: Vectors) -> None:
    """Make the checkpoint of ``sweep.best``, unless this sweep has made it before it was stopped. Every rank calls it.

    importances, vectors: on disk, those that settings were scored with.
    """
    request, best = opened.request, sweep.best
    assert best is not None
    destination = request.result
    (curve,) = (curve for curve in opened.curves if curve.has(best))
    rule = curve.rule.at(best.lam)
    settings = sweep.settings | {"sweep": request.out, "sweep_started": sweep.started, "select": sweep.select}
    settings |= {"at": opened.place(curve.name)}
    made = None if curve.mu is None else vectors.record(curve.mu)
    given = rule.estimator in opened.given
    checking = None if given else _checking(opened)
    if _is_written(destination, rule, curve.mu, settings):
        if checking is not None:
            checking.finish(Report.load(destination))
        return
    if checking is not None:
        checking.before()
    described = None
    if made is not None:
        files = given_files(opened.sources, 1, opened.progress)
        described = replace(made.in_report(), files=files)

    def annotate(report: Report) -> None:
        report.data, report.settings, report.preconditioned = sweep.data, settings, described
        report.setting_choice = recorded_choice(request, sweep)
        if not given:
            report.recipe = chosen_recipe(request, sweep)
        for warning in sweep.noted_warnings():
            report.warn(warning)
        if checking is not None:
            checking.annotate(report)

    tuned = None if curve.mu is None else vectors.of(curve.mu)
    estimated = rule.estimator is not None and not given and request.save_importance is None
    made_for_now = tuned is not None and request.save_tuned is None
    report = apply_sources(
        open_sources(request, checkpoints_of(rule, importances), tuned),
        rule,
        Settings(
            destination,
            sweep.started,
            request.in_place,
            request.overwrite,
            threads=request.threads,
            leave_others=request.leave_others,
            progress=opened.progress,
        ),
        annotate=annotate,
        temporary=estimated or made_for_now,  # removed with the sweep's record
        ranks=opened.ranks,
    )
    if checking is not None:
        checking.finish(report)


def _checking(opened: OpenedSweep) -> Checking | None:
    """The check of the result, if it was asked for."""
    request = opened.request
    changed = {"out": request.checkpoint, "dtype": opened.asked_type, "progress": opened.progress}
    rows = {role: file.rows for role, file in opened.data.items()}
    return Checking.of(SimpleNamespace(**vars(request) | changed), rows, opened.day, opened.ranks)


def has_changed(begun: Begun) -> bool:
    """Whether the sweep has changed the model in place, or has begun to."""
    if not begun.applying:
        return False
    model = begun.request.result
    try:
        settings = Job.load(model / JOURNAL / JOB).report["settings"] if is_open(model) else Report.load(model).settings
    except (InputError, KeyError):
        return False
    own = {"sweep": begun.request.out, "sweep_started": begun.started}
    return isinstance(settings, dict) and own.items() <= settings.items()


def finish_in_place(begun: Begun, progress: Progress) -> None:
    """Finish what ``has_changed`` has found, and its check. Raises InputError if an input is not what it was."""
    model = begun.request.result
    if is_open(model):
        report = resume_in_place(model, progress)
    else:
        left = finish_leftover_in_place(model)
        report = left if isinstance(left, Report) else Report.load(model)
    finish_resumed(report, Path(model), progress, Ranks.ALONE)


def _is_written(destination: Path, rule: Rule, mu: float | None, settings: dict[str, Any]) -> bool:
    try:
        report = Report.load(destination)
        made = report.preconditioned
        written = report.chosen_rule(), None if made is None else made.mu, report.settings
        return written == (rule, mu, settings)
    except InputError:
        return False
