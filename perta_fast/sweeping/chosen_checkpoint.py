"""The checkpoint of the setting that a sweep has chosen, written as ``apply`` writes one."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.errors import InputError
from perta_fast.files.identity import lies_in
from perta_fast.files.new_directory import check_output, check_unfinished
from perta_fast.importance.ratio import ImportanceRatio
from perta_fast.records.report import Report, truncation_warnings
from perta_fast.rules import Rule
from perta_fast.runs.apply import apply_sources
from perta_fast.runs.precondition import given_files
from perta_fast.runs.settings import Settings
from perta_fast.subtraction.inputs import open_importances
from perta_fast.sweeping.opened import ByEstimator, OpenedSweep, open_sources
from perta_fast.sweeping.request import Request
from perta_fast.sweeping.results import Sweep
from perta_fast.sweeping.vectors import Vectors


def check_destination(request: Request, out: Path, inputs: list[Path]) -> None:
    """Raise InputError, before anything is scored, if the checkpoint could not be written to its directory."""
    if request.checkpoint is None:
        return
    destination = Path(os.path.realpath(request.checkpoint))
    if lies_in(destination, out) or lies_in(out, destination):
        raise InputError(f"checkpoint {destination} and out {out} must lie apart, neither within the other")
    check_output(destination, overwrite=request.overwrite, inputs=inputs)
    check_unfinished(destination, overwrite=request.overwrite)


def write_best(opened: OpenedSweep, sweep: Sweep, importances: ByEstimator, vectors: Vectors) -> None:
    """Write the checkpoint of ``sweep.best``, unless this sweep has written it before it was stopped.

    importances, vectors: on disk, those that settings were scored with.
    """
    request, best = opened.request, sweep.best
    assert best is not None
    destination = Path(os.path.realpath(str(request.checkpoint)))
    (curve,) = (curve for curve in opened.curves if curve.has(best))
    rule = curve.rule.at(best.lam)
    settings = sweep.settings | {"sweep": request.out, "sweep_started": sweep.started, "select": sweep.select}
    settings |= {"at": opened.place(curve.name)}
    made = None if curve.mu is None else vectors.record(curve.mu)
    if _is_written(destination, rule, curve.mu, settings):
        return
    described = None
    if made is not None:
        given = given_files(Path(request.tuned), Path(request.base), 1, opened.progress)
        described = replace(made.in_report(), files=given)

    def annotate(report: Report) -> None:
        report.data, report.settings, report.preconditioned = sweep.data, settings, described
        warnings = truncation_warnings(sweep.data) + ([] if made is None else made.warnings)
        for warning in dict.fromkeys(warnings):
            report.warn(warning)

    tuned = None if curve.mu is None else vectors.of(curve.mu)
    estimated = rule.estimator is not None and rule.estimator not in opened.given
    apply_sources(
        open_sources(request, _opened(rule, importances), tuned),
        rule,
        Settings(destination, overwrite=request.overwrite, progress=opened.progress),
        annotate=annotate,
        temporary=estimated or tuned is not None,  # removed with the sweep's record
    )


def _opened(rule: Rule, importances: ByEstimator) -> dict[str, Checkpoint]:
    """Those that ``rule`` needs, of importances on disk."""
    if rule.estimator is None:
        return {}
    weighing = importances[rule.estimator]
    if isinstance(weighing, ImportanceRatio):
        return open_importances(rule, both=weighing.directory)
    return open_importances(rule, weighing["forget"].directory, weighing["retain"].directory)


def _is_written(destination: Path, rule: Rule, mu: float | None, settings: dict[str, Any]) -> bool:
    try:
        report = Report.load(destination)
        made = report.preconditioned
        written = report.chosen_rule(), None if made is None else made.mu, report.settings
        return written == (rule, mu, settings)
    except InputError:
        return False
