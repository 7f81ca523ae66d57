"""Importances in memory as the kernels take them: float32 arrays on the host, made for one tensor after another."""

import threading
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from perta_fast.arrays import FloatArray
from perta_fast.models.layouts import Run, values_of

_KEPT = 2  # tensors whose arrays are kept: at the end of one, some threads begin the next


class HeldArrays(Mapping[int, list[FloatArray]]):
    """The arrays of each tensor that a subtraction changes, by the number of its match; made when they are asked for.

    runs: which elements cover a tensor. stored: the importances, or their ratio, as they are kept. Tensors come in
    order, from any thread. Memory: nothing on a CPU for float32; otherwise that of the arrays of two tensors, and of
    those that threads still hold.
    """

    def __init__(self, runs: Mapping[int, Sequence[Run]], stored: Sequence[Mapping[str, Tensor]]) -> None:
        self._runs, self._stored = runs, stored
        self._made: dict[int, list[FloatArray]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> list[FloatArray]:
        runs = self._runs[index]
        with self._lock:
            if index not in self._made:
                while len(self._made) >= _KEPT:
                    del self._made[next(iter(self._made))]
                self._made[index] = [values_of(runs, tensors).float().cpu().numpy() for tensors in self._stored]
            return self._made[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)
