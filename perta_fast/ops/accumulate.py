"""accumulator += gradient, and += gradient squared, for one pair of tensors and for many."""

from collections.abc import Sequence

import torch
from torch import Tensor

from perta_fast import compiled
from perta_fast.ops import reference
from perta_fast.ops.backends import (
    DTYPE_CODES,
    check_apart,
    check_lists,
    check_one_device,
    check_tensor,
    check_types,
    choose,
    current_stream,
    numbered,
)
from perta_fast.ops.registration import register


def accumulate_(accumulator: Tensor, gradient: Tensor, *, backend: str = "auto") -> Tensor:
    """Add ``gradient`` to ``accumulator`` in place, for the mean gradient.

    accumulator: any shape, float32, contiguous; overwritten. gradient: the same shape and device, float32, bfloat16 or
    float16, contiguous, sharing no memory with the accumulator. backend: see ``rescaled_subtract_``. Returns the
    accumulator. Raises TypeError or ValueError naming the argument. Backends agree bit for bit.
    """
    return _one_pair(accumulator, gradient, False, backend)


def accumulate_square_(accumulator: Tensor, gradient: Tensor, *, backend: str = "auto") -> Tensor:
    """Add the square of ``gradient`` to ``accumulator`` in place, for the empirical Fisher from batches of one.

    Arguments, result and errors as in ``accumulate_``.
    """
    return _one_pair(accumulator, gradient, True, backend)


def accumulate_many_(accumulators: Sequence[Tensor], gradients: Sequence[Tensor], *, backend: str = "auto") -> None:
    """``accumulate_`` on pairs of tensors on one device; with backend cuda in one launch, or a few.

    No accumulator may share memory with any other tensor.
    """
    _many_pairs(accumulators, gradients, False, backend)


def accumulate_square_many_(
    accumulators: Sequence[Tensor], gradients: Sequence[Tensor], *, backend: str = "auto"
) -> None:
    """``accumulate_square_`` on pairs of tensors; see ``accumulate_many_``."""
    _many_pairs(accumulators, gradients, True, backend)


def _one_pair(accumulator: Tensor, gradient: Tensor, squared: bool, backend: str) -> Tensor:
    check_types(accumulator=accumulator, gradient=gradient, backend=backend)
    _ONE(accumulator, gradient, squared, backend)
    return accumulator


def _many_pairs(accumulators: Sequence[Tensor], gradients: Sequence[Tensor], squared: bool, backend: str) -> None:
    check_types(backend=backend)
    check_lists(accumulators=accumulators, gradients=gradients)
    if accumulators:
        _MANY(accumulators, gradients, squared, backend)


def _accumulate_(accumulator: Tensor, gradient: Tensor, squared: bool, backend: str) -> None:
    _check_and_run({"accumulator": accumulator}, {"gradient": gradient}, squared, backend)


def _accumulate_many_(accumulators: Sequence[Tensor], gradients: Sequence[Tensor], squared: bool, backend: str) -> None:
    _check_and_run(numbered("accumulators", accumulators), numbered("gradients", gradients), squared, backend)


def _check(accumulators: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    """Raise unless types, shapes and devices fit; tensors are given by their names in messages."""
    for (name, accumulator), (gradient_name, gradient) in zip(accumulators.items(), gradients.items(), strict=True):
        check_tensor(name, accumulator, accumulator)
        if accumulator.dtype != torch.float32:
            raise TypeError(f"{name} is {accumulator.dtype}; it must be float32")
        check_tensor(gradient_name, gradient, accumulator)
    check_one_device("accumulators", list(accumulators.values()))


def _check_and_run(accumulators: dict[str, Tensor], gradients: dict[str, Tensor], squared: bool, backend: str) -> None:
    _check(accumulators, gradients)
    check_apart(accumulators, gradients)
    pairs = list(zip(accumulators.values(), gradients.values(), strict=True))
    device = pairs[0][0].device
    chosen = choose(backend, device)
    if chosen == "reference":
        with torch.no_grad():
            for pair in pairs:
                reference.accumulate_(*pair, squared)
        return
    if chosen == "triton":
        from perta_fast.kernels.accumulate import accumulate_triton_

        for pair in pairs:
            accumulate_triton_(*pair, squared)
    else:
        entries = [(a.data_ptr(), g.data_ptr(), DTYPE_CODES[g.dtype], a.numel()) for a, g in pairs]
        if chosen == "cpp":
            for *arrays, count in entries:
                compiled.kernels().accumulate(*arrays, squared, count, torch.get_num_threads())
        else:
            with current_stream(device) as stream:
                compiled.kernels().cuda_accumulate(entries, squared, stream)
    torch.autograd.graph.increment_version([accumulator for accumulator, _ in pairs])


_ONE = register(
    "accumulate_(Tensor(a!) accumulator, Tensor gradient, bool squared, str backend) -> ()",
    _accumulate_,
    lambda accumulator, gradient, *_: _check({"accumulator": accumulator}, {"gradient": gradient}),
)
_MANY = register(
    "accumulate_many_(Tensor(a!)[] accumulators, Tensor[] gradients, bool squared, str backend) -> ()",
    _accumulate_many_,
    lambda accumulators, gradients, *_: _check(
        numbered("accumulators", accumulators), numbered("gradients", gradients)
    ),
)
