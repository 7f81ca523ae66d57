"""The contenders of the main table: their candidates, the setting that is chosen, their scores and their cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from bench.study.baselines import BASELINES, runs, score_baseline
from bench.study.models import load_model
from bench.study.rules import importances, score_rule, searched
from bench.study.selection import KEPT, Candidate
from bench.study.store import processor_seconds
from bench.study.trial import Trial
from perta_fast.rules import RULES

FULL, GOLD = "θ_full", "gold"
WEIGHED = tuple(rule for rule in RULES if rule != "tv")
ALPHA_CHOSEN = {f"{rule}, α chosen": rule for rule in ("grad", "empirical-fisher")}
_CLOSE = 0.98  # a forget loss of at least this share of the largest counts as equal to it
METHODS = (*RULES, *ALPHA_CHOSEN, *BASELINES)
CONTENDERS = (FULL, GOLD, *METHODS)


@dataclass(frozen=True)
class Cost:
    """Processor seconds over all threads: of running the method once, and of choosing its setting."""

    once: float
    choosing: float = 0.0


def scores(trial: Trial, contender: str) -> Path:
    """The piece with a contender's scores."""
    models = trial.models
    if contender == GOLD:
        return trial.gold_scores()
    if contender == FULL:
        return trial.score(contender, {"model": trial.name_of(models.full())}, lambda: load_model(models.full()))
    if contender in BASELINES:
        return score_baseline(trial, contender)
    rule, alpha = rule_of(trial, contender)
    return score_rule(trial, rule, importances(trial, rule), contender, alpha)


def candidates(trial: Trial, method: str, kept: float = KEPT) -> list[Path]:
    """The pieces with the candidates of a method; where alpha is chosen, with the chosen one."""
    if method in BASELINES:
        return list(runs(trial, method, kept).values())
    rule, alpha = rule_of(trial, method)
    return searched(trial, rule, importances(trial, rule), kept=kept, alpha=alpha)


def chosen(trial: Trial, method: str, kept: float = KEPT) -> Candidate:
    """The candidate of a method that is scored."""
    candidate = trial.choice(candidates(trial, method, kept), kept)
    if method not in ALPHA_CHOSEN:
        return candidate
    return replace(candidate, setting={"α": rule_of(trial, method)[1], **candidate.setting})


def rule_of(trial: Trial, method: str) -> tuple[str, float]:
    """The rule and the alpha of a method.

    Where alpha is chosen, it is chosen on the first seed: of the alphas whose forget loss is within 2 % of the
    largest, the one with the smallest retain loss.
    """
    if method not in ALPHA_CHOSEN:
        return method, 1.0
    first, rule = trial.first or trial, ALPHA_CHOSEN[method]
    best = {alpha: first.choice(pieces) for alpha, pieces in searches(first, rule).items()}
    largest = max(candidate.forget_loss for candidate in best.values())
    close = [alpha for alpha, candidate in best.items() if candidate.forget_loss >= _CLOSE * largest]
    return rule, min(close, key=lambda alpha: best[alpha].retain_loss)


def searches(trial: Trial, rule: str) -> dict[float, list[Path]]:
    """The pieces with the candidates of a rule, by alpha."""
    weighed_by = importances(trial, rule)
    return {alpha: searched(trial, rule, weighed_by, alpha=alpha) for alpha in trial.models.settings.alphas}


def cost(trial: Trial, contender: str) -> Cost:
    """The cost of unlearning theta_full; for the gold model, of its training."""
    if contender == GOLD:
        return Cost(processor_seconds(trial.models.gold(trial.split)))
    if contender in BASELINES:
        seconds = {rate: processor_seconds(piece) for rate, piece in runs(trial, contender).items()}
        once = seconds.pop(chosen(trial, contender).setting["rate"])
        return Cost(once, sum(seconds.values()))
    rule, _ = rule_of(trial, contender)
    once = sum(map(processor_seconds, [trial.models.tuned(trial.split), *importances(trial, rule)]))
    tried = searches(trial, rule).values() if contender in ALPHA_CHOSEN else [candidates(trial, contender)]
    return Cost(once, sum(map(processor_seconds, chain.from_iterable(tried))))


def stages(trial: Trial) -> Iterator[Callable[[], object]]:
    """The work for the main table of one trial."""
    for contender in CONTENDERS:
        yield partial(scores, trial, contender)
    yield trial.as_gold
