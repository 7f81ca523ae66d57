"""The subtraction on chunks of files: read by position, computed, handed on; nothing is written here.

Memory is a few buffers of one chunk a thread, whatever the size of a tensor. Reads by position cost as much as
mapped ones with the files in the page cache, and less than half where they are not (bench/bench_reading.py);
and a file that shrinks or a disk that fails is then an error with a name instead of a signal. Torch is not
imported.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from perta_fast import compiled
from perta_fast.checkpoints.adapters import LowRank, Matrix
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.dtypes import ITEM_SIZES, KERNEL_CODES
from perta_fast.errors import InputError, NotFiniteError
from perta_fast.files.reading import PositionReader
from perta_fast.rules import Rescaling
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.matching import TensorMatch

CHUNK = 1 << 18  # elements
_OPERANDS = 5  # theta, theta_f, theta_0, and the importances
_FORGET_IMPORTANCE = 3
_WIDEST = 4  # bytes of an element
_BUFFERS = 192 << 20  # bytes that all threads together may take


@dataclass(frozen=True)
class Chunk:
    """Elements [begin, begin + count) of the tensor of ``matches[index]``."""

    index: int
    begin: int
    count: int


Statistics = dict[str, float]
Store = Callable[[Chunk, memoryview, Statistics], None]


def chunks_of(matches: Iterable[tuple[int, TensorMatch]], size: int) -> Iterator[Chunk]:
    """Cut tensors, given with their numbers, into chunks of at most ``size`` elements, in order."""
    for index, match in matches:
        for begin in range(0, match.theta.count, size):
            yield Chunk(index, begin, min(size, match.theta.count - begin))


def chunk_elements(threads: int) -> int:
    """Elements of a chunk such that the buffers of all threads stay within bounds."""
    fitting = _BUFFERS // (threads * (_OPERANDS + 1) * _WIDEST)
    return min(CHUNK, max(4096, fitting // 4096 * 4096))


def buffer_bytes(threads: int) -> int:
    """What the buffers of all threads take at most."""
    return threads * chunk_elements(threads) * (_OPERANDS + 1) * _WIDEST


@dataclass
class Subtraction:
    """Computes chunks on several threads.

    drop_cache: give pages back to the system as soon as they were read, so that other files keep theirs.
    held: float32 importances, forget and retain, that are in memory instead of a file, by their match's number.
    """

    sources: Sources
    rescaling: Rescaling
    threads: int
    chunk: int
    drop_cache: bool = False
    held: Mapping[int, "Sequence[np.ndarray[Any, np.dtype[np.float32]]]"] = field(default_factory=dict)

    def run(self, chunks: Iterator[Chunk], store: Store, advance: Callable[[int], object]) -> None:
        """Deal the chunks to the threads in order and hand each result to ``store``, in the thread that has it.

        A chunk of a tensor that is copied has theta's bytes for its result and no statistics. advance: called
        with the bytes of every chunk, read and written. The first error stops all threads and is raised:
        InputError or RunError, naming file and tensor, or what ``store`` raises.
        """
        lock, failed = threading.Lock(), threading.Event()
        factors = _Factors(self.threads)

        def work() -> None:
            try:
                with _Workspace(self, factors) as workspace:
                    while not failed.is_set():
                        with lock:
                            chunk = next(chunks, None)
                        if chunk is None:
                            return
                        data, statistics = workspace.compute(chunk)
                        store(chunk, data, statistics)
                        with lock:
                            advance(bytes_moved(self.sources.matches[chunk.index], chunk.count))
            except BaseException:
                failed.set()
                raise

        with ThreadPoolExecutor(self.threads) as pool:
            futures = [pool.submit(work) for _ in range(self.threads)]
            try:
                for future in futures:
                    future.result()
            except BaseException:  # an interrupt reaches only this thread
                failed.set()
                raise


def bytes_moved(match: TensorMatch, count: int) -> int:
    """Bytes that ``count`` elements of a tensor cost: every operand read once, theta written once."""
    theta = ITEM_SIZES[match.theta.dtype]
    others = (match.tuned, match.base, match.forget_importance, match.retain_importance)
    read = sum(ITEM_SIZES[entry.dtype] for entry in others if entry is not None)
    return count * (2 * theta + read)


class _Factors:
    """The factors of the tensors that the threads are at, read once for all of them."""

    def __init__(self, threads: int) -> None:
        self._most, self._lock = threads, threading.Lock()
        self._read: dict[int, tuple[Matrix, Matrix]] = {}

    def of(self, index: int, update: LowRank) -> tuple[Matrix, Matrix]:
        """Left and right factor for the tensor of ``matches[index]``; tensors come in order."""
        with self._lock:
            if index not in self._read:
                if len(self._read) == self._most:
                    del self._read[next(iter(self._read))]
                self._read[index] = update.factors()
            return self._read[index]


class _Workspace:
    """One thread's buffers and open files."""

    def __init__(self, job: Subtraction, factors: "_Factors") -> None:
        self._job, self._factors = job, factors
        size = job.chunk * max([1, *(ITEM_SIZES[match.theta.dtype] for match in job.sources.matches)])
        self._buffers = [np.empty(max(size, job.chunk * _WIDEST), np.uint8) for _ in range(_OPERANDS + 1)]
        self._open: list[PositionReader | None] = [None] * _OPERANDS

    def __enter__(self) -> "_Workspace":
        return self

    def __exit__(self, *_: object) -> None:
        for place in range(_OPERANDS):
            self._close(place)

    def compute(self, chunk: Chunk) -> tuple[memoryview, Statistics]:
        """Theta's new bytes, valid until the next call, and what the kernel counted."""
        sources = self._job.sources
        match = sources.matches[chunk.index]
        size = chunk.count * ITEM_SIZES[match.theta.dtype]
        if match.copied is not None:
            entry = match.theta
            self._read(0, entry, entry.begin + size // chunk.count * chunk.begin, size)
            return self._buffers[0].data[:size], {}
        addresses, codes = [0] * _OPERANDS, [0] * _OPERANDS  # 0 where there is no such array
        for place, _, entry in sources.operands(match):
            width = ITEM_SIZES[entry.dtype]
            begin = entry.begin + chunk.begin * width
            self._read(place, entry, begin, chunk.count * width)
            addresses[place] = int(self._buffers[place].ctypes.data)
            codes[place] = KERNEL_CODES[entry.dtype]
        for place, array in enumerate(self._job.held.get(chunk.index, ()), _FORGET_IMPORTANCE):
            addresses[place] = int(array[chunk.begin :].ctypes.data)
            codes[place] = KERNEL_CODES["F32"]
        factors = None
        if match.low_rank is not None:
            left, right = self._factors.of(chunk.index, match.low_rank)
            places = int(left.ctypes.data), int(right.ctypes.data)
            factors = (*places, *right.shape, match.low_rank.scale, chunk.begin)
        statistics: Statistics = compiled.kernels().rescaled_subtract(
            int(self._buffers[_OPERANDS].ctypes.data),
            *addresses,
            tuple(codes),
            chunk.count,
            self._job.rescaling,
            1,
            True,
            factors,
        )
        _check_finite(match, statistics)
        return self._buffers[_OPERANDS].data[:size], statistics

    def _read(self, place: int, entry: TensorEntry, begin: int, size: int) -> None:
        reader = self._open[place]
        if reader is None or reader.path != entry.path:
            self._close(place)
            reader = self._open[place] = PositionReader(entry.path)
        buffer = self._buffers[place].data[:size]
        reader.read_into(buffer, begin, f"tensor {entry.name}", drop_cache=self._job.drop_cache)

    def _close(self, place: int) -> None:
        reader = self._open[place]
        if reader is not None:
            reader.close()


def _check_finite(match: TensorMatch, statistics: Statistics) -> None:
    for key, entry in (("nonfinite_forget", match.forget_importance), ("nonfinite_retain", match.retain_importance)):
        if entry is not None and statistics[key]:
            raise InputError(
                f"{entry.path}: tensor {entry.name} has NaN or infinite importance; estimate it again, "
                "in float32 or bfloat16 if the model ran in float16"
            )
    if statistics["nonfinite_out"]:
        raise NotFiniteError(
            f"tensor {match.theta.name}: the result would hold NaN or infinite values; look at this tensor in "
            "model, base and tuned, or use a smaller lambda. Nothing was written"
        )
