"""The study's tables in Markdown, from the pieces that are finished."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from bench.study import analyses
from bench.study.main_table import CONTENDERS, FULL, GOLD, METHODS, WEIGHED, chosen, cost, scores
from bench.study.markdown import MISSING, Thunk, cell, head, line, made, over, write_between
from bench.study.rules import Draw
from bench.study.store import read_json
from bench.study.trial import SCORES, Trial
from bench.study.variants import VARIANTS

BEGIN, END = "<!-- results -->", "<!-- end of results -->"

# Forget quality, model utility, extraction strength on forget and on retained rows: PerTA, arXiv 2601.22030.
PUBLISHED = {
    FULL: (0.007, 0.599, 0.743, 0.737),
    GOLD: (1.0, 0.599, 0.069, 0.751),
    "tv": (0.405, 0.556, 0.081, 0.358),
    "grad": (0.514, 0.581, 0.075, 0.551),
    "fisher": (0.266, 0.586, 0.085, 0.600),
    "gradient ascent": (0.011, 0.597, 0.189, 0.656),
    "NPO": (0.009, 0.595, 0.178, 0.650),
}
_METRICS = {
    "forget quality": "forget_quality",
    "its log10": "forget_quality_log10",
    "utility": "model_utility",
    "ES forget": "extraction_strength",
    "ES retain": "retain_extraction_strength",
    "P forget": "forget_Q_A_Prob",
}
_PUBLISHED_COLUMNS = ("forget quality", "utility", "ES forget", "ES retain")
_OF_GOLD = {"forget_quality": 1.0, "forget_quality_log10": 0.0}  # by definition

FORGET, RETAIN = attrgetter("forget_loss"), attrgetter("retain_loss")  # of a candidate


def write(page: Path, trials: Sequence[Trial]) -> None:
    """Write the tables between the two markers of ``page``."""
    write_between(page, BEGIN, END, render(trials))


def render(trials: Sequence[Trial]) -> str:
    """All tables. A cell is mean ± standard deviation over seeds; if some are missing it says how many it has."""
    by_split: dict[str, list[Trial]] = {}
    for trial in trials:
        by_split.setdefault(trial.split.name, []).append(trial)
    last, of_last = list(by_split.items())[-1]
    tables = {name: _main(name, of_split) for name, of_split in by_split.items()}
    tables |= {f"{name}, difference from `tv`": _against_tv(of_split) for name, of_split in by_split.items()}
    tables |= {f"{name}, what forgetting costs": _damage(of_split) for name, of_split in by_split.items()}
    tables |= {f"{name}, settings and cost": _costs(of_split) for name, of_split in by_split.items()}
    tables |= {
        f"Gradients at θ_full, {last}, one seed": _at_full(of_last[:1]),
        f"p and α, {last}, one seed": _general(of_last[0]),
        f"Number and draw of importance samples, {last}, one seed": _samples(of_last[0]),
        f"Variants, {last}, one seed": _variants(of_last[:1]),
        f"Other limits, {last}": _limits(of_last),
    }
    return "\n\n".join(f"#### {title}\n\n" + "\n".join(lines) for title, lines in tables.items())


def _main(split: str, trials: Sequence[Trial]) -> Iterator[str]:
    columns = _PUBLISHED_COLUMNS if split == "forget01" else ()
    yield from head(["", *_METRICS, *(f"{name}, 1 B" for name in columns)])
    for contender in CONTENDERS:
        numbers = PUBLISHED.get(contender, ())
        published = [f"{number:g}" for number in numbers] or [""] * len(columns)
        ours = _scores(partial(scores, trial, contender) for trial in trials)
        yield line([contender, *ours, *(published if columns else [])])


def _against_tv(trials: Sequence[Trial]) -> Iterator[str]:
    """Differences are taken within a seed."""
    yield from head(["", *_METRICS])
    for method in METHODS:
        if method != "tv":
            pairs = [partial(_with_tv, trial, method) for trial in trials]
            yield line([method, *(cell(pairs, partial(_difference, metric)) for metric in _METRICS.values())])


def _damage(trials: Sequence[Trial]) -> Iterator[str]:
    """In nats above θ_full, at shares of the way from its forget loss to gold's."""
    yield from head(["retain loss", *(f"{share:.0%} of the way to gold" for share in analyses.WAYS)])
    for method in METHODS:
        yield line([method, *(_damage_cell(trials, method, share) for share in analyses.WAYS)])


def _damage_cell(trials: Sequence[Trial], method: str, share: float) -> str:
    losses = made(partial(analyses.damage, trial, method, share) for trial in trials)
    if not losses:
        return MISSING
    reached = [loss for loss in losses if not math.isnan(loss)]
    return f"reached by {len(reached)} of {len(losses)}" if len(reached) < len(losses) else "+" + over(reached)


def _costs(trials: Sequence[Trial]) -> Iterator[str]:
    """Costs are those of the first seed, on which learning rates are chosen."""
    yield from head(["", "chosen, by seed", "processor s, once", "processor s, choosing"])
    for contender in (GOLD, *METHODS):
        costs = [partial(cost, trials[0], contender)]
        settings = [] if contender == GOLD else made(partial(_setting, trial, contender) for trial in trials)
        seconds = (cell(costs, attrgetter(name), "{:.0f}") for name in ("once", "choosing"))
        yield line([contender, ", ".join(settings), *seconds])


def _at_full(trials: Sequence[Trial]) -> Iterator[str]:
    yield from head(["", *_METRICS])
    for rule in WEIGHED:
        yield line([f"{rule}, at θ_0", *_scores(partial(scores, trial, rule) for trial in trials)])
        yield line([f"{rule}, at θ_full", *_scores(partial(analyses.at_full, trial, rule) for trial in trials)])


def _general(trial: Trial) -> Iterator[str]:
    yield from head(["forget loss", *(f"α = {alpha:g}" for alpha in analyses.ALPHAS)])
    for rule, p in analyses.POWERS:
        cells = (_forgotten(analyses.general, [trial], rule, p, alpha) for alpha in analyses.ALPHAS)
        yield line([f"{rule}, p = {p:g}", *cells])


def _samples(trial: Trial) -> Iterator[str]:
    """Mean and standard deviation are over the draws of one seed."""
    yield from head(["", "samples", "forget loss, λ chosen", "forget loss, λ of all", "retain loss, λ of all"])
    for method in analyses.DRAWN:
        for count in analyses.COUNTS:
            draws = [Draw(count, number) for number in range(analyses.DRAWS)]
            lam_chosen = [partial(analyses.drawn, trial, method, draw) for draw in draws]
            lam_of_all = [partial(analyses.drawn_at, trial, method, draw) for draw in draws]
            columns = cell(lam_chosen, FORGET), cell(lam_of_all, FORGET), cell(lam_of_all, RETAIN)
            yield line([method, str(count), *columns])
        on_all = [partial(chosen, trial, method)]
        yield line([method, "all", cell(on_all, FORGET), cell(on_all, FORGET), cell(on_all, RETAIN)])


def _variants(trials: Sequence[Trial]) -> Iterator[str]:
    yield from head(["", "forget loss"])
    for method in ("tv", analyses.VARIED):
        yield line([method, _forgotten(chosen, trials, method)])
    for name in VARIANTS:
        yield line([name, _forgotten(analyses.variant, trials, name)])


def _limits(trials: Sequence[Trial]) -> Iterator[str]:
    yield from head(["forget loss", *(f"{share:g} kept" for share in analyses.SHARES)])
    for method in METHODS:
        yield line([method, *(_forgotten(chosen, trials, method, share) for share in analyses.SHARES)])


def _scores(pieces: Iterable[Thunk]) -> list[str]:
    thunks = list(pieces)
    return [cell(thunks, partial(_read, metric)) for metric in _METRICS.values()]


def _forgotten(analysis: Callable[..., Any], trials: Sequence[Trial], *arguments: Any) -> str:
    return cell([partial(analysis, trial, *arguments) for trial in trials], FORGET)


def _read(metric: str, piece: Path) -> float:
    metrics = read_json(piece / SCORES)["metrics"]
    if metric in metrics:
        value = metrics[metric]["agg_value"]
        return math.nan if value is None else float(value)
    return _OF_GOLD[metric]


def _with_tv(trial: Trial, method: str) -> tuple[Path, Path]:
    return scores(trial, method), scores(trial, "tv")


def _difference(metric: str, pieces: tuple[Path, Path]) -> float:
    of_method, of_tv = pieces
    return _read(metric, of_method) - _read(metric, of_tv)


def _setting(trial: Trial, method: str) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in chosen(trial, method).setting.items())
