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
def _multiplied(left_pointer, right_pointer, offsets, inside, rank, columns, scale):  # type: ignore[no-untyped-def]
    """Elements of scale * left @ right, their products added in the order of the rank."""
    rows = offsets // columns
    places = offsets % columns
    total = tl.zeros(offsets.shape, tl.float32)
    for k in range(rank):
        left = tl.load(left_pointer + rows * rank + k, mask=inside, other=0.0)
        right = tl.load(right_pointer + k * columns + places, mask=inside, other=0.0)
        total = total + left * right
    return scale * total


@triton.jit
def _rescaled_subtract(  # type: ignore[no-untyped-def]
    out_pointer,  # may be theta
    theta_pointer,
    tuned_pointer,  # or the left factor of the task vector
    base_pointer,  # or the right one
    forget_pointer,
    retain_pointer,
    n,
    lam,
    alpha,
    threshold,
    rank,
    columns,
    scale,
    LOW_RANK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MASKED: tl.constexpr,
    DOUBLED_POWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    stored = tl.load(theta_pointer + offsets, mask=inside, other=0.0)
    if LOW_RANK:
        task = _multiplied(tuned_pointer, base_pointer, offsets, inside, rank, columns, scale)
    else:
        tuned = as_float(tl.load(tuned_pointer + offsets, mask=inside, other=0.0))
        task = tuned - as_float(tl.load(base_pointer + offsets, mask=inside, other=0.0))
    step = lam * task
    if WEIGHTED:
        forget = as_float(tl.load(forget_pointer + offsets, mask=inside, other=0.0))
        retain = as_float(tl.load(retain_pointer + offsets, mask=inside, other=0.0))
        numerator = _raised(forget, DOUBLED_POWER)
        denominator = numerator + alpha * _raised(retain, DOUBLED_POWER)
        # A zero denominator has a zero numerator: dividing by one instead gives the wanted 0.
        w = tl.div_rn(numerator, tl.where(denominator == 0.0, 1.0, denominator))
        if MASKED:
            w = tl.where(w > threshold, 1.0, 0.0)
        step = (lam * w) * task
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
    arrays = (out, theta, tuned, base, forget_importance, retain_importance)
    _launch(arrays, lam, p, alpha, threshold, factors=None)


def low_rank_subtract_triton_(
    theta: Tensor,
    left: Tensor,
    right: Tensor,
    forget_importance: Tensor | None,
    retain_importance: Tensor | None,
    scale: float,
    lam: float,
    p: float,
    alpha: float,
    threshold: float | None,
) -> None:
    """Launch on checked arguments; see ``perta_fast.ops.low_rank_subtract_``. Raises as the function above."""
    arrays = (theta, theta, left, right, forget_importance, retain_importance)
    _launch(arrays, lam, p, alpha, threshold, factors=(len(right), theta.shape[1], scale))


def _launch(
    arrays: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    lam: float,
    p: float,
    alpha: float,
    threshold: float | None,
    factors: tuple[int, int, float] | None,
) -> None:
    """arrays: in the kernel's order. factors: rank, columns and scale, if the third and fourth are factors."""
    out, theta, tuned, base, forget_importance, retain_importance = arrays
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
            *(factors or (0, 1, 0.0)),
            LOW_RANK=factors is not None,
            WEIGHTED=weighted,
            MASKED=threshold is not None,
            DOUBLED_POWER=int(2 * p),
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
