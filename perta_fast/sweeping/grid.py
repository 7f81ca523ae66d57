"""What a sweep tries: curves, each a rule with its p and alpha, and the strengths along each of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from perta_fast.errors import InputError
from perta_fast.rules import Rule
from perta_fast.trade_off import LARGEST, SMALLEST, Row

_WIDTH = 1.01  # a search ends when the smallest strength that is too large is at most this many times the best


def curves_of(
    rules: Sequence[str], ps: Sequence[float | None], alphas: Sequence[float], threshold: float | None
) -> list[Rule]:
    """Every rule at every p and alpha, each at lam 0; rule tv among others, which has neither, once.

    Raises InputError for a setting out of its range, and for two that are the same.
    """
    for name, values in (("rule", rules), ("p", ps), ("alpha", alphas)):
        if not values:
            raise InputError(f"{name} is empty; give at least one")
    found: list[Rule] = []
    for name in rules:
        if name == "tv" and len(rules) > 1:
            found.append(Rule.of(name, 0.0))
        else:
            found += [Rule.of(name, 0.0, p, alpha, threshold) for p in ps for alpha in alphas]
    for k, rule in enumerate(found):
        for twin in found[:k]:
            if replace(twin, name=rule.name) == rule:
                raise InputError(f"{_described(twin)} and {_described(rule)} are the same; leave one out")
    return found


def check_strengths(lams: Sequence[float]) -> None:
    """Raise InputError unless these are finite, all different, and not 0 alone."""
    for k, lam in enumerate(lams):
        if not math.isfinite(lam):
            raise InputError(f"lams has {lam}; each must be a finite number")
        if lam in lams[:k]:
            raise InputError(f"lams has {lam:g} twice")
    if not any(lams):
        raise InputError("lams has no strength to try; give at least one that is not 0")


def walk(
    lams: Sequence[float],
    measure: Callable[[float], Row],
    skip: Callable[[float], Row],
    keeps: Callable[[Row], bool],
) -> list[Row]:
    """Measure strengths in rising order; once a positive one does not keep the bound, ``skip`` all larger."""
    rows: list[Row] = []
    stopped = False
    for lam in sorted(lams):
        rows.append(skip(lam) if stopped else measure(lam))
        stopped = stopped or (lam > 0 and not keeps(rows[-1]))
    return rows


def search(measure: Callable[[float], Row], keeps: Callable[[Row], bool]) -> list[Row]:
    """Measure strengths until the largest that keeps the bound is known to 1 %; return them as they were tried.

    Of those that were tried, the largest that keeps the bound is ``LARGEST``, or the next larger breaks it and
    is at most 1 % larger; or none keeps it and the smallest is at most ``SMALLEST``. Nothing is asked of the
    curve between.
    """
    rows: list[Row] = []

    def kept(lam: float) -> bool:
        rows.append(measure(lam))
        return keeps(rows[-1])

    low, high = 0.0, 1.0  # low keeps the bound; nothing measured above it does
    while kept(high):
        if high == LARGEST:
            return rows
        low, high = high, 2 * high
    while high > _WIDTH * low and high > SMALLEST:
        middle = (low + high) / 2
        if kept(middle):
            low = middle
        else:
            high = middle
    return rows


def _described(rule: Rule) -> str:
    return f"rule {rule.name} with p {rule.p:g} and alpha {rule.alpha:g}"
