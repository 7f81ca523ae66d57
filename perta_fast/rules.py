"""The rules of the paper as settings of one formula (PerTA, arXiv 2601.22030).

w = I_f^p / (I_f^p + alpha I_r^p). ``grad``: I is the magnitude of the mean gradient, p = 1. ``fisher``: the same I,
p = 2. ``empirical-fisher``: I is the mean of squared per-sample gradients, p = 1. ``tv``: w = 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, SupportsFloat, TypeVar, get_args

from perta_fast.errors import InputError

T = TypeVar("T")
Estimator = Literal["grad", "empirical-fisher"]
RuleName = Literal["tv", "grad", "fisher", "empirical-fisher"]
AnyRule = Literal["preconditioned", "tv", "grad", "fisher", "empirical-fisher"]  # of ``unlearn`` and ``sweep``
Place = Literal["base", "model"]
DEFAULT_RULE: Final = "fisher"  # of what only takes importances
DEFAULT_ALPHA = 1.0
DEFAULT_LAM = 1.0  # of what only subtracts
PRECONDITIONED: Final = "preconditioned"  # the default of AnyRule: rule tv with a theta_f that is made first
DEFAULT_MU = 10.0  # of preconditioning
LARGEST_MU = 1e4  # beyond it, rounding in float32 moments shows where no input was seen
DEFAULT_RETAIN_RISE = 0.05  # nats, where the strength is searched for
EXACT_POWERS = (0.5, 1.0, 2.0)  # p for which every backend gives the same bits
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
RULES: tuple[RuleName, ...] = get_args(RuleName)
ANY_RULES: tuple[AnyRule, ...] = get_args(AnyRule)
PLACES: tuple[Place, ...] = get_args(Place)

# The estimator that a rule needs, and its p.
_DEFAULTS: Mapping[str, tuple[Estimator | None, float]] = {
    "tv": (None, 1.0),
    "grad": ("grad", 1.0),
    "fisher": ("grad", 2.0),
    "empirical-fisher": ("empirical-fisher", 1.0),
}


def negative_strength(lam: float) -> str:
    """The warning of a strength below 0."""
    return f"lambda {lam:g} is less than 0: the task vector is added, which teaches the model what it should forget"


def resolved_at(rule: str, at: Place | None) -> Place:
    """Where a run that leaves it open takes its gradients, or sees the inputs of linear maps."""
    return at or ("model" if rule == PRECONDITIONED else "base")


def check_takes_importances(rule: str, argument: str) -> None:
    """Raise InputError, naming the argument that is for rules with importances, if ``rule`` is none."""
    if rule in (PRECONDITIONED, "tv"):
        default = ", which is the default," if rule == PRECONDITIONED else ""
        with_importances = ", ".join(name for name in RULES if name != "tv")
        raise InputError(
            f"rule {rule}{default} takes no importance; leave ‹{argument}› out, or give one of: {with_importances}"
        )


def check_mu(mu: float) -> None:
    """Raise InputError unless ``mu`` is a strength of preconditioning."""
    if not isinstance(mu, SupportsFloat) or not 0 <= mu <= LARGEST_MU:
        raise InputError(f"‹mu› is {mu}; it must be a number from 0 to {LARGEST_MU:g}")


def check_strength(lam: float | None, max_retain_rise: float | None, stream: bool, allow_zero: bool = False) -> None:
    """Raise InputError unless there is a strength, or a bound up to which this run can search for one."""
    if lam is not None:
        if max_retain_rise is not None:
            raise InputError("give ‹lam›, or ‹max_retain_rise›, up to which it is searched for; not both")
        return
    if max_retain_rise is not None and not 0 <= max_retain_rise < math.inf:
        raise InputError(f"‹max_retain_rise› is {max_retain_rise}; it must be at least 0 nats, and finite")
    if stream:
        raise InputError(
            "a streamed run cannot choose lam, since a search needs the whole model in memory; give ‹lam›, or score "
            "several with ‹choose› (up-to-base ends where the search would)"
        )
    if allow_zero:
        raise InputError(
            "‹allow_zero› is for a given strength, since a task vector of zero has none to choose; give ‹lam›"
        )


# From these on, rounding to float32 gives 0 and infinity.
_SMALLEST = 2.0**-150
_LARGEST = 2.0**128 - 2.0**103


@dataclass(frozen=True)
class Rescaling:
    """The numbers in the formula: theta - lam * w * (theta_f - theta_0), and w from the importances.

    lam: finite. p: finite, > 0, alpha: finite, >= 0, both also as float32. threshold: in [0, 1), makes w the hard mask
    w > threshold; None leaves w as it is. Raises InputError, naming the setting.
    """

    lam: float
    p: float = 1.0
    alpha: float = 1.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.lam):
            raise InputError(f"‹lam› is {self.lam}; it must be a finite number")
        if not (math.isfinite(self.p) and self.p > 0):
            raise InputError(f"‹p› is {self.p}; it must be finite and greater than 0")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise InputError(f"‹alpha› is {self.alpha}; it must be finite and at least 0")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise InputError(f"‹threshold› is {self.threshold}; it must be at least 0 and less than 1")
        if not _SMALLEST < self.p < _LARGEST:
            raise InputError(f"‹p› is {self.p}, which float32 cannot hold")
        if self.alpha >= _LARGEST:
            raise InputError(f"‹alpha› is {self.alpha}, which float32 cannot hold")


@dataclass(frozen=True)
class Rule:
    """A rule of the paper by name, and its rescaling. Raises InputError if they do not fit together."""

    name: str
    rescaling: Rescaling

    def __post_init__(self) -> None:
        if self.name not in _DEFAULTS:
            raise InputError(f"‹rule› is {self.name!r}; it must be one of {', '.join(RULES)}")
        if self.estimator is None and self.rescaling != Rescaling(self.rescaling.lam):
            raise InputError("rule tv has no weights: ‹p›, ‹alpha› and ‹threshold› do not apply to it")

    @classmethod
    def of(
        cls, name: str, lam: float, p: float | None = None, alpha: float = DEFAULT_ALPHA, threshold: float | None = None
    ) -> "Rule":
        """The rule ``name`` with the numbers of ``Rescaling``; p None takes the rule's default.

        ``tv``, which has no alpha, takes the default of the others as none given.
        """
        estimator, default_p = _DEFAULTS.get(name, (None, 1.0))
        if estimator is None and alpha == DEFAULT_ALPHA:
            alpha = 1.0
        return cls(name, Rescaling(float(lam), float(default_p if p is None else p), float(alpha), threshold))

    @property
    def estimator(self) -> Estimator | None:
        """The importance that the rule needs; None for ``tv``."""
        return _DEFAULTS[self.name][0]

    def required(self, importances: Mapping[str, T | None], advice: str) -> dict[str, T]:
        """``importances``, by role, if the rule needs them. Raises InputError if one is missing, or ``tv`` has one.

        advice: where to get one that is missing.
        """
        if self.estimator is None:
            if any(importance is not None for importance in importances.values()):
                raise InputError("rule tv takes no importance; leave it out or choose another rule")
            return {}
        required = {}
        for role, importance in importances.items():
            if importance is None:
                raise InputError(f"rule {self.name} needs ‹{role}›; {advice}")
            required[role] = importance
        return required

    def check_estimator(self, estimator: str, where: object) -> None:
        """Raise InputError unless the rule can use the importance at ``where``, made by ``estimator``."""
        if estimator != self.estimator:
            raise InputError(f"{where}: holds estimator {estimator}, rule {self.name} needs {self.estimator}")

    @classmethod
    def of_unlearn(
        cls, name: str, lam: float, p: float | None = None, alpha: float = DEFAULT_ALPHA, threshold: float | None = None
    ) -> "Rule":
        """The rule by which ``unlearn`` subtracts, if it was asked for rule ``name``: tv for ``preconditioned``."""
        if name == PRECONDITIONED:
            if (p, alpha, threshold) != (None, DEFAULT_ALPHA, None):
                raise InputError(
                    f"rule {PRECONDITIONED}, which is the default, has no weights: ‹p›, ‹alpha› and ‹threshold› do not "
                    "apply to it; give a rule that has, such as fisher or empirical-fisher"
                )
            return cls.of("tv", lam)
        if name not in RULES:
            raise InputError(f"‹rule› is {name!r}; it must be one of {', '.join(ANY_RULES)}")
        return cls.of(name, lam, p, alpha, threshold)

    def at(self, lam: float) -> "Rule":
        """The same rule at another strength."""
        return replace(self, rescaling=replace(self.rescaling, lam=lam))
