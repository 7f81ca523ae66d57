"""BLAKE3 hashes of files: of whole ones, many at a time, and of those whose bytes a run reads or writes anyway."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from blake3 import blake3

from perta_fast import compiled
from perta_fast.errors import RunError
from perta_fast.files.reading import PositionReader, drop_pages, regular_file

_STEP = 8 << 20  # bytes read at a time, and so the memory that one file takes

Advance = Callable[[int], object]


def hash_file(path: Path, advance: Advance | None = None, drop_cache: bool = False) -> str:
    """BLAKE3 of a file as 64 hexadecimal digits, as the command ``b3sum`` prints it.

    advance: called with the number of bytes after each read. drop_cache: keep the file out of the page cache.
    Raises RunError if the file cannot be read.
    """
    digest = blake3()
    done = 0
    try:
        with open(path, "rb", buffering=0, opener=regular_file) as file:
            buffer = memoryview(bytearray(min(_STEP, os.fstat(file.fileno()).st_size + 1)))  # + 1: it may grow
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                if drop_cache:  # not the pages that the system has read ahead
                    drop_pages(file.fileno(), done, count)
                done += count
                if advance is not None:
                    advance(count)
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


class _Rest(NamedTuple):
    """Bytes of a file that were not read for anything else."""

    path: Path
    begin: int
    size: int


class HashesInPassing:
    """The same hashes, of files whose bytes a run reads or writes anyway: in any order, on any thread.

    sizes: of the files. The bytes of other files are passed over.
    """

    def __init__(self, sizes: Mapping[Path, int] = MappingProxyType({})) -> None:
        self._sizes = dict(sizes)
        self._hashes: dict[Path, Any] = {path: compiled.kernels().FileHash(size) for path, size in sizes.items()}

    def __contains__(self, path: Path) -> bool:
        return path in self._hashes

    def of(self, path: Path) -> Any | None:
        """The kernels' hash of a file; None if it is passed over."""
        return self._hashes.get(path)

    def add(self, path: Path, begin: int, data: memoryview) -> None:
        """Hash the bytes that lie in the file from byte ``begin`` on; those that were added before are passed over."""
        import numpy as np

        if path in self._hashes:
            array = np.frombuffer(data, np.uint8)
            self._hashes[path].add(array.ctypes.data, begin, array.size)

    def rest(self, path: Path) -> Iterator[_Rest]:
        """What was not added yet, in pieces of ``_STEP`` bytes at most."""
        for begin, end in self._hashes[path].missing():
            for first in range(begin, end, _STEP):
                yield _Rest(path, first, min(_STEP, end - first))

    def read(self, rest: _Rest, advance: Advance | None = None, drop_cache: bool = False) -> None:
        """Read and add bytes. Raises RunError if they cannot be read."""
        buffer = memoryview(bytearray(rest.size))
        reader = PositionReader(rest.path)
        try:
            reader.read_into(buffer, rest.begin, "what is only hashed", drop_cache=drop_cache)
        finally:
            reader.close()
        self.add(rest.path, rest.begin, buffer)
        if advance is not None:
            advance(rest.size)

    def digest(self, path: Path) -> str:
        """The hash of a file of which all bytes were added."""
        digest: bytes = self._hashes[path].digest()
        return digest.hex()

    def check_size(self, path: Path) -> None:
        """Raise RunError if a file is not as long as it was."""
        if path.stat().st_size != self._sizes[path]:
            raise RunError(f"{path}: has changed its size during the run")


NONE_IN_PASSING = HashesInPassing()


def bytes_to_read(path: Path, passing: HashesInPassing) -> int:
    """How many bytes of a file ``hash_files`` reads."""
    return sum(rest.size for rest in passing.rest(path)) if path in passing else path.stat().st_size


def hash_files(
    paths: Iterable[Path],
    threads: int,
    advance: Advance | None = None,
    drop_cache: bool = False,
    passing: HashesInPassing = NONE_IN_PASSING,
) -> dict[Path, str]:
    """``hash_file`` of each file, on ``threads`` threads. Of files in ``passing``, only the rest is read."""
    unique = list(dict.fromkeys(paths))
    others = [path for path in unique if path not in passing]
    rest = [piece for path in unique if path in passing for piece in passing.rest(path)]
    with ThreadPoolExecutor(threads) as pool:
        whole = pool.map(lambda path: hash_file(path, advance, drop_cache), others)
        for _ in pool.map(lambda piece: passing.read(piece, advance, drop_cache), rest):
            pass
        hashes = dict(zip(others, whole, strict=True))
    for path in unique:
        if path in passing:
            passing.check_size(path)
            hashes[path] = passing.digest(path)
    return {path: hashes[path] for path in unique}
