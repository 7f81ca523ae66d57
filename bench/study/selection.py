"""The choice of a method's strength, by the losses of forget and retained rows. The gold model has no part in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEPT = 0.5  # share of their probability that retained answers must keep


@dataclass(frozen=True)
class Candidate:
    """One setting of a method, and the mean losses (nats) of forget and of retained rows with it."""

    setting: Mapping[str, Any]
    forget_loss: float
    retain_loss: float


def limit_of(retain_loss: float, kept: float = KEPT) -> float:
    """The largest retain loss that is allowed if ``retain_loss`` is that of theta_full.

    If the loss rises by ln 2, the probability of an answer by token has halved, in geometric mean.
    """
    return retain_loss - math.log(kept)


@dataclass(frozen=True)
class Limits:
    """The largest losses that a method may have.

    forget: that of theta_0, which has never seen the forget set. A model with a larger one does not forget more: it
    shows what it avoids.
    """

    forget: float
    retain: float


def choose(candidates: Sequence[Candidate], limits: Limits) -> Candidate:
    """The candidate within ``limits`` that has the largest forget loss. A loss that is NaN is never within.

    One of ``candidates`` must be theta_full itself, which is always within.
    """
    allowed = [c for c in candidates if c.retain_loss <= limits.retain and c.forget_loss <= limits.forget]
    return max(allowed, key=lambda candidate: candidate.forget_loss)
