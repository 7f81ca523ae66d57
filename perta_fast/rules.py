"""The rules of the paper as settings of one formula (PerTA, arXiv 2601.22030).

w = I_f^p / (I_f^p + alpha I_r^p): ``grad`` takes the mean gradient's magnitude with p = 1, ``fisher`` its
square (p = 2), ``empirical-fisher`` the mean of squared per-sample gradients (p = 1), ``tv`` sets w = 1.
"""

import math
from dataclasses import dataclass, replace
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
class Rescaling:
    """Everything in the formula but the arrays: theta - lam * w * (theta_f - theta_0), and how w is made.

    lam: finite. p: finite, > 0. alpha: finite, >= 0. threshold: in [0, 1), makes w the hard mask
    w > threshold; None leaves w as it is. Raises InputError naming the setting.
    """

    lam: float
    p: float = 1.0
    alpha: float = 1.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.lam):
            raise InputError(f"lam is {self.lam}; it must be a finite number")
        if not (math.isfinite(self.p) and self.p > 0):
            raise InputError(f"p is {self.p}; it must be finite and greater than 0")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise InputError(f"alpha is {self.alpha}; it must be finite and at least 0")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise InputError(f"threshold is {self.threshold}; it must be at least 0 and less than 1")


@dataclass(frozen=True)
class Rule:
    """A rule of the paper by name, its settings, and the importance that it needs."""

    name: str
    rescaling: Rescaling
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
        """The rule ``name`` with these settings, as in ``Rescaling``; p None takes the rule's own.

        Raises InputError naming the setting.
        """
        if name not in _DEFAULTS:
            raise InputError(f"rule is {name!r}; it must be one of {', '.join(RULES)}")
        estimator, default_p = _DEFAULTS[name]
        rescaling = Rescaling(float(lam), float(default_p if p is None else p), float(alpha), threshold)
        if estimator is None and rescaling != Rescaling(rescaling.lam):
            raise InputError("rule tv has no weights: p, alpha and threshold do not apply to it")
        return cls(name, rescaling, estimator)

    def at(self, lam: float) -> "Rule":
        """The same rule at another strength."""
        return replace(self, rescaling=replace(self.rescaling, lam=lam))
