"""One setting with what it scores, and the limits that it may have to keep."""

import math
from dataclasses import dataclass, field

_ROUNDING = 1e-5  # relative: a setting that is theta_0 up to rounding has its forget loss


@dataclass(frozen=True)
class Limits:
    """What a setting has to keep; None is no limit.

    retain_loss, forget_loss: the largest, in nats, the latter up to rounding. retain: the smallest retain metric.
    """

    retain_loss: float | None = None
    retain: float | None = None
    forget_loss: float | None = None

    def each(self) -> "list[Limits]":
        """Every limit alone."""
        alone = Limits(self.retain_loss), Limits(retain=self.retain), Limits(forget_loss=self.forget_loss)
        return [limit for limit in alone if limit != Limits()]


@dataclass(frozen=True)
class ScoredSetting:
    """One setting, measured.

    rule: empty for the model as it is, at lam 0, and for a gold model. forget_loss, retain_loss: mean over the
    samples of their mean token cross-entropy, in nats; not finite where the strength has broken the model. forget,
    retain: the sweep's metric on both sets. changed: share of the elements, in [0, 1], whose stored value differs
    from theta_full's. seconds: of subtraction, scoring and restoring. skipped: not measured, since a smaller
    strength broke the bound; the numbers then mean nothing. mu: of rule ``preconditioned``, else None. scores: other
    metrics, by the names of ``perta eval``. not_finite: where, in a streamed sweep, something was no longer finite for
    the first time; all numbers are then NaN.
    """

    rule: str
    p: float
    alpha: float
    lam: float
    forget_loss: float
    retain_loss: float
    forget: float
    retain: float
    changed: float
    seconds: float
    skipped: bool = False
    mu: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    not_finite: str = ""

    @property
    def is_finite(self) -> bool:
        """Whether losses and metrics are finite."""
        return all(map(math.isfinite, (self.forget_loss, self.retain_loss, self.forget, self.retain)))

    def keeps(self, limits: Limits) -> bool:
        """Whether it is finite and keeps all limits."""
        return self.excess(limits) <= 0

    def excess(self, limits: Limits) -> float:
        """By how much it breaks the limit that it breaks most: at most 0 if it keeps all, infinite if not finite."""
        if not self.is_finite:
            return math.inf
        beyond = (
            -math.inf if limits.retain_loss is None else self.retain_loss - limits.retain_loss,
            -math.inf if limits.retain is None else limits.retain - self.retain,
            -math.inf if limits.forget_loss is None else self.forget_loss - limits.forget_loss * (1 + _ROUNDING),
        )
        return max(beyond)
