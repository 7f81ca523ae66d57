"""What a sweep tries: curves, each a rule with its p and alpha or its mu, and strengths on each curve."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from perta_fast.errors import InputError
from perta_fast.rules import DEFAULT_MU, PRECONDITIONED, Estimator, Rule, check_mu
from perta_fast.scoring.setting import ScoredSetting

# Where a streamed sweep looks first for the largest strength within a bound: from what the plain task vector takes to
# what a preconditioned one does.
DEFAULT_STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0)
_UNWEIGHED = {"tv", PRECONDITIONED}  # rules without p and alpha


@dataclass(frozen=True)
class Curve:
    """A rule as it was asked for, at every strength.

    rule: what subtracts, at lam 0. mu: of rule ``preconditioned``, which subtracts by ``tv``; else None.
    """

    name: str
    rule: Rule
    mu: float | None = None

    @property
    def estimator(self) -> Estimator | None:
        """The importance that it needs."""
        return self.rule.estimator

    def has(self, setting: ScoredSetting) -> bool:
        """Whether a setting lies on it."""
        rescaling = self.rule.rescaling
        return (setting.rule, setting.p, setting.alpha, setting.mu) == (
            self.name,
            rescaling.p,
            rescaling.alpha,
            self.mu,
        )

    def skipped(self, lam: float) -> ScoredSetting:
        """The setting at ``lam``, if it is not measured."""
        nan, p, alpha = math.nan, self.rule.rescaling.p, self.rule.rescaling.alpha
        return ScoredSetting(self.name, p, alpha, lam, nan, nan, nan, nan, nan, 0.0, skipped=True, mu=self.mu)

    @property
    def title(self) -> str:
        """Its name, shown with the progress: the rule, with the numbers that are not the rule's own."""
        if self.mu is not None:
            return f"{self.name}, mu {self.mu:g}"
        own, rescaling = Rule.of(self.name, 0.0).rescaling, self.rule.rescaling
        p = "" if rescaling.p == own.p else f", p {rescaling.p:g}"
        alpha = "" if rescaling.alpha == own.alpha else f", alpha {rescaling.alpha:g}"
        return f"{self.name}{p}{alpha}"

    def in_words(self) -> str:
        """Rule and numbers, for a message."""
        if self.mu is not None:
            return f"rule {self.name} with mu {self.mu:g}"
        return f"rule {self.name} with p {self.rule.rescaling.p:g} and alpha {self.rule.rescaling.alpha:g}"


def curves_of(
    rules: Sequence[str],
    ps: Sequence[float | None],
    alphas: Sequence[float],
    threshold: float | None,
    mus: Sequence[float | None] = (None,),
) -> list[Curve]:
    """Every rule at every p and alpha, ``preconditioned`` at every mu. Among other rules, tv comes once.

    Raises InputError for a value out of its range or not for these rules, and for two equal curves.
    """
    for name, values in (("rule", rules), ("p", ps), ("alpha", alphas), ("mu", mus)):
        if not values:
            raise InputError(f"‹{name}› is empty; give at least one")
    given = [mu for mu in mus if mu is not None]
    if given and PRECONDITIONED not in rules:
        raise InputError(f"‹mu› is for rule {PRECONDITIONED}; leave it out, or take that rule")
    for mu in given:
        check_mu(mu)
    curves: list[Curve] = []
    for name in rules:
        if name in _UNWEIGHED and not set(rules) <= _UNWEIGHED:  # p and alpha are for the others
            several = [Rule.of_unlearn(name, 0.0)]
        else:
            several = [Rule.of_unlearn(name, 0.0, p, alpha, threshold) for p in ps for alpha in alphas]
        steps = [float(mu) for mu in given or (DEFAULT_MU,)] if name == PRECONDITIONED else [None]
        curves += [Curve(name, rule, mu) for rule in several for mu in steps]
    for k, curve in enumerate(curves):
        for twin in curves[:k]:
            if (twin.mu, twin.estimator, twin.rule.rescaling) == (curve.mu, curve.estimator, curve.rule.rescaling):
                raise InputError(f"{twin.in_words()} and {curve.in_words()} are the same; leave one out")
    return curves


def check_strengths(lams: Sequence[float]) -> None:
    """Raise InputError unless all are finite and different, and at least one is not 0."""
    for k, lam in enumerate(lams):
        if not math.isfinite(lam):
            raise InputError(f"‹lams› has {lam}; each must be a finite number")
        if lam in lams[:k]:
            raise InputError(f"‹lams› has {lam:g} twice")
    if not any(lams):
        raise InputError("‹lams› has no strength to try; give at least one that is not 0")


def measure_rising(
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
