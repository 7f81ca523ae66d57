"""The settings of a sweep, measured one after another, each kept as soon as it is known."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from perta_fast.errors import InputError
from perta_fast.records.versions import installed_versions, now
from perta_fast.rules import Rule
from perta_fast.sweeping.grid import search, walk
from perta_fast.sweeping.importances import ByEstimator, load_given, load_kept
from perta_fast.sweeping.live_model import LiveModel
from perta_fast.sweeping.opened import Job
from perta_fast.sweeping.results import ScoredSetting, Sweep
from perta_fast.sweeping.unfinished import Record


def score(job: Job, record: Record) -> tuple[Sweep, ByEstimator]:
    """Measure all settings but those on record; return what was found, and the importances that it took."""
    request, begun = job.request, record.begun
    if job.gold is not None and begun.gold is None:
        record.add_gold(_score_gold(job, job.gold.path))
    live, original, importances = _prepare(job, record)
    limit, floor = request.bounds(original)

    def excess(row: ScoredSetting) -> float:
        """How far a row breaks the bounds; without bounds, no row stops its curve."""
        return row.excess(limit, floor) if request.is_bounded else -math.inf

    rows = [original]
    for curve in job.curves:
        measure = _measurer(curve, live, importances, record)
        rows += _along(curve, request.lams, measure, excess, original)
    module, samples = live.subject.module, live.examination.samples
    data = {role: each.describe(samples[role]) for role, each in job.data.items()}
    run_in = {"device": str(module.device), "dtype": str(module.dtype).removeprefix("torch.")}
    found = Sweep(
        rows=rows,
        metric=request.metric,
        limit=limit,
        floor=floor,
        select=request.criterion,
        settings=request.settings() | run_in,
        inputs={role: str(each.path.resolve()) for role, each in job.inputs().items()},
        data=data,
        gold=begun.gold,
        importance={
            estimator: {role: each.metadata for role, each in by_role.items()}
            for estimator, by_role in importances.items()
        },
        versions=installed_versions(),
        notes=[
            f"warning: {each['truncated']} of {each['samples']} {role} samples were cut to the length limit"
            for role, each in data.items()
            if each["truncated"]
        ],
        started=begun.started,
        finished=now(),
    )
    return found, importances


def _prepare(job: Job, record: Record) -> tuple[LiveModel, ScoredSetting, ByEstimator]:
    """theta_full, what it scores as it is, and all importances; one model in memory at a time."""
    importances = load_given(job.given)
    live = job.live()
    original = record.begun.original
    if original is None:
        original = record.add(live.measure_original(list(importances.values())))
    job.request.bounds(original)  # before the first gradient
    lacking = job.lacking()
    if lacking:
        kept = None if record.importances is None else load_kept(record.importances, lacking, job.data)
        if kept is None and job.request.at == "model":
            kept = job.estimate(live.subject, lacking, record.importances)
        elif kept is None:
            del live
            kept = job.estimate(job.load(job.sources.base.path), lacking, record.importances)
            live = job.live()
        importances |= kept
    return live, original, importances


def _score_gold(job: Job, path: Path) -> ScoredSetting:
    row = job.examination(path).score("gold")
    if not row.is_finite:
        raise InputError(f"{path}: what the gold model scores is not finite")
    return row


def _measurer(
    curve: Rule, live: LiveModel, importances: ByEstimator, record: Record
) -> Callable[[float], ScoredSetting]:
    """Gives a curve's row at a strength; one that is on record is not measured again."""
    weighed = {} if curve.estimator is None else importances[curve.estimator]

    def measure(lam: float) -> ScoredSetting:
        rule = curve.at(lam)
        return record.begun.find(rule) or record.add(live.measure(rule, weighed))

    return measure


def _along(
    curve: Rule,
    lams: Sequence[float] | None,
    measure: Callable[[float], ScoredSetting],
    excess: Callable[[ScoredSetting], float],
    original: ScoredSetting,
) -> list[ScoredSetting]:
    """The rows of one curve, by strength; without ``lams``, at those that the search tries."""

    def skip(lam: float) -> ScoredSetting:
        nan, settings = math.nan, curve.rescaling
        return ScoredSetting(
            curve.name, settings.p, settings.alpha, lam, nan, nan, nan, nan, nan, 0.0, skipped=True
        )

    if lams is None:
        rows = search(measure, excess, original)
    else:
        rows = walk([lam for lam in lams if lam != 0], measure, skip, lambda row: excess(row) <= 0)
    return sorted(rows, key=lambda row: row.lam)
