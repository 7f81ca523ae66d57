"""The fastest that the machine can be: it moves the same bytes and computes nothing.

Files: read every input once with positional reads into reused 1 MiB buffers, and write as many bytes as the output
has. Memory: copy half as many bytes as the operation moves, since a copy moves each byte twice.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path

import torch

CHUNK = 1 << 20
Chunk = tuple[int, int, int]  # file descriptor, offset, length


def chunks(descriptors: Sequence[int], sizes: Sequence[int]) -> Iterator[Chunk]:
    """Cut files, one after another, into chunks of at most 1 MiB."""
    for descriptor, size in zip(descriptors, sizes, strict=True):
        for offset in range(0, size, CHUNK):
            yield descriptor, offset, min(CHUNK, size - offset)


def copy_files(inputs: Sequence[Sequence[Path]], out: Path, *, threads: int, fsync: bool = False) -> float:
    """Read all ``inputs``, write as many bytes as the first of them has into ``out``, and return the seconds it took.

    inputs: sets of files that are read side by side, like model, base, tuned and importances.
    Each thread writes the bytes that it has read.
    """
    out.mkdir(parents=True)
    start = time.perf_counter()
    with ExitStack() as stack:

        def opened(path: Path, flags: int) -> int:
            descriptor = os.open(path, flags, 0o644)
            stack.callback(os.close, descriptor)
            return descriptor

        sizes = [[path.stat().st_size for path in files] for files in inputs]
        readers = [[opened(path, os.O_RDONLY) for path in files] for files in inputs]
        create = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        writers = [opened(out / path.name, create) for path in inputs[0]]
        reads = [chunks(*pair) for pair in zip(readers, sizes, strict=True)]
        work = list(zip_longest(chunks(writers, sizes[0]), *reads))

        def run(first: int) -> None:
            buffer = memoryview(bytearray(CHUNK))
            # Each thread takes 16 consecutive chunks at a time, so that the kernel's read-ahead helps it.
            for begin in range(first * 16, len(work), threads * 16):
                for target, *sources in work[begin : begin + 16]:
                    for source in reversed(sources):  # the model last, as its bytes are written
                        if source is not None:
                            descriptor, offset, length = source
                            os.preadv(descriptor, [buffer[:length]], offset)
                    if target is not None:
                        descriptor, offset, length = target
                        os.pwrite(descriptor, buffer[:length], offset)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, range(threads)))
        if fsync:
            for descriptor in writers:
                os.fsync(descriptor)
    return time.perf_counter() - start


def evict(paths: Sequence[Path]) -> None:
    """Drop the files' clean pages from the page cache, so that the next read goes to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class MemoryCopy:
    """Ways to copy ``moved / 2`` bytes from one buffer to another.

    moved: bytes that the operation which is compared with the copy reads, plus those that it writes.
    """

    def __init__(self, moved: int, *, threads: int, device: str = "cpu") -> None:
        self.size = moved // 2
        self.source = torch.ones(self.size // 4, dtype=torch.float32, device=device)
        self.target = torch.zeros_like(self.source)
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)

    def torch_copy(self) -> None:
        """``Tensor.copy_`` on torch's threads, or on the device."""
        self.target.copy_(self.source)

    def memmove(self) -> None:
        """The C library's memmove, on one thread."""
        ctypes.memmove(self.target.data_ptr(), self.source.data_ptr(), self.source.nbytes)

    def threaded_memmove(self) -> None:
        """The C library's memmove, on every thread for one range of the buffer."""
        share = -(-self.source.nbytes // self.threads) // 64 * 64 + 64

        def move(thread: int) -> None:
            begin = thread * share
            length = min(share, self.source.nbytes - begin)
            if length > 0:
                target, source = self.target.data_ptr(), self.source.data_ptr()
                ctypes.memmove(target + begin, source + begin, length)

        list(self.pool.map(move, range(self.threads)))
