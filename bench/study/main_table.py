"""The rows of the main table: what each is scored as, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.study.baselines import BASELINES, choice, runs, score_baseline
from bench.study.models import load_model
from bench.study.rules import importances, score_rule, search
from bench.study.selection import Candidate
from bench.study.store import processor_seconds
from bench.study.trial import Trial
from perta_fast.rules import RULES

FULL, GOLD = "θ_full", "gold"
ROWS = (FULL, GOLD, *RULES, *BASELINES)


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
    return score_rule(trial, row, importances(trial, row), row)


def chosen(trial: Trial, method: str) -> Candidate:
    """The setting that counts for a rule or a baseline."""
    if method in BASELINES:
        return choice(trial, method)
    return trial.choice([search(trial, method, importances(trial, method))])


def cost(trial: Trial, row: str) -> Cost:
    """Of unlearning, where theta_0 and theta_full are there; of training, for the gold model."""
    if row == GOLD:
        return Cost(processor_seconds(trial.models.gold(trial.split)))
    if row in BASELINES:
        seconds = {rate: processor_seconds(piece) for rate, piece in runs(trial, row).items()}
        once = seconds.pop(chosen(trial, row).setting["rate"])
        return Cost(once, sum(seconds.values()))
    used = importances(trial, row)
    once = sum(map(processor_seconds, [trial.models.tuned(trial.split), *used]))
    return Cost(once, processor_seconds(search(trial, row, used)))


def stages(trial: Trial) -> Iterator[Callable[[], object]]:
    """What makes all that the table shows of one trial."""
    for row in ROWS:
        yield partial(scores, trial, row)
