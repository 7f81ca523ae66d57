"""The search for the largest strength within a bound."""

import math
from collections.abc import Callable

from perta_fast.scoring.setting import Limits, ScoredSetting

LARGEST, SMALLEST = 1024.0, 1 / 1024  # the strengths between which a search stays
_WIDTH = 1.01  # a search ends when the smallest strength that is too large is at most this many times the best
_GUESSES = 2  # so many interpolations may fail to halve the interval; then every step halves it
_STEP = 0.004  # the next strength of a search differs by at least this share of the one below
_AROUND = (0.88, 0.94, 1.0, 1.06)  # of a guess, which is seldom further off
_HALVES = (1 / 8, 1 / 4, 1 / 2)
_SPREAD = 4  # so many, where no guess is possible
CLOSER = max(len(_AROUND), len(_HALVES), _SPREAD)  # strengths that are measured together, at most

Point = tuple[float, float]  # a strength, and its excess over the bound


def search(
    measure: Callable[[float], ScoredSetting], excess: Callable[[ScoredSetting], float], original: ScoredSetting
) -> list[ScoredSetting]:
    """Measure strengths until the largest that keeps the bound is known to 1 %; return them in the order of trial.

    excess: how far a setting breaks the bound, at most 0 where it keeps it. original: what lam 0 scores.

    At the end the largest tried strength that keeps the bound is ``LARGEST``, or the next larger one breaks it and
    is at most 1 % larger; or none keeps it and the smallest is at most ``SMALLEST``. This holds for any curve; a
    smooth one takes fewer trials.
    """
    scored: list[ScoredSetting] = []

    def tried(lam: float) -> Point:
        scored.append(measure(lam))
        return lam, excess(scored[-1])

    low = start = (0.0, excess(original))  # low keeps the bound
    high = tried(1.0)
    while high[1] <= 0:
        if high[0] == LARGEST:
            return scored
        low, high = high, tried(2 * high[0])
    guesses = _GUESSES  # from here on, high is the smallest measured strength above low, and breaks the bound
    while high[0] > _WIDTH * low[0] and high[0] > SMALLEST:
        width = high[0] - low[0]
        guess = _crossing(low, high, start[1]) if guesses else None
        probe = tried(_middle(low, high) if guess is None else guess)
        low, high = (probe, high) if probe[1] <= 0 else (low, probe)
        guesses -= high[0] - low[0] > width / 2
    return scored


def closer(low: ScoredSetting, high: ScoredSetting, original: ScoredSetting, limits: Limits) -> list[float]:
    """Strengths to measure together between ``low``, which keeps ``limits``, and the next larger, which does not.

    They lie around where a limit is likely to be broken, or are spread where that cannot be told; where ``low`` is the
    original, lam 0, they are halves of ``high``.
    """
    if low.lam == 0:
        return [high.lam * factor for factor in _HALVES]
    guesses = [
        _crossing((low.lam, low.excess(limit)), (high.lam, high.excess(limit)), original.excess(limit))
        for limit in limits.each()
        if high.excess(limit) > 0
    ]
    found = [guess for guess in guesses if guess is not None]
    if found and len(found) == len(guesses):
        lams = [min(found) * factor for factor in _AROUND]
    else:
        lams = [low.lam * (high.lam / low.lam) ** (step / (_SPREAD + 1)) for step in range(1, _SPREAD + 1)]
    return [lam for lam in sorted(set(map(_readable, lams))) if _WIDTH * low.lam < lam and _WIDTH * lam < high.lam]


def _crossing(low: Point, high: Point, start: float) -> float | None:
    """Where the bound is broken if the loss grows as a power of the strength; None if the points fit no power.

    start: how far strength 0 is from the bound, at most 0.
    """
    loss_low, loss_high = low[1] - start, high[1] - start
    if low[0] == 0 or not 0 < loss_low < loss_high < math.inf:
        return None
    power = math.log(loss_high / loss_low) / math.log(high[0] / low[0])
    crossing = high[0] * (-start / loss_high) ** (1 / power)
    step = _STEP * low[0]  # away from both ends, so that the next trial is likely to lie on the other side
    return _readable(min(max(crossing, low[0] + step), high[0] - step))


def _middle(low: Point, high: Point) -> float:
    middle = (low[0] + high[0]) / 2
    return _readable(middle) if low[0] > 0 else middle


def _readable(lam: float) -> float:
    """Rounded to four digits; two strengths that are 1 % apart stay apart."""
    return float(f"{lam:.4g}")
