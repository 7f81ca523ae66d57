"""The device that a kernel runs on: Triton launches on the current one, wherever its arguments are.

Assumes a CUDA device or another accelerator of torch, or the CPU, where kernels are interpreted. Moves no data.
"""

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor


def current_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Make the tensor's device the current one; on the CPU there is nothing to do."""
    if tensor.device.type == "cpu":
        return nullcontext()
    guard: AbstractContextManager[None] = torch.get_device_module(tensor.device).device(tensor.device)
    return guard


def current_stream(device: torch.device) -> Hashable:
    """The stream that a launch on ``device`` goes to."""
    return None if device.type == "cpu" else torch.get_device_module(device).current_stream(device)


def processors(device: torch.device) -> int:
    """How many programs of the largest kind the device runs at once: its multiprocessors."""
    if device.type == "cpu":
        return 1
    count: int = triton.runtime.driver.active.utils.get_device_properties(device.index)["multiprocessor_count"]
    return count
