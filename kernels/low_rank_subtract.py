"""theta - lam w (scale left right) in Triton, bit for bit as the reference: the task vector of a LoRA adapter.

Each element of the task vector is made in registers, its products added in the order of the rank, never fused.
Assumes what rescaled_subtract.py does, and factors that stay in the caches.
Bytes: theta read and written once, importances read once. FLOPs: 2 a rank and element, and those of
rescaled_subtract.py.
"""

import triton
import triton.language as tl
from perta_fast.kernels.device import current_device
from perta_fast.kernels.rescaled_subtract import BLOCK, settings, subtract_block
from torch import Tensor

from perta_fast.rules import Rescaling


@triton.jit
def _low_rank_subtract(  # type: ignore[no-untyped-def]
    theta_pointer,
    left_pointer,
    right_pointer,
    forget_pointer,
    retain_pointer,
    n,
    rank,
    columns,
    scale,
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
    row = offsets // columns
    column = offsets % columns
    total = tl.zeros(offsets.shape, tl.float32)
    for k in range(rank):
        left = tl.load(left_pointer + row * rank + k, mask=inside, other=0.0)
        right = tl.load(right_pointer + k * columns + column, mask=inside, other=0.0)
        total = total + left * right
    subtract_block(
        theta_pointer,
        stored,
        scale * total,
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


def low_rank_subtract_triton_(
    theta: Tensor,
    left: Tensor,
    right: Tensor,
    forget_importance: Tensor | None,
    retain_importance: Tensor | None,
    scale: float,
    rescaling: Rescaling,
) -> None:
    """Launch on checked arguments; see ``perta_fast.ops.low_rank_subtract_``."""
    numbers, constants = settings(rescaling, forget_importance, retain_importance)
    importances = [theta if tensor is None else tensor for tensor in (forget_importance, retain_importance)]
    if n := theta.numel():
        factors = left, right, *importances, n, len(right), theta.shape[1], scale
        with current_device(theta):
            _low_rank_subtract[(triton.cdiv(n, BLOCK),)](theta, *factors, *numbers, **constants)
