"""theta - lam * w * (scale * left @ right): a task vector of which only factors exist, as of a LoRA adapter."""

import math
from typing import Any

import torch
from torch import Tensor

from perta_fast import compiled
from perta_fast.ops import reference
from perta_fast.ops.backends import (
    DTYPE_CODES,
    check_apart,
    check_array,
    check_pair,
    check_tensor,
    check_types,
    choose,
)
from perta_fast.ops.registration import register, traced
from perta_fast.rules import Rescaling


def low_rank_subtract_(
    theta: Tensor,
    left: Tensor,
    right: Tensor,
    forget_importance: Tensor | None = None,
    retain_importance: Tensor | None = None,
    *,
    scale: float,
    lam: float,
    p: float = 1.0,
    alpha: float = 1.0,
    threshold: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """``rescaled_subtract_`` of the task vector ``scale * left @ right`` (LoRA, arXiv 2106.09685), in place.

    The task vector is made element by element where it is subtracted, and never stored. Its sums run in the
    order of the rank, in float32, so that all backends give the same bits.

    theta: (rows, columns), as in ``rescaled_subtract_``; so are the importances and all other settings. left:
    (rows, rank), right: (rank, columns), float32, contiguous, on the same device; rank may be 0. scale: finite.

    Returns theta. Raises TypeError or ValueError naming the argument. No memory is allocated except by the
    reference.
    """
    check_types(
        theta=theta,
        left=left,
        right=right,
        forget_importance=forget_importance,
        retain_importance=retain_importance,
        scale=scale,
        lam=lam,
        p=p,
        alpha=alpha,
        threshold=threshold,
        backend=backend,
    )
    subtract = _IN_PLACE if traced(theta) else _subtract_
    subtract(theta, left, right, forget_importance, retain_importance, scale, lam, p, alpha, threshold, backend)
    return theta


_SOURCES = ("left", "right", "forget_importance", "retain_importance")
_Settings = tuple[float, float, float, float, float | None, str]  # scale, lam, p, alpha, threshold, backend


def _subtract_(
    theta: Tensor,
    left: Tensor,
    right: Tensor,
    forget_importance: Tensor | None,
    retain_importance: Tensor | None,
    *settings: *_Settings,
) -> None:
    _check(theta, left, right, forget_importance, retain_importance, *settings)
    importances = forget_importance, retain_importance
    sources = zip(_SOURCES, (left, right, *importances), strict=True)
    check_apart({"theta": theta}, {name: tensor for name, tensor in sources if tensor is not None})
    scale, lam, p, alpha, threshold, backend = settings
    chosen = choose(backend, theta.device)
    if chosen == "reference":
        with torch.no_grad():
            theta.copy_(
                reference.low_rank_subtract(theta, left, right, *importances, scale, lam, p, alpha, threshold)
            )
        return
    if chosen == "triton":
        from perta_fast.kernels.rescaled_subtract import low_rank_subtract_triton_

        low_rank_subtract_triton_(theta, left, right, *importances, scale, lam, p, alpha, threshold)
    elif theta.numel():
        _run_compiled(chosen, theta, left, right, importances, settings)
    torch.autograd.graph.increment_version([theta])


def _run_compiled(
    chosen: str,
    theta: Tensor,
    left: Tensor,
    right: Tensor,
    importances: tuple[Tensor | None, Tensor | None],
    settings: _Settings,
) -> None:
    scale, lam, p, alpha, threshold, _ = settings
    place = theta.data_ptr()
    read = [0 if each is None else each.data_ptr() for each in importances]
    weights_code = DTYPE_CODES[theta.dtype]
    codes = (weights_code, 0, 0, *(0 if each is None else DTYPE_CODES[each.dtype] for each in importances))
    factors = (left.data_ptr(), right.data_ptr(), len(right), theta.shape[1], scale, 0)
    how = (theta.numel(), lam, p, alpha, threshold)
    kernels = compiled.kernels()
    if chosen == "cpp":
        kernels.rescaled_subtract(
            place, place, 0, 0, *read, codes, *how, torch.get_num_threads(), False, factors
        )
    else:
        with torch.cuda.device(theta.device):
            stream = torch.cuda.current_stream().cuda_stream
            kernels.cuda_low_rank_subtract(place, place, *read, codes, *how, factors, stream)


def _check(
    theta: Tensor,
    left: Tensor,
    right: Tensor,
    forget_importance: Tensor | None,
    retain_importance: Tensor | None,
    *settings: *_Settings,
) -> None:
    scale, lam, p, alpha, threshold, _ = settings
    Rescaling(lam, p, alpha, threshold)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be a finite number")
    check_tensor("theta", theta, theta)
    if theta.dim() != 2:
        raise ValueError(f"theta has shape {tuple(theta.shape)}; a matrix is needed")
    check_pair(forget_importance, retain_importance)
    for name, tensor in (("forget_importance", forget_importance), ("retain_importance", retain_importance)):
        if tensor is not None:
            check_tensor(name, tensor, theta)
    for name, factor in (("left", left), ("right", right)):
        check_array(name, factor, theta.device)
        if factor.dtype != torch.float32 or factor.dim() != 2:
            raise ValueError(f"{name} is a {factor.dim()}-D {factor.dtype} tensor; a float32 matrix is needed")
    shapes = (len(left), right.shape[1]), tuple(theta.shape)
    if left.shape[1] != len(right) or shapes[0] != shapes[1]:
        raise ValueError(
            f"left {tuple(left.shape)} times right {tuple(right.shape)} does not have theta's shape {shapes[1]}"
        )


def _fake(*arguments: Any) -> None:
    _check(*arguments)


_IN_PLACE = register(
    "low_rank_subtract_(Tensor(a!) theta, Tensor left, Tensor right, Tensor? forget_importance, Tensor? "
    "retain_importance, float scale, float lam, float p, float alpha, float? threshold, str backend) -> ()",
    _subtract_,
    _fake,
)
