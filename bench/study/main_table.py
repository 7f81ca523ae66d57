"""The rows of the main table: what each is scored as, and what it cost."""

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
_CLOSE = 0.98  # of the largest forget loss: as good as the largest
ROWS = (FULL, GOLD, *RULES, *ALPHA_CHOSEN, *BASELINES)


@dataclass(frozen=True)
class Cost:
    """Processor seconds over all threads: of the method once, and of choosing its setting."""

    once: float
    choosing: float = 0.0


def scores(trial: Trial, row: str) -> Path:
    """The piece with a row's scores."""
    models = trial.models
    if row == GOLD:
        return trial.gold_scores()
    if row == FULL:
        return trial.score(row, {"model": trial.name_of(models.full())}, lambda: load_model(models.full()))
    if row in BASELINES:
        return score_baseline(trial, row)
    rule, alpha = rule_of(trial, row)
    return score_rule(trial, rule, importances(trial, rule), row, alpha)


def candidates(trial: Trial, method: str, kept: float = KEPT) -> list[Path]:
    """Those of a rule, at the alpha that it is to have, or of a baseline."""
    if method in BASELINES:
        return list(runs(trial, method, kept).values())
    rule, alpha = rule_of(trial, method)
    return searched(trial, rule, importances(trial, rule), kept=kept, alpha=alpha)


def chosen(trial: Trial, method: str, kept: float = KEPT) -> Candidate:
    """The setting of a method that counts."""
    found = trial.choice(candidates(trial, method, kept), kept)
    if method not in ALPHA_CHOSEN:
        return found
    return replace(found, setting={"α": rule_of(trial, method)[1], **found.setting})


def rule_of(trial: Trial, method: str) -> tuple[str, float]:
    """Rule and alpha. Where alpha is chosen, it is the one with which the first seed forgets most.

    Of those that are within 2 % of that, it is the one with the smallest retain loss.
    """
    if method not in ALPHA_CHOSEN:
        return method, 1.0
    first, rule = trial.first or trial, ALPHA_CHOSEN[method]
    best = {alpha: first.choice(tried) for alpha, tried in searches(first, rule).items()}
    most = max(each.forget_loss for each in best.values())
    close = [alpha for alpha, each in best.items() if each.forget_loss >= _CLOSE * most]
    return rule, min(close, key=lambda alpha: best[alpha].retain_loss)


def searches(trial: Trial, rule: str) -> dict[float, list[Path]]:
    """Candidates of a rule by alpha."""
    used = importances(trial, rule)
    return {alpha: searched(trial, rule, used, alpha=alpha) for alpha in trial.models.settings.alphas}


def cost(trial: Trial, row: str) -> Cost:
    """Of unlearning, where theta_0 and theta_full are there; of training, for the gold model."""
    if row == GOLD:
        return Cost(processor_seconds(trial.models.gold(trial.split)))
    if row in BASELINES:
        seconds = {rate: processor_seconds(piece) for rate, piece in runs(trial, row).items()}
        once = seconds.pop(chosen(trial, row).setting["rate"])
        return Cost(once, sum(seconds.values()))
    rule, _ = rule_of(trial, row)
    once = sum(map(processor_seconds, [trial.models.tuned(trial.split), *importances(trial, rule)]))
    tried = searches(trial, rule).values() if row in ALPHA_CHOSEN else [candidates(trial, row)]
    return Cost(once, sum(map(processor_seconds, chain.from_iterable(tried))))


def stages(trial: Trial) -> Iterator[Callable[[], object]]:
    """What makes all that the table shows of one trial."""
    for row in ROWS:
        yield partial(scores, trial, row)
    yield trial.as_gold
