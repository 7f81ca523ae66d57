"""One setting with what it scores."""

import math
from dataclasses import dataclass, field


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

    def keeps(self, limit: float | None, floor: float | None) -> bool:
        """Whether the retain loss is at most ``limit``, the retain metric at least ``floor``, and all are finite."""
        return self.excess(limit, floor) <= 0

    def excess(self, limit: float | None, floor: float | None) -> float:
        """By how much it breaks ``limit`` or ``floor``: at most 0 if it keeps them, infinite if not finite."""
        if not self.is_finite:
            return math.inf
        above = -math.inf if limit is None else self.retain_loss - limit
        return max(above, -math.inf if floor is None else floor - self.retain)
