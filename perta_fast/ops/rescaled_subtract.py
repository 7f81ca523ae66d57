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
    check_tensor,
    check_types,
    check_weighing,
    choose_for_power,
    current_stream,
    dtype_codes,
)
from perta_fast.ops.registration import register
from perta_fast.rules import Rescaling


def rescaled_subtract_(
    theta: Tensor,
    tuned: Tensor,
    base: Tensor,
    forget_importance: Tensor | None = None,
    retain_importance: Tensor | None = None,
    *,
    ratio: Tensor | None = None,
    lam: float,
    p: float = 1.0,
    alpha: float = 1.0,
    threshold: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Subtract the rescaled task vector from ``theta`` in place (PerTA, arXiv 2601.22030).

    w = |I_f|^p / (|I_f|^p + alpha |I_r|^p), 0 where both are 0; from ``ratio`` = |I_r| / |I_f| alone, it is
    1 / (1 + alpha ratio^p), 0 where that is infinite; w = 1 without importances (rule tv). Arithmetic is
    float32, rounded once, to nearest even, into theta's dtype; an element whose change is zero keeps its bits. All
    backends give the same bits for p in {0.5, 1, 2}; other p use a double-precision power.

    theta: any shape, float32, bfloat16 or float16, contiguous; overwritten. tuned, base, forget_importance,
    retain_importance, ratio: the same shape and device, each of any of the three dtypes, contiguous; none may share
    memory with theta. ratio: >= 0, infinite where I_f is 0; it takes the place of both importances. lam: finite. p > 0.
    alpha >= 0. threshold: in [0, 1), replaces w by (w > threshold). backend: "auto", "reference", "cpp" (CPU), "cuda",
    "triton".

    Returns theta. Raises TypeError or ValueError naming the argument. Each byte is read once and written once; only the
    reference allocates memory. On an accelerator it runs on the current stream.
    """
    arguments = theta, tuned, base, forget_importance, retain_importance, ratio, lam, p, alpha, threshold, backend
    check_types(**dict(zip(_ARGUMENTS, arguments, strict=True)))
    _IN_PLACE(*arguments)
    return theta


def rescaled_subtract(
    theta: Tensor,
    tuned: Tensor,
    base: Tensor,
    forget_importance: Tensor | None = None,
    retain_importance: Tensor | None = None,
    *,
    ratio: Tensor | None = None,
    lam: float,
    p: float = 1.0,
    alpha: float = 1.0,
    threshold: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """``theta`` less the rescaled task vector, as a new tensor of its dtype; see ``rescaled_subtract_``.

    Tensors may share memory with each other, as nothing is overwritten.
    """
    arguments = theta, tuned, base, forget_importance, retain_importance, ratio, lam, p, alpha, threshold, backend
    check_types(**dict(zip(_ARGUMENTS, arguments, strict=True)))
    result: Tensor = _NEW(*arguments)
    return result


def rescaled_subtract_many_(
    thetas: Sequence[Tensor],
    tuneds: Sequence[Tensor],
    bases: Sequence[Tensor],
    forget_importances: Sequence[Tensor] | None = None,
    retain_importances: Sequence[Tensor] | None = None,
    *,
    ratios: Sequence[Tensor] | None = None,
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
    check_weighing(forget_importances, retain_importances, ratios, "s")
    importances = {"forget_importances": forget_importances, "retain_importances": retain_importances}
    importances["ratios"] = ratios
    given = {name: tensors for name, tensors in importances.items() if tensors is not None}
    check_lists(thetas=thetas, tuneds=tuneds, bases=bases, **given)
    if thetas:
        settings = lam, p, alpha, threshold, backend
        _MANY(thetas, tuneds, bases, forget_importances, retain_importances, ratios, *settings)


_ARRAYS = ("theta", "tuned", "base", "forget_importance", "retain_importance", "ratio")
_ARGUMENTS = (*_ARRAYS, "lam", "p", "alpha", "threshold", "backend")


class _Arrays(NamedTuple):
    """One tensor's arrays; ``out`` may be ``theta``."""

    out: Tensor
    theta: Tensor
    tuned: Tensor
    base: Tensor
    forget_importance: Tensor | None
    retain_importance: Tensor | None
    ratio: Tensor | None
    suffix: str = ""  # what the arguments' names get in messages, as in thetas[3]

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """What the kernels read, in their order: without forget importance, the ratio is the retain importance."""
        last = self.retain_importance if self.ratio is None else self.ratio
        return self.theta, self.tuned, self.base, self.forget_importance, last

    def sources(self) -> dict[str, Tensor]:
        """The tensors that are read besides theta, by their names in messages."""
        named = zip(_ARRAYS[1:], self[2:7], strict=True)
        return {name + self.suffix: tensor for name, tensor in named if tensor is not None}


# Below, ``arguments`` are those of an operator in the order of its schema: six tensors (or lists), then the settings.


def _one(arguments: tuple[Any, ...], suffix: str = "") -> _Arrays:
    theta, tuned, base, forget, retain, ratio, *_ = arguments
    return _Arrays(theta, theta, tuned, base, forget, retain, ratio, suffix)


def _many(arguments: tuple[Any, ...]) -> list[_Arrays]:
    lists = [[None] * len(arguments[0]) if tensors is None else tensors for tensors in arguments[: len(_ARRAYS)]]
    return [_one(arrays, f"s[{k}]") for k, arrays in enumerate(zip(*lists, strict=True))]


def _subtract_(*arguments: Any) -> None:
    _subtract_all_([_one(arguments)], arguments[len(_ARRAYS) :])


def _subtract(*arguments: Any) -> Tensor:
    arrays = _one(arguments)
    rescaling = _check([arrays], arguments[len(_ARRAYS) :])
    out = torch.empty_like(arrays.theta, requires_grad=False)
    _run([arrays._replace(out=out)], rescaling, arguments[-1])
    return out


def _subtract_many_(*arguments: Any) -> None:
    _subtract_all_(_many(arguments), arguments[len(_ARRAYS) :])


def _subtract_all_(tensors: list[_Arrays], settings: tuple[Any, ...]) -> None:
    rescaling = _check(tensors, settings)
    written = {"theta" + arrays.suffix: arrays.theta for arrays in tensors}
    read = {name: tensor for arrays in tensors for name, tensor in arrays.sources().items()}
    check_apart(written, read)
    _run(tensors, rescaling, settings[-1])


def _check(tensors: list[_Arrays], settings: tuple[Any, ...]) -> Rescaling:
    """Raise unless types, shapes and devices fit."""
    rescaling = Rescaling(*settings[:-1])
    for arrays in tensors:
        check_tensor("theta" + arrays.suffix, arrays.theta, arrays.theta)
        check_weighing(arrays.forget_importance, arrays.retain_importance, arrays.ratio)
        for name, tensor in arrays.sources().items():
            check_tensor(name, tensor, arrays.theta)
    check_one_device("thetas", [arrays.theta for arrays in tensors])
    return rescaling


def _run(tensors: list[_Arrays], rescaling: Rescaling, backend: str) -> None:
    device = tensors[0].theta.device
    chosen = choose_for_power(backend, device, rescaling.p)
    if chosen == "reference":
        with torch.no_grad():
            for arrays in tensors:
                arrays.out.copy_(reference.rescaled_subtract(*arrays.operands, rescaling))
        return
    if chosen == "triton":
        from perta_fast.kernels.rescaled_subtract import rescaled_subtract_triton_

        for arrays in tensors:
            rescaled_subtract_triton_(arrays.out, *arrays.operands, rescaling)
    else:
        entries = [
            (*addresses((arrays.out, *arrays.operands)), dtype_codes(arrays.operands), arrays.theta.numel())
            for arrays in tensors
        ]
        if chosen == "cpp":
            for entry in entries:
                compiled.kernels().rescaled_subtract(*entry, rescaling, torch.get_num_threads(), False)
        else:
            with current_stream(device) as stream:
                compiled.kernels().cuda_rescaled_subtract(entries, rescaling, stream)
    torch.autograd.graph.increment_version([arrays.out for arrays in tensors])


def _fake(*arguments: Any) -> None:
    _check([_one(arguments)], arguments[len(_ARRAYS) :])


def _fake_new(*arguments: Any) -> Tensor:
    _fake(*arguments)
    return torch.empty_like(arguments[0])


def _fake_many(*arguments: Any) -> None:
    _check(_many(arguments), arguments[len(_ARRAYS) :])


_WEIGHING = "Tensor? forget_importance, Tensor? retain_importance, Tensor? ratio"
_ONE_TENSOR = f"Tensor tuned, Tensor base, {_WEIGHING}"
_MANY_TENSORS = (
    "Tensor[] tuneds, Tensor[] bases, Tensor[]? forget_importances, Tensor[]? retain_importances, Tensor[]? ratios"
)
_HOW = "float lam, float p, float alpha, float? threshold, str backend"
_IN_PLACE = register(f"rescaled_subtract_(Tensor(a!) theta, {_ONE_TENSOR}, {_HOW}) -> ()", _subtract_, _fake)
_NEW = register(f"rescaled_subtract(Tensor theta, {_ONE_TENSOR}, {_HOW}) -> Tensor", _subtract, _fake_new)
_MANY = register(
    f"rescaled_subtract_many_(Tensor(a!)[] thetas, {_MANY_TENSORS}, {_HOW}) -> ()", _subtract_many_, _fake_many
)
