"""theta - lam w (theta_f - theta_0) in Triton, bit for bit as the reference.

Division and root are IEEE (div_rn, sqrt_rn); products and sums are never fused (enable_fp_fusion=False).
Assumes dense arrays aligned to their elements, of any size; the last block is masked.
Bytes: each input once, out once. FLOPs: 3 an element with w = 1; 7 with weights and p = 1, one a division.
"""

import triton
import triton.language as tl
from perta_fast.kernels.device import current_device
from perta_fast.kernels.storage import as_float, rounded
from torch import Tensor

from perta_fast.rules import EXACT_POWERS, Rescaling

BLOCK = 1024
LARGEST = tl.constexpr(3.4028234663852886e38)  # finite float32


@triton.jit
def _raised(importance, DOUBLED_POWER: tl.constexpr):  # type: ignore[no-untyped-def]
    magnitude = tl.abs(importance)
    if DOUBLED_POWER == 4:
        magnitude = magnitude * magnitude
    elif DOUBLED_POWER == 1:
        magnitude = tl.sqrt_rn(magnitude)
    return magnitude


@triton.jit
def subtract_block(  # type: ignore[no-untyped-def]
    out_pointer,
    stored,
    task,
    forget_pointer,
    retain_pointer,
    offsets,
    inside,
    lam,
    alpha,
    threshold,
    WEIGHTED: tl.constexpr,
    BY_RATIO: tl.constexpr,
    MASKED: tl.constexpr,
    DOUBLED_POWER: tl.constexpr,
):
    """Store one block of the result; ``stored`` is theta's, ``task`` the task vector's.

    BY_RATIO: what lies at ``retain_pointer`` is the ratio of both importances, and ``forget_pointer`` is not read.
    """
    step = lam * task
    if WEIGHTED:
        retain = as_float(tl.load(retain_pointer + offsets, mask=inside, other=0.0))
        power = _raised(retain, DOUBLED_POWER)
        if BY_RATIO:
            # A power that overflows is cut to the largest number: times an alpha of 0 it gives 0, and not NaN.
            denominator = 1.0 + alpha * tl.where(power > LARGEST, LARGEST, power)
            w = tl.where(tl.abs(retain) > LARGEST, 0.0, tl.div_rn(1.0, denominator))
        else:
            forget = as_float(tl.load(forget_pointer + offsets, mask=inside, other=0.0))
            numerator = _raised(forget, DOUBLED_POWER)
            denominator = numerator + alpha * power
            # A zero denominator has a zero numerator: dividing by one instead gives the wanted 0.
            w = tl.div_rn(numerator, tl.where(denominator == 0.0, 1.0, denominator))
        if MASKED:
            w = tl.where(w > threshold, 1.0, 0.0)
        step = (lam * w) * task
    result = rounded(as_float(stored) - step, stored.dtype)
    tl.store(out_pointer + offsets, tl.where(step == 0.0, stored, result), mask=inside)


@triton.jit
def _rescaled_subtract(  # type: ignore[no-untyped-def]
    out_pointer,  # may be theta
    theta_pointer,
    tuned_pointer,
    base_pointer,
    forget_pointer,
    retain_pointer,
    n,
    lam,
    alpha,
    threshold,
    WEIGHTED: tl.constexpr,
    BY_RATIO: tl.constexpr,
    MASKED: tl.constexpr,
    DOUBLED_POWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    stored = tl.load(theta_pointer + offsets, mask=inside, other=0.0)
    tuned = as_float(tl.load(tuned_pointer + offsets, mask=inside, other=0.0))
    task = tuned - as_float(tl.load(base_pointer + offsets, mask=inside, other=0.0))
    subtract_block(
        out_pointer,
        stored,
        task,
        forget_pointer,
        retain_pointer,
        offsets,
        inside,
        lam,
        alpha,
        threshold,
        WEIGHTED,
        BY_RATIO,
        MASKED,
        DOUBLED_POWER,
    )


def settings(
    rescaling: Rescaling, forget: Tensor | None, retain: Tensor | None
) -> tuple[tuple[float, float, float], dict[str, object]]:
    """lam, alpha and threshold as the kernels take them, and what they are compiled for.

    forget, retain: the importances; without the first, the second is their ratio; without both, w = 1. Raises
    ValueError for a p that has no exact sequence of operations.
    """
    p, threshold = rescaling.p, rescaling.threshold
    if p not in EXACT_POWERS:
        raise ValueError(f"backend triton has no exact power p = {p}; use 0.5, 1, 2 or another backend")
    weighed_by = {"WEIGHTED": retain is not None, "BY_RATIO": retain is not None and forget is None}
    constants = weighed_by | {"MASKED": threshold is not None, "DOUBLED_POWER": int(2 * p)}
    numbers = rescaling.lam, rescaling.alpha, 0.0 if threshold is None else threshold
    return numbers, {**constants, "BLOCK": BLOCK, "enable_fp_fusion": False}


def rescaled_subtract_triton_(
    out: Tensor,
    theta: Tensor,
    tuned: Tensor,
    base: Tensor,
    forget_importance: Tensor | None,
    retain_importance: Tensor | None,
    rescaling: Rescaling,
) -> None:
    """Launch on checked arguments; see ``perta_fast.ops.rescaled_subtract_``. ``out`` may be ``theta``."""
    numbers, constants = settings(rescaling, forget_importance, retain_importance)
    importances = [theta if each is None else each for each in (forget_importance, retain_importance)]
    if n := theta.numel():
        with current_device(theta):
            _rescaled_subtract[(triton.cdiv(n, BLOCK),)](
                out, theta, tuned, base, *importances, n, *numbers, **constants
            )
