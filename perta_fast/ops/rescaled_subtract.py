"""theta -= lam * w * (theta_f - theta_0), element by element."""

import torch
from torch import Tensor

from perta_fast import compiled
from perta_fast.ops import reference
from perta_fast.ops.backends import DTYPE_CODES, check_tensor, choose, overlap
from perta_fast.rules import check_settings


def rescaled_subtract_(
    theta: Tensor,
    tuned: Tensor,
    base: Tensor,
    forget_importance: Tensor | None = None,
    retain_importance: Tensor | None = None,
    *,
    lam: float,
    p: float = 1.0,
    alpha: float = 1.0,
    threshold: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Subtract the rescaled task vector from ``theta`` in place (PerTA, arXiv 2601.22030).

    w = |I_f|^p / (|I_f|^p + alpha |I_r|^p), 0 where both are 0; w = 1 without importances (rule tv). Arithmetic
    is float32, rounded once, to nearest even, into theta's dtype; an element whose step is zero keeps its bits.
    All backends give the same bits for p in {0.5, 1, 2}; other p go through a double-precision power.

    theta: any shape, float32, bfloat16 or float16, contiguous; overwritten. tuned, base, forget_importance,
    retain_importance: the same shape and device, each of any of the three dtypes, contiguous; none may share
    memory with theta. lam: finite. p > 0. alpha >= 0. threshold: in [0, 1), replaces w by (w > threshold).
    backend: "auto", "reference", "cpp" (CPU), "cuda", "triton".

    Returns theta. Raises TypeError or ValueError naming the argument. Each byte is read once and written once;
    no memory is allocated except by the reference.
    """
    check_settings(lam, p, alpha, threshold)
    if not isinstance(theta, Tensor):
        raise TypeError(f"theta must be a torch.Tensor, not {type(theta).__name__}")
    if (forget_importance is None) != (retain_importance is None):
        raise ValueError("forget_importance and retain_importance go together: give both or neither")
    sources: dict[str, Tensor] = {"tuned": tuned, "base": base}
    if forget_importance is not None and retain_importance is not None:
        sources |= {"forget_importance": forget_importance, "retain_importance": retain_importance}
    check_tensor("theta", theta, theta)
    for name, tensor in sources.items():
        check_tensor(name, tensor, theta)
        if overlap(theta, tensor):
            raise ValueError(f"{name} shares memory with theta, which is overwritten")
    chosen = choose(backend, theta.device)
    with torch.no_grad():
        if chosen == "reference":
            theta.copy_(
                reference.rescaled_subtract(
                    theta, tuned, base, forget_importance, retain_importance, lam, p, alpha, threshold
                )
            )
        elif chosen == "triton":
            from perta_fast.kernels.rescaled_subtract import rescaled_subtract_triton_

            rescaled_subtract_triton_(
                theta, tuned, base, forget_importance, retain_importance, lam, p, alpha, threshold
            )
        else:
            _compiled(chosen, theta, list(sources.values()), lam, p, alpha, threshold)
            torch.autograd.graph.increment_version(theta)
    return theta


def _compiled(
    backend: str,
    theta: Tensor,
    sources: list[Tensor],
    lam: float,
    p: float,
    alpha: float,
    threshold: float | None,
) -> None:
    arrays = [theta, *sources]
    missing = 5 - len(arrays)
    addresses = [tensor.data_ptr() for tensor in arrays] + [0] * missing
    codes = tuple([DTYPE_CODES[tensor.dtype] for tensor in arrays] + [0] * missing)
    arguments = (theta.data_ptr(), *addresses, codes, theta.numel(), lam, p, alpha, threshold)
    if theta.numel() == 0:
        return
    if backend == "cpp":
        compiled.kernels().rescaled_subtract(*arguments, torch.get_num_threads(), False)
    else:
        with torch.cuda.device(theta.device):
            stream = torch.cuda.current_stream().cuda_stream
            compiled.kernels().cuda_rescaled_subtract(*arguments, stream)
