"""The checkpoint of the setting that a sweep has chosen, written as ``apply`` writes one."""

import os
from pathlib import Path
from typing import Any

from perta_fast.errors import InputError
from perta_fast.files.identity import lies_in
from perta_fast.files.new_directory import check_output, check_unfinished
from perta_fast.records.report import Report
from perta_fast.rules import Rule
from perta_fast.runs.apply import apply_sources
from perta_fast.runs.settings import Settings
from perta_fast.subtraction.inputs import open_importances
from perta_fast.sweeping.opened import ByEstimator, OpenedSweep, open_sources
from perta_fast.sweeping.request import Request
from perta_fast.sweeping.results import Sweep


def check_destination(request: Request, out: Path, inputs: list[Path]) -> None:
    """Raise InputError, before anything is scored, if the checkpoint could not be written to its directory."""
    if request.checkpoint is None:
        return
    destination = Path(os.path.realpath(request.checkpoint))
    if lies_in(destination, out) or lies_in(out, destination):
        raise InputError(f"checkpoint {destination} and out {out} must lie apart, neither within the other")
    check_output(destination, overwrite=request.overwrite, inputs=inputs)
    check_unfinished(destination, overwrite=request.overwrite)


def write_best(opened: OpenedSweep, sweep: Sweep, importances: ByEstimator) -> None:
    """Write the checkpoint of ``sweep.best``, unless this sweep has written it before it was stopped.

    importances: on disk, those that settings were scored with.
    """
    request, best = opened.request, sweep.best
    assert best is not None
    destination = Path(os.path.realpath(str(request.checkpoint)))
    rule = Rule.of(best.rule, best.lam, best.p, best.alpha, None if best.rule == "tv" else request.threshold)
    settings = sweep.settings | {"sweep": request.out, "sweep_started": sweep.started, "select": sweep.select}
    if _is_written(destination, rule, settings):
        return

    def annotate(report: Report) -> None:
        report.data, report.settings = sweep.data, settings

    by_role = {} if rule.estimator is None else importances[rule.estimator]
    directories = [by_role[role].directory if by_role else None for role in ("forget", "retain")]
    apply_sources(
        open_sources(request, open_importances(rule, *directories)),
        rule,
        Settings(destination, overwrite=request.overwrite, progress=opened.progress),
        annotate=annotate,
        temporary=rule.estimator is not None and rule.estimator not in opened.given,  # removed with the sweep's record
    )


def _is_written(destination: Path, rule: Rule, settings: dict[str, Any]) -> bool:
    try:
        report = Report.load(destination)
        return report.chosen_rule() == rule and report.settings == settings
    except InputError:
        return False
