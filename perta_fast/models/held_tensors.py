"""A live module's parameters as its checkpoint stores them, and what this process holds of each: its values."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perta_fast.distributed.sharded import held, runs
from perta_fast.models.stored_names import stored_places


@dataclass(frozen=True)
class Held:
    """One stored tensor. pieces: flat views of the values, each with the number of its first in the whole."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    pieces: list[tuple[int, Tensor]]


def held_tensors(module: nn.Module) -> dict[str, Held]:
    """The floating-point parameters by their stored names, tied ones once; sharded ones come in pieces.

    All must be contiguous and in memory. Raises InputError for one whose parts are stored in another order.
    """
    found = {}
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            continue
        own = held(parameter.detach()).view(-1)
        places = list(runs(parameter.detach()))
        for stored, (begin, shape) in stored_places(module, name, parameter.shape).items():
            end = begin + shape.numel()
            pieces = []
            for first, run in places:
                start, stop = max(first, begin), min(first + run.stop - run.start, end)
                if start < stop:
                    pieces.append((start - begin, own[run][start - first : stop - first]))
            found[stored] = Held(tuple(shape), parameter.dtype, parameter.device, pieces)
    return found
