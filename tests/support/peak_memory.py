"""The peak memory of a process, also where other processes keep the thread that watches it from running."""

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
    """A ``PeakMemory`` that also looks after every operation of torch in this thread."""
    with PeakMemory() as memory, _AfterEveryOperation(memory):
        yield memory
