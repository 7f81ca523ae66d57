"""The settings of a sweep, measured one after another; each is kept as soon as it is scored."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from perta_fast.data.chat import Told, told
from perta_fast.data.samples import row_count, truncated_count
from perta_fast.dtypes import torch_name
from perta_fast.importance.prompts import different_dates
from perta_fast.models.loading import length_limit
from perta_fast.records.report import data_record, read_as_lines, scope_lines, truncation_warnings
from perta_fast.records.versions import installed_versions, now
from perta_fast.scoring.live_model import Importances, LiveModel, metadata_of
from perta_fast.scoring.search import search
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.sweeping.grid import Curve, walk
from perta_fast.sweeping.opened import ByEstimator, OpenedSweep
from perta_fast.sweeping.results import Sweep
from perta_fast.sweeping.unfinished import Record
from perta_fast.sweeping.vectors import Vectors


def score(opened: OpenedSweep, record: Record, vectors: Vectors) -> tuple[Sweep, ByEstimator]:
    """Measure all settings that ``record`` lacks; return the sweep and its importances. vectors: made if they lack."""
    request, begun = opened.request, record.begun
    vectors.check_space(request)
    if opened.gold is not None and begun.gold is None:
        begun.gold = opened.score_gold(opened.gold.path)
        record.save()
    live, original, importances = _prepare(opened, record, vectors)
    limit, floor = request.bounds(original)

    def excess(setting: ScoredSetting) -> float:
        return setting.excess(limit, floor) if request.is_bounded else -math.inf  # without a bound, none is skipped

    rows = [original]
    for curve in opened.curves:
        weighing = {} if curve.estimator is None else importances[curve.estimator]
        tuned = None if curve.mu is None else vectors.of(curve.mu)
        rows += _along(curve, request.lams, original, excess, partial(_measure, live, curve, weighing, tuned), record)
    module, max_length = live.subject.module, length_limit(live.subject, request.max_length)
    counts = {role: (row_count(samples), truncated_count(samples)) for role, samples in live.samples.items()}
    data = {
        role: data_record(file.path, file.digest, *counts[role], file.read_as) for role, file in opened.data.items()
    }
    scored, made = told(live.subject.tokenizer), [vectors.record(mu) for mu in opened.mus()]
    resolved = {
        "device": str(module.device),
        "dtype": torch_name(module.dtype),
        "max_length": max_length,
        "date": scored.date,
    }
    sweep = Sweep(
        rows=rows,
        metric=request.metric,
        limit=limit,
        floor=floor,
        select=request.criterion,
        settings=request.settings() | resolved,
        inputs={role: str(directory.path.resolve()) for role, directory in opened.inputs().items()},
        data=data,
        gold=begun.gold,
        importance={estimator: metadata_of(of_estimator) for estimator, of_estimator in importances.items()},
        preconditioned=[record.in_report() for record in made],
        versions=installed_versions(),
        notes=scope_lines(request.only, request.leave)
        + read_as_lines(data)
        + [f"warning: {warning}" for warning in truncation_warnings(data)]
        + live.notes()
        + _notes_on_prompts(importances, scored),
        started=begun.started,
        finished=now(),
    )
    sweep.notes += [f"warning: {warning}" for record in made[:1] for warning in record.warnings]
    sweep.notes = list(dict.fromkeys([*sweep.notes, *sweep.warnings()]))
    return sweep, importances


def _notes_on_prompts(importances: ByEstimator, scored: Told) -> list[str]:
    """Warnings where an importance was estimated with other prompts than its partner, or than the scores."""
    notes = []
    for of_estimator in importances.values():
        estimated = {role: metadata.told for role, metadata in metadata_of(of_estimator).items()}
        if different := different_dates(estimated["forget"], estimated["retain"]):
            notes.append(f"warning: {different}")
        for role, used in estimated.items():
            dates = {used.day, scored.day} - {None}
            both = used.chat_template and scored.chat_template
            if both and (used.system_prompt != scored.system_prompt or len(dates) > 1):
                words = [prompt.in_words() or "no system prompt" for prompt in (used, scored)]
                notes.append(f"warning: {role} importance estimated with {words[0]}, scores taken with {words[1]}")
    return notes


def _prepare(opened: OpenedSweep, record: Record, vectors: Vectors) -> tuple[LiveModel, ScoredSetting, ByEstimator]:
    """theta_full, what it scores as it is, and all importances; one model in memory at a time."""
    importances = opened.load_given()
    live = opened.live()
    original = next((row for row in record.begun.rows if not row.rule), None)
    if original is None:
        original = record.add(live.measure_original(importances))
    opened.request.bounds(original)  # before the first gradient
    kept = opened.load_kept(record.importances)
    if kept is None and opened.request.at == "model":
        kept = opened.estimate(live.subject, record.importances)
    if kept is None or vectors.lacking():
        del live
        vectors.make(opened)
        if kept is None:
            kept = opened.estimate(opened.load(opened.sources.base.path), record.importances)
        live = opened.live()
    return live, original, importances | kept


def _measure(live: LiveModel, curve: Curve, importances: Importances, tuned: Path | None, lam: float) -> ScoredSetting:
    """One setting. tuned: the θ_f of a curve with a mu."""
    if curve.mu is None:
        return live.measure(curve.rule.at(lam), importances)
    label = f"{curve.name}, mu {curve.mu:g}"
    return replace(live.measure(curve.rule.at(lam), importances, tuned, label), rule=curve.name, mu=curve.mu)


def _along(
    curve: Curve,
    lams: Sequence[float] | None,
    original: ScoredSetting,
    excess: Callable[[ScoredSetting], float],
    measured: Callable[[float], ScoredSetting],
    record: Record,
) -> list[ScoredSetting]:
    """The settings of one curve, in the order of strength; ``lams`` None searches for the largest within the bound."""

    def measure(lam: float) -> ScoredSetting:
        return record.begun.find(curve, lam) or record.add(measured(lam))

    def skip(lam: float) -> ScoredSetting:
        nan, p, alpha = math.nan, curve.rule.rescaling.p, curve.rule.rescaling.alpha
        return ScoredSetting(curve.name, p, alpha, lam, nan, nan, nan, nan, nan, 0.0, skipped=True, mu=curve.mu)

    if lams is None:
        rows = search(measure, excess, original)
    else:
        rows = walk([lam for lam in lams if lam != 0], measure, skip, lambda setting: excess(setting) <= 0)
    return sorted(rows, key=lambda setting: setting.lam)
