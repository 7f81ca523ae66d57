"""The checkpoint of the setting that a sweep has chosen, by the same way as ``apply``."""

import os
from pathlib import Path

from perta_fast.errors import InputError
from perta_fast.files.new_directory import check_output
from perta_fast.progress import Progress
from perta_fast.records.report import Report
from perta_fast.rules import Rule
from perta_fast.runs.apply import apply_sources
from perta_fast.runs.settings import Settings, unfinished_advice
from perta_fast.subtraction.inputs import Sources, open_importances
from perta_fast.subtraction.unfinished import has_begun
from perta_fast.sweeping.live_model import Importances
from perta_fast.sweeping.request import Request
from perta_fast.sweeping.results import Sweep


def check_place(request: Request, inputs: list[Path]) -> None:
    """Raise InputError, before anything is scored, if the checkpoint could not be written where it is to go."""
    if request.checkpoint is None or request.out is None:
        return
    place, out = (Path(os.path.realpath(each)) for each in (request.checkpoint, request.out))
    if place == out or place in out.parents or out in place.parents:
        raise InputError(f"checkpoint {place} and out {out} must lie apart, neither within the other")
    check_output(place, overwrite=request.overwrite, inputs=inputs)
    if not request.overwrite and has_begun(place):
        raise InputError(unfinished_advice(place))


def write_best(
    request: Request, found: Sweep, importances: Importances, temporary: bool, progress: Progress
) -> None:
    """Write the checkpoint of ``found.best``, or finish it; one that this sweep has written already stays.

    importances: on disk, those that the setting was scored with; temporary: they go when the sweep is done.
    """
    best, place = found.best, Path(os.path.realpath(str(request.checkpoint)))
    assert best is not None
    p = None if best.rule == "tv" else best.p
    rule = Rule.of(best.rule, best.lam, p, best.alpha, None if best.rule == "tv" else request.threshold)
    settings = {name: _said(value) for name, value in found.settings.items() if value not in (None, [None])}
    settings |= {"sweep": str(request.out), "sweep_started": found.started, "select": str(request.criterion)}
    if _is_written(place, rule, settings):
        return

    def annotate(report: Report) -> None:
        report.data, report.settings = found.data, settings

    directories = (importances[role].directory if importances else None for role in found.data)
    opened = open_importances(rule, *directories)
    sources = Sources.open(request.model, request.base, request.tuned, opened)
    apply_sources(
        sources,
        rule,
        Settings(place, overwrite=request.overwrite, progress=progress),
        annotate=annotate,
        temporary=temporary,
    )


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _is_written(place: Path, rule: Rule, settings: dict[str, str]) -> bool:
    """Whether an earlier attempt of this sweep has come this far."""
    try:
        report = Report.load(place)
    except InputError:
        return False
    made = (report.rule, report.lam, report.p, report.alpha)
    return report.settings == settings and made == (
        rule.name,
        rule.rescaling.lam,
        rule.rescaling.p,
        rule.rescaling.alpha,
    )
