"""Reads of several files in one call of the kernels, with what is computed from them: by position, hashed in passing.

A chunk needs five arrays. Read, hashed and computed one by one, a thread would take and leave Python's lock a dozen
times for each chunk, and two threads would wait for it as long as they work.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from perta_fast import compiled
from perta_fast.arrays import ByteArray
from perta_fast.files.hashing import HashesInPassing
from perta_fast.files.reading import PositionReader

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Read:
    reader: PositionReader
    begin: int
    target: ByteArray
    what: str
    soon: tuple[int, int]


class ReadBatch:
    """Reads that are noted, then done together.

    hashes: get all bytes that are read. drop_cache: keep what was read out of the page cache.
    """

    def __init__(self, hashes: HashesInPassing, drop_cache: bool = False) -> None:
        self._hashes, self._drop_cache = hashes, drop_cache
        self._reads: list[_Read] = []

    def add(
        self, reader: PositionReader, begin: int, target: ByteArray, what: str, soon: tuple[int, int] = (0, 0)
    ) -> None:
        """Note a read that fills ``target`` from byte ``begin`` on.

        The reader and ``target`` stay as they are until the batch is done. what: the file holds there, for messages.
        soon: begin and number of bytes of this file that will be asked for soon.
        """
        self._reads.append(_Read(reader, begin, target, what, soon))

    def run(self) -> None:
        """Do all that is noted. Raises RunError, with file and ``what``, if it cannot be read or ends too early."""
        self.run_in(compiled.kernels().read_files)

    def run_in(self, call: Callable[[list[tuple[Any, ...]]], _Result]) -> _Result:
        """The result of a call of the kernels that does all that is noted first; raises what ``run`` does."""
        reads, self._reads = self._reads, []
        entries = [self._entry(read) for read in reads]
        failed = compiled.kernels().ReadFailed
        try:
            return call(entries)
        except failed as error:
            number, reason = error.args
            raise reads[number].reader.failure(reads[number].what, os.strerror(reason) if reason else "") from None

    def _entry(self, read: _Read) -> tuple[Any, ...]:
        descriptor, address = read.reader.descriptor(read.what), int(read.target.ctypes.data)
        place = (descriptor, address, read.begin, read.target.size)
        return (*place, *read.soon, self._drop_cache, self._hashes.of(read.reader.path))
