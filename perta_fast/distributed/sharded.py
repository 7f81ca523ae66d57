"""Parameters of a live module that FSDP2 or tensor parallelism has cut up: what this process holds of each.

Plain tensors are held whole.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_distributed(tensor: Tensor) -> bool:
    """Whether processes hold parts of ``tensor``, or replicas of which one is enough."""
    return isinstance(tensor, DTensor)


def held(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``: a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_gradient(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter's gradient, cut up as the parameter is."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        gradient = gradient.redistribute(placements=parameter.placements)  # a sum may be still to be made
    return held(gradient)


def computing_device(module: nn.Module) -> torch.device:
    """Where a module's inputs go: its parameters' device, or that which FSDP2 brings them to."""
    parameter = next(module.parameters())
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device


def sharded_as(parameter: Tensor, own: Tensor) -> Tensor:
    """The whole of which every process holds its ``own``, cut up as ``parameter`` is."""
    if not isinstance(parameter, DTensor):
        return own
    return DTensor.from_local(
        own,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter is held in parts."""
    return any(isinstance(each, FSDPModule) for each in module.modules()) or any(
        isinstance(parameter, DTensor) for parameter in module.parameters()
    )


def reshard_(module: nn.Module) -> None:
    """Have FSDP2 give up the whole parameters that it has left from a forward pass."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def held_ranges(tensor: Tensor) -> Iterator[tuple[int, slice]]:
    """Where the elements that this process holds, in order, lie in the whole tensor: the first, and their run.

    A replica is yielded by each process that holds one.
    """
    shape, begins = _place(tensor)
    whole = tensor.shape
    # The last dimensions are whole, and so is a run of the one before them.
    split = max((k for k in range(len(shape)) if shape[k] != whole[k]), default=0)
    length, strides = math.prod(shape[split:]), [math.prod(whole[k + 1 :]) for k in range(len(shape))]
    if length == 0:
        return
    for number, places in enumerate(product(*map(range, shape[:split]))):
        first = sum(
            (begin + place) * stride
            for begin, place, stride in zip(begins, (*places, *[0] * len(shape)), strides, strict=False)
        )
        yield first, slice(number * length, (number + 1) * length)


def is_first_replica(tensor: Tensor) -> bool:
    """Whether no process with a lower number along the mesh holds the same part."""
    if not isinstance(tensor, DTensor):
        return True
    coordinate: Any = tensor.device_mesh.get_coordinate()
    return all(
        place == 0 for place, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()
    )


def _place(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offsets of the part that is held."""
    if not isinstance(tensor, DTensor):
        return tuple(tensor.shape), (0,) * tensor.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def summed_by_fsdp(module: nn.Module) -> dict[str, tuple[int, float]]:
    """The parameters whose gradients FSDP2 adds up: over how many processes, and what it divides the sums by.

    Torch tells of its divisor, which a user may have set, in no public way.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    found: dict[str, tuple[int, float]] = {}
    for part in module.modules():
        if isinstance(part, FSDPModule):
            state: Any = part._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                mesh = group.mesh_info
                processes = getattr(mesh, "shard_mesh_size", 1) * getattr(mesh, "replicate_mesh_size", 1)
                divisor = float(group.gradient_divide_factor or processes)
                found |= {names[each.sharded_param]: (processes, divisor) for each in group.fsdp_params}
    return found
