"""theta - lam * w * (scale * left @ right): a task vector that is given by its factors, as by a LoRA adapter."""

import math
from typing import Any

import torch
from torch import Tensor

from perta_fast import compiled
from perta_fast.ops import reference
from perta_fast.ops.backends import (
    addresses,
    check_apart,
    check_array,
    check_tensor,
    check_types,
    check_weighing,
    choose_for_power,
    current_stream,
    dtype_codes,
)
from perta_fast.ops.registration import register
from perta_fast.rules import Rescaling


def low_rank_subtract_(
    theta: Tensor,
    left: Tensor,
    right: Tensor,
    forget_importance: Tensor | None = None,
    retain_importance: Tensor | None = None,
    *,
    ratio: Tensor | None = None,
    scale: float,
    lam: float,
    p: float = 1.0,
    alpha: float = 1.0,
    threshold: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """``rescaled_subtract_`` of the task vector ``scale * left @ right`` (LoRA, arXiv 2106.09685), in place.

    Each element of the task vector is computed during the subtraction and never stored. Products are added in the order
    of the rank, in float32, so all backends give the same bits.

    theta: (rows, columns), as in ``rescaled_subtract_``; so are the importances, their ratio and all other settings.
    left: (rows, rank), right: (rank, columns), float32, contiguous, on the same device; rank may be 0. scale: finite.

    Returns theta. Raises TypeError or ValueError naming the argument. Only the reference allocates memory.
    """
    arguments: tuple[Any, ...] = (theta, left, right, forget_importance, retain_importance, ratio)
    arguments += (scale, lam, p, alpha, threshold, backend)
    check_types(**dict(zip(_ARGUMENTS, arguments, strict=True)))
    _IN_PLACE(*arguments)
    return theta


_ARRAYS = ("theta", "left", "right", "forget_importance", "retain_importance", "ratio")
_ARGUMENTS = (*_ARRAYS, "scale", "lam", "p", "alpha", "threshold", "backend")


def _subtract_(
    theta: Tensor,
    left: Tensor,
    right: Tensor,
    forget: Tensor | None,
    retain: Tensor | None,
    ratio: Tensor | None,
    scale: float,
    *settings: Any,
) -> None:
    *numbers, backend = settings
    arrays = theta, left, right, forget, retain, ratio
    rescaling = _check(*arrays, scale, *numbers)
    sources = zip(_ARRAYS[1:], arrays[1:], strict=True)
    check_apart({"theta": theta}, {name: tensor for name, tensor in sources if tensor is not None})
    operands = theta, left, right, forget, retain if ratio is None else ratio  # as in rescaled_subtract.py
    chosen = choose_for_power(backend, theta.device, rescaling.p)
    if chosen == "reference":
        with torch.no_grad():
            theta.copy_(reference.low_rank_subtract(*operands, scale, rescaling))
        return
    if chosen == "triton":
        from perta_fast.kernels.low_rank_subtract import low_rank_subtract_triton_

        low_rank_subtract_triton_(*operands, scale, rescaling)
    elif theta.numel():
        start, *read = addresses((theta, *operands[3:]))
        codes = dtype_codes((theta, None, None, *operands[3:]))
        factors = (*addresses((left, right)), len(right), theta.shape[1], scale, 0)
        how = codes, theta.numel(), rescaling
        kernels = compiled.kernels()
        if chosen == "cpp":
            threads = torch.get_num_threads()
            kernels.rescaled_subtract(start, start, 0, 0, *read, *how, threads, False, factors)
        else:
            with current_stream(theta.device) as stream:
                kernels.cuda_low_rank_subtract(start, start, *read, *how, factors, stream)
    torch.autograd.graph.increment_version([theta])


def _check(
    theta: Tensor,
    left: Tensor,
    right: Tensor,
    forget: Tensor | None,
    retain: Tensor | None,
    ratio: Tensor | None,
    scale: float,
    *numbers: Any,
) -> Rescaling:
    """Raise unless types, shapes and devices fit. numbers: lam, p, alpha, threshold."""
    rescaling = Rescaling(*numbers)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be a finite number")
    check_tensor("theta", theta, theta)
    if theta.dim() != 2:
        raise ValueError(f"theta has shape {tuple(theta.shape)}; a matrix is needed")
    check_weighing(forget, retain, ratio)
    for name, tensor in zip(_ARRAYS[3:], (forget, retain, ratio), strict=True):
        if tensor is not None:
            check_tensor(name, tensor, theta)
    for name, factor in (("left", left), ("right", right)):
        check_array(name, factor, theta.device)
        if factor.dtype != torch.float32 or factor.dim() != 2:
            raise ValueError(f"{name} is a {factor.dim()}-D {factor.dtype} tensor; a float32 matrix is needed")
    if left.shape[1] != len(right) or (len(left), right.shape[1]) != theta.shape:
        raise ValueError(
            f"left {tuple(left.shape)} times right {tuple(right.shape)} does not have theta's shape "
            f"{tuple(theta.shape)}"
        )
    return rescaling


def _fake(*arguments: Any) -> None:
    _check(*arguments[:-1])


_IN_PLACE = register(
    "low_rank_subtract_(Tensor(a!) theta, Tensor left, Tensor right, "
    "Tensor? forget_importance, Tensor? retain_importance, Tensor? ratio, "
    "float scale, float lam, float p, float alpha, float? threshold, str backend) -> ()",
    _subtract_,
    _fake,
)
