"""theta - lam * w * (theta_f - theta_0), element by element: in place, as a new tensor, on many at once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perta_fast import compiled
from perta_fast.ops import reference
from perta_fast.ops.backends import (
    DTYPE_CODES,
    check_apart,
    check_lists,
    check_one_device,
    check_pair,
    check_tensor,
    check_types,
    choose,
    numbered,
    overlap,
)
from perta_fast.ops.registration import register, traced
from perta_fast.rules import Rescaling


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
    no memory is allocated except by the reference. On an accelerator it runs on the current stream.
    """
    check_types(
        theta=theta,
        tuned=tuned,
        base=base,
        forget_importance=forget_importance,
        retain_importance=retain_importance,
        lam=lam,
        p=p,
        alpha=alpha,
        threshold=threshold,
        backend=backend,
    )
    subtract = _IN_PLACE if traced(theta) else _subtract_
    subtract(theta, tuned, base, forget_importance, retain_importance, lam, p, alpha, threshold, backend)
    return theta


def rescaled_subtract(
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
    """``theta`` less the rescaled task vector, as a new tensor of its dtype; see ``rescaled_subtract_``.

    Tensors may share memory with each other, as nothing is overwritten.
    """
    check_types(
        theta=theta,
        tuned=tuned,
        base=base,
        forget_importance=forget_importance,
        retain_importance=retain_importance,
        lam=lam,
        p=p,
        alpha=alpha,
        threshold=threshold,
        backend=backend,
    )
    subtract = _NEW if traced(theta) else _subtract
    result: Tensor = subtract(
        theta, tuned, base, forget_importance, retain_importance, lam, p, alpha, threshold, backend
    )
    return result


def rescaled_subtract_many_(
    thetas: Sequence[Tensor],
    tuneds: Sequence[Tensor],
    bases: Sequence[Tensor],
    forget_importances: Sequence[Tensor] | None = None,
    retain_importances: Sequence[Tensor] | None = None,
    *,
    lam: float,
    p: float = 1.0,
    alpha: float = 1.0,
    threshold: float | None = None,
    backend: str = "auto",
) -> None:
    """``rescaled_subtract_`` on lists of tensors on one device; with backend cuda in one launch, or a few.

    thetas[k], tuneds[k] and so on are as there; no theta may share memory with any other tensor.
    """
    check_types(lam=lam, p=p, alpha=alpha, threshold=threshold, backend=backend)
    if (forget_importances is None) != (retain_importances is None):
        raise ValueError("forget_importances and retain_importances go together: give both or neither")
    importances = {"forget_importances": forget_importances, "retain_importances": retain_importances}
    given = {name: tensors for name, tensors in importances.items() if tensors is not None}
    check_lists(thetas=thetas, tuneds=tuneds, bases=bases, **given)
    if thetas:
        subtract = _MANY if traced(thetas[0]) else _subtract_many_
        subtract(
            thetas, tuneds, bases, forget_importances, retain_importances, lam, p, alpha, threshold, backend
        )


class _Arrays(NamedTuple):
    """One tensor's arrays in the kernels' order; ``out`` may be ``theta``."""

    out: Tensor
    theta: Tensor
    tuned: Tensor
    base: Tensor
    forget_importance: Tensor | None
    retain_importance: Tensor | None

    @property
    def sources(self) -> dict[str, Tensor]:
        """What is read besides theta, by the names that messages give it."""
        return {name: tensor for name, tensor in zip(_SOURCES, self[2:], strict=True) if tensor is not None}


_SOURCES = ("tuned", "base", "forget_importance", "retain_importance")
_Settings = tuple[float, float, float, float | None, str]  # lam, p, alpha, threshold, backend


def _subtract_(
    theta: Tensor,
    tuned: Tensor,
    base: Tensor,
    forget_importance: Tensor | None,
    retain_importance: Tensor | None,
    *settings: *_Settings,
) -> None:
    arrays = _Arrays(theta, theta, tuned, base, forget_importance, retain_importance)
    _check(arrays, settings)
    for name, tensor in arrays.sources.items():
        if overlap(theta, tensor):
            raise ValueError(f"{name} shares memory with theta, which is overwritten")
    _run([arrays], settings)


def _subtract(
    theta: Tensor,
    tuned: Tensor,
    base: Tensor,
    forget_importance: Tensor | None,
    retain_importance: Tensor | None,
    *settings: *_Settings,
) -> Tensor:
    _check(_Arrays(theta, theta, tuned, base, forget_importance, retain_importance), settings)
    out = torch.empty_like(theta, requires_grad=False)
    _run([_Arrays(out, theta, tuned, base, forget_importance, retain_importance)], settings)
    return out


def _subtract_many_(
    thetas: Sequence[Tensor],
    tuneds: Sequence[Tensor],
    bases: Sequence[Tensor],
    forget_importances: Sequence[Tensor] | None,
    retain_importances: Sequence[Tensor] | None,
    *settings: *_Settings,
) -> None:
    every = _many(thetas, tuneds, bases, forget_importances, retain_importances)
    _check_many(every, settings)
    check_apart(
        numbered("thetas", thetas),
        {f"{name}s[{k}]": each for k, arrays in enumerate(every) for name, each in arrays.sources.items()},
    )
    _run(every, settings)


def _many(
    thetas: Sequence[Tensor],
    tuneds: Sequence[Tensor],
    bases: Sequence[Tensor],
    forget_importances: Sequence[Tensor] | None,
    retain_importances: Sequence[Tensor] | None,
) -> list[_Arrays]:
    nothing = [None] * len(thetas)
    lists = (thetas, thetas, tuneds, bases, forget_importances or nothing, retain_importances or nothing)
    return [_Arrays(*arrays) for arrays in zip(*lists, strict=True)]


def _check(arrays: _Arrays, settings: _Settings, place: str = "") -> None:
    """Raise unless everything fits; ``place`` tells one tensor of many, as in thetas[3]."""
    Rescaling(*settings[:4])
    check_tensor("theta" + place, arrays.theta, arrays.theta)
    check_pair(arrays.forget_importance, arrays.retain_importance)
    for name, tensor in arrays.sources.items():
        check_tensor(name + place, tensor, arrays.theta)


def _check_many(every: list[_Arrays], settings: _Settings) -> None:
    for k, arrays in enumerate(every):
        _check(arrays, settings, f"s[{k}]")
    check_one_device("thetas", [arrays.theta for arrays in every])


def _run(every: list[_Arrays], settings: _Settings) -> None:
    lam, p, alpha, threshold, backend = settings
    device = every[0].theta.device
    chosen = choose(backend, device)
    if chosen == "reference":
        with torch.no_grad():
            for arrays in every:
                arrays.out.copy_(reference.rescaled_subtract(*arrays[1:], lam, p, alpha, threshold))
        return
    if chosen == "triton":
        from perta_fast.kernels.rescaled_subtract import rescaled_subtract_triton_

        for arrays in every:
            rescaled_subtract_triton_(*arrays, lam, p, alpha, threshold)
    else:
        entries = [_entry(arrays) for arrays in every]
        if chosen == "cpp":
            for entry in entries:
                compiled.kernels().rescaled_subtract(
                    *entry, lam, p, alpha, threshold, torch.get_num_threads(), False
                )
        else:
            weighted = every[0].forget_importance is not None
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream().cuda_stream
                compiled.kernels().cuda_rescaled_subtract(entries, weighted, lam, p, alpha, threshold, stream)
    torch.autograd.graph.increment_version([arrays.out for arrays in every])


def _entry(arrays: _Arrays) -> tuple[int | tuple[int, ...], ...]:
    """Addresses, dtype codes and the number of elements, as the compiled kernels take them."""
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in arrays]
    codes = tuple(0 if tensor is None else DTYPE_CODES[tensor.dtype] for tensor in arrays[1:])
    return (*addresses, codes, arrays.theta.numel())


def _fake_many(*arguments: Any) -> None:
    _check_many(_many(*arguments[:5]), arguments[5:])


def _fake(*arguments: Any) -> None:
    _check(_Arrays(arguments[0], *arguments[:5]), arguments[5:])


def _fake_new(*arguments: Any) -> Tensor:
    _fake(*arguments)
    return torch.empty_like(arguments[0])


_ONE_TENSOR = "Tensor tuned, Tensor base, Tensor? forget_importance, Tensor? retain_importance"
_MANY_TENSORS = "Tensor[] tuneds, Tensor[] bases, Tensor[]? forget_importances, Tensor[]? retain_importances"
_HOW = "float lam, float p, float alpha, float? threshold, str backend"
_IN_PLACE = register(f"rescaled_subtract_(Tensor(a!) theta, {_ONE_TENSOR}, {_HOW}) -> ()", _subtract_, _fake)
_NEW = register(f"rescaled_subtract(Tensor theta, {_ONE_TENSOR}, {_HOW}) -> Tensor", _subtract, _fake_new)
_MANY = register(
    f"rescaled_subtract_many_(Tensor(a!)[] thetas, {_MANY_TENSORS}, {_HOW}) -> ()", _subtract_many_, _fake_many
)
