"""Which strength of a method counts: chosen on losses of forget and retained rows, without the gold model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEPT = 0.5  # share of their probability that retained answers must keep


@dataclass(frozen=True)
class Candidate:
    """What one setting of a method comes to: mean losses (nats) of forget and of retained rows."""

    setting: Mapping[str, Any]
    forget_loss: float
    retain_loss: float


def limit_of(retain_loss: float, kept: float = KEPT) -> float:
    """The largest retain loss that is allowed, if ``retain_loss`` is that of theta_full.

    A loss that is higher by ln 2 is an answer whose probability by token, in geometric mean, has halved.
    """
    return retain_loss - math.log(kept)


@dataclass(frozen=True)
class Limits:
    """The largest losses that a method may come to.

    forget: theta_0's, which has never seen the forget set. A model that finds it less likely still does not
    forget more: it gives away what it avoids.
    """

    forget: float
    retain: float


def choose(candidates: Sequence[Candidate], limits: Limits) -> Candidate:
    """The candidate that forgets most, by its forget loss, within ``limits``.

    theta_full itself is to be among the candidates, so that there is one. Losses that are not finite keep no
    limit.
    """
    allowed = [each for each in candidates if each.retain_loss <= limits.retain and each.forget_loss <= limits.forget]
    return max(allowed, key=lambda each: each.forget_loss)
