"""Beyond the main table: where gradients are taken, variants, other limits, p and alpha, importance samples.

All but the first are compared by what the choice is made by: the forget loss at the limit on the retain loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.study.baselines import BASELINES, runs
from bench.study.main_table import chosen
from bench.study.rules import Draw, importances, score_rule, search
from bench.study.selection import Candidate
from bench.study.trial import Trial, read_candidates
from bench.study.variants import VARIANTS, varied
from perta_fast.rules import RULES

WEIGHED = tuple(rule for rule in RULES if rule != "tv")
GENERAL = ("grad", "empirical-fisher")
POWERS = (0.5, 1.0, 2.0, 4.0)
ALPHAS = (0.25, 1.0, 4.0, 16.0)
COUNTS = (8, 32, 128)
DRAWS = 5
SHARES = (0.75, 0.25)  # of their probability that retained answers keep, beside the main table's

Stages = Iterator[Callable[[], object]]


def at_full(trial: Trial, rule: str) -> Path:
    """Scores with gradients taken at theta_full."""
    return score_rule(trial, rule, importances(trial, rule, at="full"), f"{rule} at full")


def general(trial: Trial, rule: str, p: float, alpha: float) -> Candidate:
    """A rule with any p and alpha."""
    return trial.choice([search(trial, rule, importances(trial, rule), p=p, alpha=alpha)])


def drawn(trial: Trial, rule: str, draw: Draw) -> Candidate:
    """Importance on a draw of samples, at the strength that is chosen for it."""
    return trial.choice([search(trial, rule, importances(trial, rule, draw=draw))])


def drawn_at(trial: Trial, rule: str, draw: Draw) -> Candidate:
    """Importance on a draw, at the strength that is chosen with importance on all samples."""
    lam = chosen(trial, rule).setting["lam"]
    found = search(trial, rule, importances(trial, rule, draw=draw), lam=lam)
    return next(each for each in read_candidates(found) if each.setting["lam"] == lam)


def kept(trial: Trial, row: str, share: float) -> Candidate:
    """A method of the main table where retained answers keep another share of their probability."""
    if row in BASELINES:
        return trial.choice(list(runs(trial, row).values()), share)
    return trial.choice([search(trial, row, importances(trial, row), kept=share)], share)


def variant(trial: Trial, name: str) -> Candidate:
    """A variant of the empirical Fisher rule."""
    return trial.choice([search(trial, "empirical-fisher", varied(trial, name))])


def stages(trial: Trial) -> Stages:
    """What makes the analyses of one trial, without those that follow."""
    yield from (partial(at_full, trial, rule) for rule in WEIGHED)
    yield from (partial(variant, trial, name) for name in VARIANTS)
    yield from (partial(kept, trial, rule, share) for share in SHARES for rule in RULES)


def general_stages(trial: Trial) -> Stages:
    """What makes the tables of p and alpha."""
    yield from (partial(general, trial, rule, p, alpha) for rule in GENERAL for p in POWERS for alpha in ALPHAS)


def draw_stages(trial: Trial) -> Stages:
    """What makes the comparison of draws, the first of every size first."""
    for draw in (Draw(count, number) for number in range(DRAWS) for count in COUNTS):
        for rule in WEIGHED:
            yield partial(drawn, trial, rule, draw)
            yield partial(drawn_at, trial, rule, draw)
