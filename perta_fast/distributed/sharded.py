"""Parameters of a live module that FSDP2 or tensor parallelism shards: what this process holds of each.

A process holds the whole of a plain tensor.
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
    """Whether processes hold shards or replicas of ``tensor``."""
    return isinstance(tensor, DTensor)


def held(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``: a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_gradient(parameter: Tensor) -> Tensor:
    """The gradient of what this process holds of ``parameter``."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        gradient = gradient.redistribute(placements=parameter.placements)  # which adds up what is not yet summed
    return held(gradient)


def computing_device(module: nn.Module) -> torch.device:
    """The device that a module's inputs go to; FSDP2 may keep the parameters elsewhere."""
    parameter = next(module.parameters())
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device


def sharded_as(parameter: Tensor, values: Tensor) -> Tensor:
    """A tensor sharded like ``parameter``, of which this process holds ``values``."""
    if not isinstance(parameter, DTensor):
        return values
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(values, mesh, placements, run_check=False, shape=shape, stride=stride)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 or tensor parallelism shards the module."""
    return any(isinstance(part, FSDPModule) for part in module.modules()) or any(
        isinstance(parameter, DTensor) for parameter in module.parameters()
    )


def reshard_(module: nn.Module) -> None:
    """Free the whole parameters that FSDP2 keeps after a forward pass."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def held_ranges(tensor: Tensor) -> Iterator[tuple[int, slice]]:
    """The runs of consecutive elements that this process holds, in order.

    Yields the position of a run's first element in the whole tensor, and the run's positions among the held elements.
    """
    whole = shape = tuple(tensor.shape)
    offsets: tuple[int, ...] = (0,) * len(whole)
    if isinstance(tensor, DTensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, offsets = compute_local_shape_and_global_offset(whole, tensor.device_mesh, tensor.placements)
    # A run covers the dimensions from ``split`` on: of these, all but the first are whole.
    split = max((k for k in range(len(whole)) if shape[k] != whole[k]), default=0)
    length = math.prod(shape[split:])
    if length == 0:
        return
    strides = [math.prod(whole[k + 1 :]) for k in range(len(whole))]
    indices = [range(offsets[k], offsets[k] + (shape[k] if k < split else 1)) for k in range(len(whole))]
    for number, index in enumerate(product(*indices)):  # of the first element of each run
        position = sum(i * stride for i, stride in zip(index, strides, strict=True))
        yield position, slice(number * length, (number + 1) * length)


def is_first_replica(tensor: Tensor) -> bool:
    """Whether no process with a lower number in the mesh holds the same elements."""
    if not isinstance(tensor, DTensor):
        return True
    coordinates: Any = tensor.device_mesh.get_coordinate()
    placements = zip(coordinates, tensor.placements, strict=True)
    return all(coordinate == 0 for coordinate, placement in placements if placement.is_replicate())


def summed_by_fsdp(module: nn.Module) -> dict[str, tuple[int, float]]:
    """The parameters whose gradients FSDP2 adds up: over how many processes, and what it divides the sums by.

    A user may have set the divisor; torch has no public way to read it.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    summed: dict[str, tuple[int, float]] = {}
    for part in module.modules():
        if isinstance(part, FSDPModule):
            state: Any = part._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                mesh = group.mesh_info
                processes = getattr(mesh, "shard_mesh_size", 1) * getattr(mesh, "replicate_mesh_size", 1)
                divisor = float(group.gradient_divide_factor or processes)
                summed |= {names[sharded.sharded_param]: (processes, divisor) for sharded in group.fsdp_params}
    return summed
