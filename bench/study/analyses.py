"""Beyond the main table: other limits, where gradients are taken, p and alpha, variants, importance samples.

All but the first are compared by what the choice is made by: the forget loss at the limit on the retain loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

from bench.study.baselines import BASELINES
from bench.study.main_table import ROWS, WEIGHED, candidates, chosen, rule_of
from bench.study.rules import Draw, importances, score_rule, search
from bench.study.selection import KEPT, Candidate
from bench.study.trial import Trial, read_candidates
from bench.study.variants import VARIANTS, varied

POWERS = (("grad", 1.0), ("fisher", 2.0), ("empirical-fisher", 1.0), ("empirical-fisher", 2.0))
ALPHAS = (0.25, 1.0, 4.0, 16.0, 64.0)
VARIED = "empirical-fisher, α chosen"  # the row of the main table that variants are of
WAYS = (0.25, 0.5, 0.75, 1.0)  # shares of the way to the gold model
METHODS = ROWS[ROWS.index("tv") :]
DRAWN = ("grad", "empirical-fisher", VARIED)
COUNTS = (8, 32, 128)
DRAWS = 3
SHARES = (0.75, 0.25)  # of their probability that retained answers keep, beside the main table's

Stages = Iterator[Callable[[], object]]


def at_full(trial: Trial, rule: str) -> Path:
    """Scores with gradients taken at theta_full."""
    return score_rule(trial, rule, importances(trial, rule, at="full"), f"{rule} at full")


def general(trial: Trial, rule: str, p: float, alpha: float) -> Candidate:
    """A rule with any p and alpha."""
    return trial.choice([search(trial, rule, importances(trial, rule), p=p, alpha=alpha)])


def drawn(trial: Trial, method: str, draw: Draw) -> Candidate:
    """Importance on a draw of samples, at the strength that is chosen for it."""
    rule, alpha = rule_of(trial, method)
    return trial.choice([search(trial, rule, importances(trial, rule, draw=draw), alpha=alpha)])


def drawn_at(trial: Trial, method: str, draw: Draw) -> Candidate:
    """Importance on a draw, at the strength that is chosen with importance on all samples."""
    (rule, alpha), lam = rule_of(trial, method), chosen(trial, method).setting["lam"]
    found = search(trial, rule, importances(trial, rule, draw=draw), alpha=alpha, lam=lam)
    return next(each for each in read_candidates(found) if each.setting["lam"] == lam)


def variant(trial: Trial, name: str) -> Candidate:
    """A variant of the empirical Fisher rule, at the alpha of ``VARIED``."""
    rule, alpha = rule_of(trial, VARIED)
    return trial.choice([search(trial, rule, varied(trial, name, alpha), alpha=alpha)])


def damage(trial: Trial, method: str, share: float) -> float:
    """The retain loss, above theta_full's, at which a method has come this share of the way to the gold model.

    By straight lines between candidates; of a method that trains, on the best of its runs, which are those for
    any of the limits. NaN if it has not come there.
    """
    pieces = runs_for_limits(trial, method) if method in BASELINES else candidates(trial, method)[:1]
    curves = list(map(read_candidates, pieces))
    start, gold = curves[0][0], trial.as_gold()
    goal = start.forget_loss + share * (gold.forget_loss - start.forget_loss)
    losses = []
    for before, after in chain.from_iterable(map(pairwise, curves)):
        if before.forget_loss < goal <= after.forget_loss:
            part = (goal - before.forget_loss) / (after.forget_loss - before.forget_loss)
            losses.append(before.retain_loss + part * (after.retain_loss - before.retain_loss))
    # A method that trains may win back in later steps what it has lost in earlier ones.
    losses += [each.retain_loss for each in chain.from_iterable(curves) if each.forget_loss >= goal]
    return min(losses, default=math.nan) - start.retain_loss


def runs_for_limits(trial: Trial, method: str) -> list[Path]:
    """Candidates of a method that trains, at each rate that is chosen for one of the limits."""
    pieces = (candidates(trial, method, share) for share in (KEPT, *SHARES))
    return list(dict.fromkeys(chain.from_iterable(pieces)))


def stages_of_all(trial: Trial) -> Stages:
    """What makes the analyses of every seed and forget set."""
    yield from (partial(runs_for_limits, trial, method) for method in BASELINES)


def stages(trial: Trial) -> Stages:
    """What makes the analyses of every seed on one forget set."""
    yield from (partial(chosen, trial, method, share) for share in SHARES for method in METHODS)


def stages_of_one(trial: Trial) -> Stages:
    """What makes those of one seed, but for the draws."""
    yield from (partial(at_full, trial, rule) for rule in WEIGHED)
    yield from (partial(general, trial, rule, p, alpha) for rule, p in POWERS for alpha in ALPHAS)
    yield from (partial(variant, trial, name) for name in VARIANTS)


def draw_stages(trial: Trial) -> Stages:
    """What makes the comparison of draws, the first of every size first."""
    for draw in (Draw(count, number) for number in range(DRAWS) for count in COUNTS):
        for method in DRAWN:
            yield partial(drawn, trial, method, draw)
            yield partial(drawn_at, trial, method, draw)
