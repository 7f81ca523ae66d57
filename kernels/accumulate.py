"""accumulator += gradient, or += gradient^2, in Triton; product and sum are not fused.

Assumes dense arrays aligned to their elements, of any size; the last block is masked.
Bytes: 8 an element of the accumulator, and the gradient's once. FLOPs: 1 an element, 2 with the square.
"""

import triton
import triton.language as tl
from perta_fast.kernels.device import current_device
from perta_fast.kernels.storage import as_float
from torch import Tensor

BLOCK = 1024


@triton.jit
def _accumulate(accumulator_pointer, gradient_pointer, n, SQUARED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    total = tl.load(accumulator_pointer + offsets, mask=inside, other=0.0)
    gradient = as_float(tl.load(gradient_pointer + offsets, mask=inside, other=0.0))
    if SQUARED:
        gradient = gradient * gradient
    tl.store(accumulator_pointer + offsets, total + gradient, mask=inside)


def accumulate_triton_(accumulator: Tensor, gradient: Tensor, squared: bool) -> None:
    """Launch on checked arguments; see ``perta_fast.ops.accumulate_``."""
    if n := accumulator.numel():
        with current_device(accumulator):
            _accumulate[(triton.cdiv(n, BLOCK),)](
                accumulator, gradient, n, SQUARED=squared, BLOCK=BLOCK, enable_fp_fusion=False
            )
