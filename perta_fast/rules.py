"""The rules of the paper as settings of one formula (PerTA, arXiv 2601.22030).

w = I_f^p / (I_f^p + alpha I_r^p): ``grad`` takes the mean gradient's magnitude with p = 1, ``fisher`` its
square (p = 2), ``empirical-fisher`` the mean of squared per-sample gradients (p = 1), ``tv`` sets w = 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

from perta_fast.errors import InputError

Estimator = Literal["grad", "empirical-fisher"]
EXACT_POWERS = (0.5, 1.0, 2.0)  # p for which every backend gives the same bits
ESTIMATORS: tuple[Estimator, ...] = ("grad", "empirical-fisher")
RULES = ("tv", "grad", "fisher", "empirical-fisher")

_DEFAULTS: dict[str, tuple[Estimator | None, float]] = {
    "tv": (None, 1.0),
    "grad": ("grad", 1.0),
    "fisher": ("grad", 2.0),
    "empirical-fisher": ("empirical-fisher", 1.0),
}


@dataclass(frozen=True)
class Rule:
    """A checked choice of everything in the formula but the arrays."""

    name: str
    lam: float
    p: float
    alpha: float
    threshold: float | None
    estimator: Estimator | None  # None: the rule needs no importance

    @classmethod
    def of(
        cls,
        name: str,
        lam: float,
        p: float | None = None,
        alpha: float = 1.0,
        threshold: float | None = None,
    ) -> "Rule":
        """Check the settings and fill in the rule's own p.

        lam: finite. p: finite, > 0; None takes the rule's. alpha: finite, >= 0. threshold: in [0, 1), makes w
        the hard mask w > threshold; None leaves w as it is. Raises InputError naming the setting.
        """
        if name not in _DEFAULTS:
            raise InputError(f"rule is {name!r}; it must be one of {', '.join(RULES)}")
        estimator, default_p = _DEFAULTS[name]
        p = default_p if p is None else p
        check_settings(lam, p, alpha, threshold)
        if estimator is None and (p != 1.0 or alpha != 1.0 or threshold is not None):
            raise InputError("rule tv has no weights: p, alpha and threshold do not apply to it")
        return cls(name, float(lam), float(p), float(alpha), threshold, estimator)


def check_settings(lam: float, p: float, alpha: float, threshold: float | None) -> None:
    """Raise InputError, naming the setting, unless all four lie in their ranges."""
    if not math.isfinite(lam):
        raise InputError(f"lam is {lam}; it must be a finite number")
    if not (math.isfinite(p) and p > 0):
        raise InputError(f"p is {p}; it must be finite and greater than 0")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise InputError(f"alpha is {alpha}; it must be finite and at least 0")
    if threshold is not None and not 0 <= threshold < 1:
        raise InputError(f"threshold is {threshold}; it must be at least 0 and less than 1")
