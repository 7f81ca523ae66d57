"""An operation of your own: theta -= lam * clamp(tau, -bound, bound), where tau = tuned - base.

It has a reference in plain torch and a Triton kernel that gives the same bits, and it is a torch operator.
Needs the extra: pip install "perta-fast[triton]". Without a GPU the kernel runs in Triton's interpreter.
"""

import os

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import triton
import triton.language as tl
from perta_fast.kernels.storage import as_float, rounded

from perta_fast.ops.backends import check_apart, check_tensor, choose
from perta_fast.ops.registration import register

BLOCK = 1024


def reference_(theta: Tensor, tuned: Tensor, base: Tensor, lam: float, bound: float) -> None:
    """The formula, in float32, rounded once."""
    tau = (tuned.float() - base.float()).clamp(-bound, bound)
    theta.copy_(theta.float() - lam * tau)


@triton.jit
def kernel(theta, tuned, base, lam, bound, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One block of elements. Moves 8 bytes per element in bfloat16: three reads, one write."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    stored = tl.load(theta + offsets, inside)
    tau = as_float(tl.load(tuned + offsets, inside)) - as_float(tl.load(base + offsets, inside))
    tau = tl.minimum(tl.maximum(tau, -bound), bound)
    tl.store(theta + offsets, rounded(as_float(stored) - lam * tau, stored.dtype), inside)


def clipped_subtract_(
    theta: Tensor, tuned: Tensor, base: Tensor, lam: float, bound: float, backend: str = "auto"
) -> None:
    """Check the arguments, then run the operation on the chosen backend."""
    for name, tensor in (("theta", theta), ("tuned", tuned), ("base", base)):
        check_tensor(name, tensor, theta)
    check_apart({"theta": theta}, {"tuned": tuned, "base": base})
    if choose(backend, theta.device, ("triton", "reference")) == "triton":
        grid = (triton.cdiv(theta.numel(), BLOCK),)
        kernel[grid](theta, tuned, base, lam, bound, theta.numel(), BLOCK=BLOCK, enable_fp_fusion=False)
    else:
        reference_(theta, tuned, base, lam, bound)


operator = register(
    "clipped_subtract_(Tensor(a!) theta, Tensor tuned, Tensor base, float lam, float bound, str backend) -> ()",
    clipped_subtract_,
    lambda theta, tuned, base, lam, bound, backend: None,
)

generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for count in (0, 1, 1000, BLOCK, 3 * BLOCK + 7):  # some of them not a multiple of the block size
        theta, tuned, base = (torch.randn(count, generator=generator).to(dtype) for _ in range(3))
        expected = theta.clone()
        clipped_subtract_(expected, tuned, base, 0.5, 1.0, backend="reference")
        if count:
            operator(theta, tuned, base, 0.5, 1.0, "triton")
        assert torch.equal(theta, expected), (dtype, count)
    print(f"{dtype}: the kernel gives the bits of the reference")
