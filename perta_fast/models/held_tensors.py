"""A live module's parameters by the names of its checkpoint, with the values that this process holds.

Of a sharded module a process holds only some of the elements.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perta_fast.distributed.sharded import held, held_ranges
from perta_fast.errors import InputError
from perta_fast.models.stored_names import stored_places
from perta_fast.ops.backends import DTYPE_CODES


def check_in_memory(name: str, parameter: Tensor) -> None:
    """Raise InputError for a parameter without values."""
    if parameter.is_meta:
        raise InputError(f"parameter {name} is on the meta device: its values are not in memory")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise InputError for a type that the kernels do not compute in."""
    if dtype not in DTYPE_CODES:
        raise InputError(f"parameter {name} is {dtype}; it must be float32, bfloat16 or float16")


@dataclass(frozen=True)
class Held:
    """One stored tensor. ranges: flat views of consecutive elements, each with the number of its first element."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    ranges: list[tuple[int, Tensor]]


def held_tensors(module: nn.Module) -> dict[str, Held]:
    """The floating-point parameters by their stored names, tied ones once; a sharded one may have many ranges.

    All must be contiguous and in memory. Raises InputError for one whose parts are stored in another order.
    """
    tensors = {}
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            continue
        values = held(parameter.detach()).view(-1)
        for stored, (begin, shape) in stored_places(module, name, parameter.shape).items():
            end = begin + shape.numel()
            ranges = []
            for first, part in held_ranges(parameter.detach()):
                start, stop = max(first, begin), min(first + part.stop - part.start, end)
                if start < stop:
                    ranges.append((start - begin, values[part][start - first : stop - first]))
            tensors[stored] = Held(tuple(shape), parameter.dtype, parameter.device, ranges)
    return tensors
