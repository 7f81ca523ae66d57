"""The peak memory of a process, measured well even where other processes leave its sampling thread no time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from perta_fast.memory import PeakMemory


class _AfterEveryOperation(TorchDispatchMode):
    def __init__(self, memory: PeakMemory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        result = function(*arguments, **(settings or {}))
        self._memory._sample()
        return result


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """A ``PeakMemory`` that also takes a sample after every operation of torch in this thread."""
    with PeakMemory() as memory, _AfterEveryOperation(memory):
        yield memory
