"""The further tables: gradients at theta_full, p and alpha, numbers of samples, variants, other limits, damage.

``at_full`` is compared by TOFU's scores, ``damage`` by the retain loss, the others by the number by which strengths
are chosen: the largest forget loss within the limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

from bench.study.baselines import BASELINES
from bench.study.main_table import METHODS, WEIGHED, candidates, chosen, rule_of
from bench.study.rules import Draw, importances, score_rule, search
from bench.study.selection import KEPT, Candidate
from bench.study.trial import Trial, read_candidates
from bench.study.variants import VARIANTS, varied

POWERS = (("grad", 1.0), ("fisher", 2.0), ("empirical-fisher", 1.0), ("empirical-fisher", 2.0))
ALPHAS = (0.25, 1.0, 4.0, 16.0, 64.0)
VARIED = "empirical-fisher, α chosen"  # the method of the main table that the variants change
WAYS = (0.25, 0.5, 0.75, 1.0)  # shares of the way to the gold model
DRAWN = ("grad", "empirical-fisher", VARIED)  # methods whose importance is estimated on a few samples
COUNTS = (8, 32, 128)  # samples of each set
DRAWS = 3
SHARES = (0.75, 0.25)  # other values of ``kept``: the share of their probability that retained answers keep

Stages = Iterator[Callable[[], object]]


def at_full(trial: Trial, rule: str) -> Path:
    """The piece with the scores of a rule whose gradients are taken at theta_full."""
    return score_rule(trial, rule, importances(trial, rule, at="full"), f"{rule} at full")


def general(trial: Trial, rule: str, p: float, alpha: float) -> Candidate:
    """The best candidate of a rule with this p and alpha."""
    return trial.choice([search(trial, rule, importances(trial, rule), p=p, alpha=alpha)])


def drawn(trial: Trial, method: str, draw: Draw) -> Candidate:
    """The best candidate with importance on a draw of samples."""
    rule, alpha = rule_of(trial, method)
    return trial.choice([search(trial, rule, importances(trial, rule, draw=draw), alpha=alpha)])


def drawn_at(trial: Trial, method: str, draw: Draw) -> Candidate:
    """The candidate with importance on a draw, at the strength chosen with importance on all samples."""
    (rule, alpha), lam = rule_of(trial, method), chosen(trial, method).setting["lam"]
    piece = search(trial, rule, importances(trial, rule, draw=draw), alpha=alpha, lam=lam)
    return next(candidate for candidate in read_candidates(piece) if candidate.setting["lam"] == lam)


def variant(trial: Trial, name: str) -> Candidate:
    """The best candidate of a variant of the empirical Fisher rule, with the alpha of ``VARIED``."""
    rule, alpha = rule_of(trial, VARIED)
    return trial.choice([search(trial, rule, varied(trial, name, alpha), alpha=alpha)])


def damage(trial: Trial, method: str, share: float) -> float:
    """The retain loss above theta_full's where the forget loss has gone ``share`` of the way to the gold model's.

    Between candidates it is interpolated. For a method that trains it is the smallest of all runs that are chosen
    for one of the limits. NaN if the forget loss does not get there.
    """
    pieces = runs_for_limits(trial, method) if method in BASELINES else candidates(trial, method)[:1]
    curves = list(map(read_candidates, pieces))
    start, gold = curves[0][0], trial.as_gold()
    goal = start.forget_loss + share * (gold.forget_loss - start.forget_loss)
    losses = []
    for before, after in chain.from_iterable(map(pairwise, curves)):
        if before.forget_loss < goal <= after.forget_loss:
            fraction = (goal - before.forget_loss) / (after.forget_loss - before.forget_loss)
            losses.append(before.retain_loss + fraction * (after.retain_loss - before.retain_loss))
    # The retain loss of a method that trains can fall again in later steps.
    losses += [candidate.retain_loss for curve in curves for candidate in curve if candidate.forget_loss >= goal]
    return min(losses, default=math.nan) - start.retain_loss


def runs_for_limits(trial: Trial, method: str) -> list[Path]:
    """The runs of a method that trains, at each learning rate that is chosen for one of the limits."""
    pieces = (candidates(trial, method, kept) for kept in (KEPT, *SHARES))
    return list(dict.fromkeys(chain.from_iterable(pieces)))


def stages_of_all(trial: Trial) -> Stages:
    """The analyses of every seed and forget set."""
    yield from (partial(runs_for_limits, trial, method) for method in BASELINES)


def stages(trial: Trial) -> Stages:
    """The analyses of every seed on one forget set."""
    yield from (partial(chosen, trial, method, kept) for kept in SHARES for method in METHODS)


def stages_of_one(trial: Trial) -> Stages:
    """The analyses of one seed, without the draws."""
    yield from (partial(at_full, trial, rule) for rule in WEIGHED)
    yield from (partial(general, trial, rule, p, alpha) for rule, p in POWERS for alpha in ALPHAS)
    yield from (partial(variant, trial, name) for name in VARIANTS)


def draw_stages(trial: Trial) -> Stages:
    """The comparison of draws: the first draw of every size, then the second, and so on."""
    for draw in (Draw(count, number) for number in range(DRAWS) for count in COUNTS):
        for method in DRAWN:
            yield partial(drawn, trial, method, draw)
            yield partial(drawn_at, trial, method, draw)
