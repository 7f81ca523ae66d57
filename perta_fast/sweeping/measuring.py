"""The settings of a sweep, measured one after another on a live model, where one walk cannot measure them together.

Each is kept as soon as it is scored.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from perta_fast.scoring.importances import Importances
from perta_fast.scoring.live_model import LiveModel
from perta_fast.scoring.search import search
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.sweeping.grid import Curve, measure_rising
from perta_fast.sweeping.grid_walk import measure_in_a_walk
from perta_fast.sweeping.keeping import keep_importances, keep_vectors, load_kept
from perta_fast.sweeping.measured import Measured, excess
from perta_fast.sweeping.opened import ByEstimator, OpenedSweep
from perta_fast.sweeping.unfinished import Record
from perta_fast.sweeping.vectors import Vectors


def measure(opened: OpenedSweep, record: Record, vectors: Vectors) -> Measured:
    """Measure all settings that ``record`` lacks. vectors: made if missing."""
    request, begun = opened.request, record.begun
    vectors.check_space(request)
    if request.up_to_base and begun.base is None:
        begun.base = opened.score_base()
        record.save()
    if opened.gold is not None and begun.gold is None:
        begun.gold = opened.score_gold(opened.gold.path)
        record.save()
    walked = measure_in_a_walk(opened, record, vectors)
    if walked is not None:
        return walked
    live, original, importances = _prepare(opened, record, vectors)
    beyond = partial(excess, begun, original)
    rows = [original]
    for curve in opened.curves:
        weighing = {} if curve.estimator is None else importances[curve.estimator]
        tuned = None if curve.mu is None else vectors.of(curve.mu)
        measured = partial(_measure, live, curve, weighing, tuned)
        rows += _along(curve, request.strengths, original, beyond, measured, record)
    subject, batch_size = live.subject, request.batch_size
    return Measured(rows, importances, subject, subject.device, live.samples, batch_size, live.notes())


def _prepare(opened: OpenedSweep, record: Record, vectors: Vectors) -> tuple[LiveModel, ScoredSetting, ByEstimator]:
    """theta_full, what it scores as it is, and all importances; one model in memory at a time."""
    importances = opened.load_given()
    live = opened.live()
    original = record.begun.original or record.add(live.measure_original(importances))
    record.begun.limits(original)  # before the first gradient
    kept = load_kept(opened, record)
    if kept is None and opened.request.at == "model":
        kept = opened.estimate(live.subject, record.importances)
    if kept is None or vectors.missing():
        del live
        vectors.make(opened)
        if kept is None:
            base = opened.load(opened.sources.base.path)
            record.save()  # the type in which it runs
            kept = opened.estimate(base, record.importances)
            del base
        live = opened.live()
    keep_vectors(opened, record, vectors)
    return live, original, importances | keep_importances(opened, record, kept)


def _measure(live: LiveModel, curve: Curve, importances: Importances, tuned: Path | None, lam: float) -> ScoredSetting:
    """One setting. tuned: the θ_f of a curve with a mu."""
    scored = live.measure(curve.rule.at(lam), importances, tuned, curve.title)
    return replace(scored, rule=curve.name, mu=curve.mu)


def _along(
    curve: Curve,
    lams: Sequence[float] | None,
    original: ScoredSetting,
    beyond: Callable[[ScoredSetting], float],
    measured: Callable[[float], ScoredSetting],
    record: Record,
) -> list[ScoredSetting]:
    """The settings of one curve, in the order of strength; ``lams`` None searches for the largest within the bound."""

    def measure(lam: float) -> ScoredSetting:
        return record.begun.find(curve, lam) or record.add(measured(lam))

    if lams is None:
        rows = search(measure, beyond, original)
    else:
        rows = measure_rising(lams, measure, curve.skipped, lambda setting: beyond(setting) <= 0)
    return sorted(rows, key=lambda setting: setting.lam)
