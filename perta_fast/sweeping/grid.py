"""What a sweep tries: curves, each a rule with its p and alpha, and strengths on each curve."""

import math
from collections.abc import Callable, Sequence

from perta_fast.errors import InputError
from perta_fast.rules import Rule
from perta_fast.scoring.setting import ScoredSetting


def curves_of(
    rules: Sequence[str], ps: Sequence[float | None], alphas: Sequence[float], threshold: float | None
) -> list[Rule]:
    """Every rule at every p and alpha, at lam 0. Among other rules, tv comes once: it has no p and no alpha.

    Raises InputError for a value out of its range, and for two equal curves.
    """
    for name, values in (("rule", rules), ("p", ps), ("alpha", alphas)):
        if not values:
            raise InputError(f"{name} is empty; give at least one")
    curves: list[Rule] = []
    for name in rules:
        if name == "tv" and len(rules) > 1:
            curves.append(Rule.of(name, 0.0))
        else:
            curves += [Rule.of(name, 0.0, p, alpha, threshold) for p in ps for alpha in alphas]
    for k, rule in enumerate(curves):
        for twin in curves[:k]:
            if (twin.estimator, twin.rescaling) == (rule.estimator, rule.rescaling):
                raise InputError(f"{_described(twin)} and {_described(rule)} are the same; leave one out")
    return curves


def _described(rule: Rule) -> str:
    return f"rule {rule.name} with p {rule.rescaling.p:g} and alpha {rule.rescaling.alpha:g}"


def check_strengths(lams: Sequence[float]) -> None:
    """Raise InputError unless all are finite and different, and at least one is not 0."""
    for k, lam in enumerate(lams):
        if not math.isfinite(lam):
            raise InputError(f"lams has {lam}; each must be a finite number")
        if lam in lams[:k]:
            raise InputError(f"lams has {lam:g} twice")
    if not any(lams):
        raise InputError("lams has no strength to try; give at least one that is not 0")


def walk(
    lams: Sequence[float],
    measure: Callable[[float], ScoredSetting],
    skip: Callable[[float], ScoredSetting],
    keeps: Callable[[ScoredSetting], bool],
) -> list[ScoredSetting]:
    """Measure strengths in rising order; once a positive one breaks the bound, ``skip`` the larger ones."""
    scored: list[ScoredSetting] = []
    stopped = False
    for lam in sorted(lams):
        scored.append(skip(lam) if stopped else measure(lam))
        stopped = stopped or (lam > 0 and not keeps(scored[-1]))
    return scored
