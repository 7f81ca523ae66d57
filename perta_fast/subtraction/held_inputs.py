"""Stored tensors that several subtractions read, held in memory: each is read from its file once."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from operator import itemgetter
from pathlib import Path

from perta_fast.arrays import ByteArray
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.files.reading import PositionReader

_ALIGNMENT = 64  # bytes: a line of the cache
_WASTE = 2  # a buffer that is this many times too large is given back


class Arena:
    """One buffer for many arrays, used again and again: new memory costs more than to read a file from the cache."""

    def __init__(self) -> None:
        self._buffer: ByteArray | None = None

    def arrays(self, sizes: Iterable[int]) -> Iterator[ByteArray]:
        """An array of each size, in bytes, aligned; they take the place of those that were given out before."""
        import numpy as np

        rounded = [(size, -(-size // _ALIGNMENT) * _ALIGNMENT) for size in sizes]
        needed = sum(room for _, room in rounded) + _ALIGNMENT
        if self._buffer is None or not needed <= self._buffer.size <= _WASTE * needed:
            self._buffer = None  # before the new one is made
            self._buffer = np.empty(needed, np.uint8)
        buffer = self._buffer
        begin = -buffer.ctypes.data % _ALIGNMENT
        for size, room in rounded:
            yield buffer[begin : begin + size]
            begin += room


class HeldInputs:
    """Holds the tensors that were asked for last."""

    def __init__(self) -> None:
        self._arena = Arena()
        self._held: dict[Path, list[tuple[int, ByteArray]]] = {}  # in each file, by the first byte, in order

    def hold(self, entries: Iterable[TensorEntry], threads: int) -> None:
        """Read these tensors, in place of those that were held before.

        Raises RunError, naming file and tensor, if one cannot be read or its file has become shorter.
        """
        stored = _stored(entries)
        self._held = {}
        arrays = list(self._arena.arrays(entry.size for entry in stored))
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_read, stored, arrays))
        for entry, array in zip(stored, arrays, strict=True):
            self._held.setdefault(entry.path, []).append((entry.begin, array))

    def find(self, stored: TensorEntry) -> "ByteArray | None":
        """The bytes of a flat entry; None if they are not held."""
        held = self._held.get(stored.path)
        if held is None:
            return None
        begin, array = held[max(0, bisect_right(held, stored.begin, key=itemgetter(0)) - 1)]
        first = stored.begin - begin
        return array[first : first + stored.size] if first >= 0 and first + stored.size <= array.size else None


NONE_HELD = HeldInputs()


def fetch(entries: Iterable[TensorEntry]) -> None:
    """Have the system begin to read these tensors into the page cache; without an error if it cannot."""
    for entry in _stored(entries):
        with suppress(OSError), closing(PositionReader(entry.path)) as reader:
            reader.fetch(entry.begin, entry.size)


def _stored(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """The tensors as they are stored, in the order of their files, without repetition."""
    plain = (piece for entry in entries for piece in entry.pieces or (entry,))
    by_place = {(piece.path, piece.begin): piece for piece in plain}
    return [by_place[place] for place in sorted(by_place)]


def _read(entry: TensorEntry, array: ByteArray) -> None:
    with closing(PositionReader(entry.path)) as reader:
        reader.read_into(array.data, entry.begin, f"tensor {entry.name}")
