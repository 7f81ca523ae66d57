"""Copies arrays to an accelerator, through pinned buffers, while it works on the arrays before them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes, as torch's own allocations on a device


@dataclass(frozen=True)
class _Slot:
    """One half of the double buffer."""

    host: Tensor
    device: Tensor
    copied: Any  # event: the device buffer holds what the host buffer held
    used: Any  # event: nothing reads the device buffer any more


class Staging:
    """Two slots that are filled in turn: a pinned buffer on the host and one on the device.

    While a kernel works on one chunk, the next one is copied on a second stream, and the host reads the one after it.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        """size: bytes of a chunk, each of its arrays rounded up to ``ALIGNMENT``."""
        self._device = device
        self._runtime = torch.get_device_module(device)
        self._stream = self._runtime.Stream(device)
        # Work on the current stream may still use the memory of the new device buffers.
        self._stream.wait_stream(self._runtime.current_stream(device))
        self._slots = cycle([self._slot(size) for _ in range(2)])

    def _slot(self, size: int) -> _Slot:
        return _Slot(
            host=torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type != "cpu"),
            device=torch.empty(size, dtype=torch.uint8, device=self._device),
            copied=self._runtime.Event(),
            used=self._runtime.Event(),
        )

    @contextmanager
    def on_device(self, chunk: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield the arrays on the device, for use inside the block, on the current stream.

        chunk: one-dimensional arrays, which may be changed once the block is entered; arrays that are on the device
        already are passed through.
        """
        slot = next(self._slots)
        slot.copied.synchronize()  # before the host buffer is written again
        arrays, end = [], 0
        for array in chunk:
            if array.device == self._device:
                arrays.append(array)
                continue
            part = slice(end, end + array.nbytes)
            slot.host[part].view(array.dtype).copy_(array)
            arrays.append(slot.device[part].view(array.dtype))
            end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        with self._runtime.stream(self._stream):
            self._stream.wait_event(slot.used)
            slot.device[:end].copy_(slot.host[:end], non_blocking=True)
            slot.copied.record(self._stream)
        current = self._runtime.current_stream(self._device)
        current.wait_event(slot.copied)
        yield arrays
        slot.used.record(current)
