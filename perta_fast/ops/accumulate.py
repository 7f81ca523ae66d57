"""The folds: accumulators += gradient, and += gradient squared."""

import torch
from torch import Tensor

from perta_fast import compiled
from perta_fast.ops import reference
from perta_fast.ops.backends import DTYPE_CODES, check_tensor, choose, overlap


def accumulate_(accumulator: Tensor, gradient: Tensor, *, backend: str = "auto") -> Tensor:
    """Add ``gradient`` to ``accumulator`` in place, for the mean gradient.

    accumulator: any shape, float32, contiguous; overwritten. gradient: the same shape and device, float32,
    bfloat16 or float16, contiguous, apart from the accumulator in memory. backend: see ``rescaled_subtract_``.
    Returns the accumulator. Raises TypeError or ValueError naming the argument. Backends agree bit for bit.
    """
    return _fold_(accumulator, gradient, False, backend)


def accumulate_square_(accumulator: Tensor, gradient: Tensor, *, backend: str = "auto") -> Tensor:
    """Add the square of ``gradient`` to ``accumulator`` in place, for the empirical Fisher from batches of one.

    Arguments, result and errors as in ``accumulate_``.
    """
    return _fold_(accumulator, gradient, True, backend)


def _fold_(accumulator: Tensor, gradient: Tensor, squared: bool, backend: str) -> Tensor:
    if not isinstance(accumulator, Tensor):
        raise TypeError(f"accumulator must be a torch.Tensor, not {type(accumulator).__name__}")
    check_tensor("accumulator", accumulator, accumulator)
    if accumulator.dtype != torch.float32:
        raise TypeError(f"accumulator is {accumulator.dtype}; it must be float32")
    check_tensor("gradient", gradient, accumulator)
    if overlap(accumulator, gradient):
        raise ValueError("gradient shares memory with the accumulator, which is overwritten")
    chosen = choose(backend, accumulator.device)
    with torch.no_grad():
        if chosen == "reference":
            fold = reference.accumulate_square_ if squared else reference.accumulate_
            fold(accumulator, gradient)
        elif chosen == "triton":
            from perta_fast.kernels.fold import fold_triton_

            fold_triton_(accumulator, gradient, squared)
        elif accumulator.numel():
            _compiled(chosen, accumulator, gradient, squared)
            torch.autograd.graph.increment_version(accumulator)
    return accumulator


def _compiled(backend: str, accumulator: Tensor, gradient: Tensor, squared: bool) -> None:
    code = DTYPE_CODES[gradient.dtype]
    arguments = (accumulator.data_ptr(), gradient.data_ptr(), code, squared, accumulator.numel())
    if backend == "cpp":
        compiled.kernels().fold(*arguments, torch.get_num_threads())
    else:
        with torch.cuda.device(accumulator.device):
            compiled.kernels().cuda_fold(*arguments, torch.cuda.current_stream().cuda_stream)
