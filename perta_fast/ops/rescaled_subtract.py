"""theta - lam * w * (theta_f - theta_0), element by element: in place, as a new tensor, on many at once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perta_fast import compiled
from perta_fast.ops import reference
from perta_fast.ops.backends import (
    addresses,
    check_apart,
    check_lists,
    check_one_device,
    check_pair,
    check_tensor,
    check_types,
    choose,
    current_stream,
    dtype_codes,
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
    is float32, rounded once, to nearest even, into theta's dtype; an element whose change is zero keeps its bits.
    All backends give the same bits for p in {0.5, 1, 2}; other p go through a double-precision power.

    theta: any shape, float32, bfloat16 or float16, contiguous; overwritten. tuned, base, forget_importance,
    retain_importance: the same shape and device, each of any of the three dtypes, contiguous; none may share
    memory with theta. lam: finite. p > 0. alpha >= 0. threshold: in [0, 1), replaces w by (w > threshold).
    backend: "auto", "reference", "cpp" (CPU), "cuda", "triton".

    Returns theta. Raises TypeError or ValueError naming the argument. Each byte is read once and written once;
    no memory is allocated except by the reference. On an accelerator it runs on the current stream.
    """
    arrays = theta, tuned, base, forget_importance, retain_importance
    settings = lam, p, alpha, threshold, backend
    check_types(**dict(zip(_ARGUMENTS, arrays + settings, strict=True)))
    (_IN_PLACE if traced(theta) else _subtract_)(*arrays, *settings)
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
    arrays = theta, tuned, base, forget_importance, retain_importance
    settings = lam, p, alpha, threshold, backend
    check_types(**dict(zip(_ARGUMENTS, arrays + settings, strict=True)))
    result: Tensor = (_NEW if traced(theta) else _subtract)(*arrays, *settings)
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
        lists = thetas, tuneds, bases, forget_importances, retain_importances
        (_MANY if traced(thetas[0]) else _subtract_many_)(*lists, lam, p, alpha, threshold, backend)


_ARRAYS = ("theta", "tuned", "base", "forget_importance", "retain_importance")
_ARGUMENTS = (*_ARRAYS, "lam", "p", "alpha", "threshold", "backend")
_Settings = tuple[float, float, float, float | None, str]  # lam, p, alpha, threshold, backend
_Importance = Tensor | None
_Importances = Sequence[Tensor] | None


class _Arrays(NamedTuple):
    """One tensor's arrays in the kernels' order; ``out`` may be ``theta``."""

    out: Tensor
    theta: Tensor
    tuned: Tensor
    base: Tensor
    forget_importance: _Importance
    retain_importance: _Importance

    def sources(self, suffix: str) -> dict[str, Tensor]:
        """The tensors that are read besides theta, by their names in messages; ``suffix`` as in ``_suffixes``."""
        named = zip(_ARRAYS[1:], self[2:], strict=True)
        return {name + suffix: tensor for name, tensor in named if tensor is not None}


def _subtract_(
    theta: Tensor, tuned: Tensor, base: Tensor, forget: _Importance, retain: _Importance, *settings: *_Settings
) -> None:
    _subtract_all_([_Arrays(theta, theta, tuned, base, forget, retain)], [""], settings)


def _subtract(
    theta: Tensor, tuned: Tensor, base: Tensor, forget: _Importance, retain: _Importance, *settings: *_Settings
) -> Tensor:
    arrays = _Arrays(theta, theta, tuned, base, forget, retain)
    rescaling = _check([arrays], [""], settings)
    out = torch.empty_like(theta, requires_grad=False)
    _run([arrays._replace(out=out)], rescaling, settings[-1])
    return out


def _subtract_many_(
    thetas: Sequence[Tensor],
    tuneds: Sequence[Tensor],
    bases: Sequence[Tensor],
    forgets: _Importances,
    retains: _Importances,
    *settings: *_Settings,
) -> None:
    tensors = _many(thetas, tuneds, bases, forgets, retains)
    _subtract_all_(tensors, _suffixes(tensors), settings)


def _many(
    thetas: Sequence[Tensor],
    tuneds: Sequence[Tensor],
    bases: Sequence[Tensor],
    forgets: _Importances,
    retains: _Importances,
) -> list[_Arrays]:
    nothing = [None] * len(thetas)
    lists = (thetas, thetas, tuneds, bases, forgets or nothing, retains or nothing)
    return [_Arrays(*arrays) for arrays in zip(*lists, strict=True)]


def _suffixes(tensors: list[_Arrays]) -> list[str]:
    """What an argument's name gets for each tensor of a list, as in thetas[3]."""
    return [f"s[{k}]" for k in range(len(tensors))]


def _subtract_all_(tensors: list[_Arrays], suffixes: list[str], settings: _Settings) -> None:
    rescaling = _check(tensors, suffixes, settings)
    written: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    for arrays, suffix in zip(tensors, suffixes, strict=True):
        written["theta" + suffix] = arrays.theta
        read |= arrays.sources(suffix)
    check_apart(written, read)
    _run(tensors, rescaling, settings[-1])


def _check(tensors: list[_Arrays], suffixes: list[str], settings: _Settings) -> Rescaling:
    """Raise unless types, shapes and devices fit."""
    rescaling = Rescaling(*settings[:-1])
    for arrays, suffix in zip(tensors, suffixes, strict=True):
        check_tensor("theta" + suffix, arrays.theta, arrays.theta)
        check_pair(arrays.forget_importance, arrays.retain_importance)
        for name, tensor in arrays.sources(suffix).items():
            check_tensor(name, tensor, arrays.theta)
    check_one_device("thetas", [arrays.theta for arrays in tensors])
    return rescaling


def _run(tensors: list[_Arrays], rescaling: Rescaling, backend: str) -> None:
    device = tensors[0].theta.device
    chosen = choose(backend, device)
    if chosen == "reference":
        with torch.no_grad():
            for arrays in tensors:
                arrays.out.copy_(reference.rescaled_subtract(*arrays[1:], rescaling))
        return
    if chosen == "triton":
        from perta_fast.kernels.rescaled_subtract import rescaled_subtract_triton_

        for arrays in tensors:
            rescaled_subtract_triton_(*arrays, rescaling)
    else:
        entries = [_entry(arrays) for arrays in tensors]
        if chosen == "cpp":
            for entry in entries:
                compiled.kernels().rescaled_subtract(*entry, rescaling, torch.get_num_threads(), False)
        else:
            with current_stream(device) as stream:
                compiled.kernels().cuda_rescaled_subtract(entries, rescaling, stream)
    torch.autograd.graph.increment_version([arrays.out for arrays in tensors])


def _entry(arrays: _Arrays) -> tuple[int | tuple[int, ...], ...]:
    """Addresses, dtype codes and the number of elements, for the compiled kernels."""
    return *addresses(arrays), dtype_codes(arrays[1:]), arrays.theta.numel()


def _fake(*arguments: Any) -> None:
    _check([_Arrays(arguments[0], *arguments[:5])], [""], arguments[5:])


def _fake_new(*arguments: Any) -> Tensor:
    _fake(*arguments)
    return torch.empty_like(arguments[0])


def _fake_many(*arguments: Any) -> None:
    tensors = _many(*arguments[:5])
    _check(tensors, _suffixes(tensors), arguments[5:])


_ONE_TENSOR = "Tensor tuned, Tensor base, Tensor? forget_importance, Tensor? retain_importance"
_MANY_TENSORS = "Tensor[] tuneds, Tensor[] bases, Tensor[]? forget_importances, Tensor[]? retain_importances"
_HOW = "float lam, float p, float alpha, float? threshold, str backend"
_IN_PLACE = register(f"rescaled_subtract_(Tensor(a!) theta, {_ONE_TENSOR}, {_HOW}) -> ()", _subtract_, _fake)
_NEW = register(f"rescaled_subtract(Tensor theta, {_ONE_TENSOR}, {_HOW}) -> Tensor", _subtract, _fake_new)
_MANY = register(
    f"rescaled_subtract_many_(Tensor(a!)[] thetas, {_MANY_TENSORS}, {_HOW}) -> ()", _subtract_many_, _fake_many
)
