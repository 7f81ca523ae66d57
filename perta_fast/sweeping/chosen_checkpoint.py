"""The checkpoint of the setting that a sweep has chosen, written as ``apply`` writes one."""

import os
from pathlib import Path

from perta_fast.errors import InputError
from perta_fast.files.new_directory import check_output
from perta_fast.records.report import Report
from perta_fast.rules import Rule
from perta_fast.runs.apply import apply_sources
from perta_fast.runs.settings import Settings, unfinished_advice
from perta_fast.subtraction.inputs import Sources, open_importances
from perta_fast.subtraction.unfinished import has_begun
from perta_fast.sweeping.importances import ByEstimator
from perta_fast.sweeping.opened import OpenedSweep
from perta_fast.sweeping.request import Request
from perta_fast.sweeping.results import Sweep


def check_destination(request: Request, inputs: list[Path]) -> None:
    """Raise InputError, before anything is scored, if the checkpoint could not be written where it is to go."""
    if request.checkpoint is None or request.out is None:
        return
    destination, out = Path(os.path.realpath(request.checkpoint)), Path(os.path.realpath(request.out))
    if destination == out or destination in out.parents or out in destination.parents:
        raise InputError(f"checkpoint {destination} and out {out} must lie apart, neither within the other")
    check_output(destination, overwrite=request.overwrite, inputs=inputs)
    if not request.overwrite and has_begun(destination):
        raise InputError(unfinished_advice(destination))


def write_best(opened: OpenedSweep, sweep: Sweep, importances: ByEstimator) -> None:
    """Write the checkpoint of ``sweep.best``, or finish it; one that this sweep has written already stays.

    importances: on disk, those that settings were scored with.
    """
    request, best = opened.request, sweep.best
    assert best is not None
    destination = Path(os.path.realpath(str(request.checkpoint)))
    weights = () if best.rule == "tv" else (best.p, best.alpha, request.threshold)
    rule = Rule.of(best.rule, best.lam, *weights)
    settings = {
        name: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in sweep.settings.items()
        if value not in (None, [None])
    }
    settings |= {"sweep": str(request.out), "sweep_started": sweep.started, "select": str(request.criterion)}
    if _is_written(destination, rule, settings):
        return

    def annotate(report: Report) -> None:
        report.data, report.settings = sweep.data, settings

    weighing = {} if rule.estimator is None else importances[rule.estimator]
    directories = (weighing[role].directory if weighing else None for role in sweep.data)
    opened_importances = open_importances(rule, *directories)
    sources = Sources.open(request.model, request.base, request.tuned, opened_importances)
    apply_sources(
        sources,
        rule,
        Settings(destination, overwrite=request.overwrite, progress=opened.progress),
        annotate=annotate,
        temporary=rule.estimator is not None and rule.estimator not in opened.given,  # they go with the sweep
    )


def _is_written(destination: Path, rule: Rule, settings: dict[str, str]) -> bool:
    """Whether this sweep, before it was stopped, has written its checkpoint."""
    try:
        report = Report.load(destination)
    except InputError:
        return False
    written = (report.rule, report.lam, report.p, report.alpha)
    wanted = (rule.name, rule.rescaling.lam, rule.rescaling.p, rule.rescaling.alpha)
    return report.settings == settings and written == wanted
