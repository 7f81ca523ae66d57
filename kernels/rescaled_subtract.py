"""theta - lam w (theta_f - theta_0) in Triton, bit for bit as the reference.

Division and root are IEEE (div_rn, sqrt_rn); products and sums are never fused (enable_fp_fusion=False). Each
byte moves once. Any alignment of whole elements; the last block is masked.
"""

import triton
import triton.language as tl
from perta_fast.kernels.device import current_device
from perta_fast.kernels.storage import as_float, rounded
from torch import Tensor

BLOCK = 1024
POWERS = (0.5, 1.0, 2.0)  # exponents with an exact sequence of operations


@triton.jit
def _raised(importance, DOUBLED_POWER: tl.constexpr):  # type: ignore[no-untyped-def]
    magnitude = tl.abs(importance)
    if DOUBLED_POWER == 4:
        magnitude = magnitude * magnitude
    elif DOUBLED_POWER == 1:
        magnitude = tl.sqrt_rn(magnitude)
    return magnitude


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
    MASKED: tl.constexpr,
    DOUBLED_POWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    stored = tl.load(theta_pointer + offsets, mask=inside, other=0.0)
    tuned = as_float(tl.load(tuned_pointer + offsets, mask=inside, other=0.0))
    base = as_float(tl.load(base_pointer + offsets, mask=inside, other=0.0))
    step = lam * (tuned - base)
    if WEIGHTED:
        forget = as_float(tl.load(forget_pointer + offsets, mask=inside, other=0.0))
        retain = as_float(tl.load(retain_pointer + offsets, mask=inside, other=0.0))
        numerator = _raised(forget, DOUBLED_POWER)
        denominator = numerator + alpha * _raised(retain, DOUBLED_POWER)
        # A zero denominator has a zero numerator: dividing by one instead gives the wanted 0.
        w = tl.div_rn(numerator, tl.where(denominator == 0.0, 1.0, denominator))
        if MASKED:
            w = tl.where(w > threshold, 1.0, 0.0)
        step = (lam * w) * (tuned - base)
    result = rounded(as_float(stored) - step, stored.dtype)
    tl.store(out_pointer + offsets, tl.where(step == 0.0, stored, result), mask=inside)


def rescaled_subtract_triton_(
    out: Tensor,
    theta: Tensor,
    tuned: Tensor,
    base: Tensor,
    forget_importance: Tensor | None,
    retain_importance: Tensor | None,
    lam: float,
    p: float,
    alpha: float,
    threshold: float | None,
) -> None:
    """Launch on checked arguments; see ``perta_fast.ops.rescaled_subtract_``. ``out`` may be ``theta``.

    Raises ValueError for a p outside ``POWERS``.
    """
    if p not in POWERS:
        raise ValueError(f"backend triton has no exact power p = {p}; use 0.5, 1, 2 or another backend")
    n = theta.numel()
    if n == 0:
        return
    weighted = forget_importance is not None
    with current_device(theta):
        _rescaled_subtract[(triton.cdiv(n, BLOCK),)](
            out,
            theta,
            tuned,
            base,
            forget_importance if weighted else theta,
            retain_importance if weighted else theta,
            n,
            lam,
            alpha,
            0.0 if threshold is None else threshold,
            WEIGHTED=weighted,
            MASKED=threshold is not None,
            DOUBLED_POWER=int(2 * p),
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
