"""The subtraction on chunks of files: read by position and computed; the caller stores the result.

Memory is a few buffers of one chunk for each thread, whatever the size of a tensor. Reads by position cost as much as
mapped ones if the files are in the page cache, and less than half if they are not (bench/bench_reading.py). A file that
shrinks or a disk that fails is then an error with a name, not a signal. Torch is not imported.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

from perta_fast import compiled
from perta_fast.arrays import ByteArray, FloatArray
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.dtypes import ITEM_SIZES, KERNEL_CODES
from perta_fast.errors import InputError, NotFiniteError
from perta_fast.files.hashing import NONE_IN_PASSING, HashesInPassing
from perta_fast.files.read_batch import ReadBatch
from perta_fast.files.reading import PositionReader
from perta_fast.rules import Rescaling
from perta_fast.subtraction.held_inputs import NONE_HELD, HeldInputs
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.matching import TensorMatch

CHUNK = 1 << 18  # elements
_OPERANDS = 5  # theta, theta_f, theta_0, and the importances, or none and their ratio
_TUNED = 1
_WIDEST = 4  # bytes of an element
_BUFFERS = 192 << 20  # bytes that all threads together may take
_MADE = 64 << 20  # bytes of arrays that no file holds, beyond which only those in use are kept


@dataclass(frozen=True)
class Chunk:
    """Elements [begin, begin + count) of the tensor of ``matches[index]``."""

    index: int
    begin: int
    count: int


Statistics = dict[str, float]
Store = Callable[[Chunk, memoryview, Statistics], None]


def chunks_of(matches: Iterable[tuple[int, TensorMatch]], size: int) -> Iterator[Chunk]:
    """Chunks of at most ``size`` elements of numbered matches, in order."""
    for index, match in matches:
        for begin in range(0, match.theta.count, size):
            yield Chunk(index, begin, min(size, match.theta.count - begin))


def chunk_elements(threads: int) -> int:
    """The size of a chunk with which the buffers of all threads take at most ``_BUFFERS``."""
    fitting = _BUFFERS // (threads * (_OPERANDS + 1) * _WIDEST)
    return min(CHUNK, max(4096, fitting // 4096 * 4096))


def buffer_bytes(threads: int) -> int:
    """Bytes of the buffers of all threads, at most."""
    return threads * chunk_elements(threads) * (_OPERANDS + 1) * _WIDEST


@dataclass
class Subtraction:
    """Computes chunks on several threads.

    drop_cache: drop pages from the page cache as soon as they are read, to leave room for other files.
    held: float32 importances, forget and retain, or their ratio alone, that are in memory and not in files, by number
    of the match. hashes: gets all bytes that are read. inputs: stored tensors that are in memory already, and not read;
    made: arrays that no file holds, of an earlier subtraction from the same sources. place: where in memory the
    result of a chunk goes; None, and where it gives None: to a buffer, from which ``store`` takes it. Without it, the
    results are for files, which messages then tell the fate of. merging: the run has no strength to advise.
    """

    sources: Sources
    rescaling: Rescaling
    threads: int
    chunk: int
    drop_cache: bool = False
    held: Mapping[int, Sequence[FloatArray]] = field(default_factory=dict)
    hashes: HashesInPassing = NONE_IN_PASSING
    inputs: HeldInputs = NONE_HELD
    made: "MadeArrays | None" = None
    place: "Callable[[Chunk], ByteArray | None] | None" = None
    merging: bool = False

    def run(self, chunks: Iterator[Chunk], store: Store, advance: Callable[[int], object]) -> None:
        """Compute the chunks in order, on all threads; each thread passes its results to ``store``.

        The result of a chunk that is copied is theta's bytes, without statistics. advance: called with the bytes of
        every chunk, read and written. The first error stops all threads and is raised: InputError or RunError, naming
        file and tensor, or what ``store`` raises.
        """
        lock, failed = threading.Lock(), threading.Event()
        made = self.made or MadeArrays(self.sources, self.threads)

        def work() -> None:
            try:
                with closing(_Workspace(self, made)) as workspace:
                    while not failed.is_set():
                        with lock:
                            chunk = next(chunks, None)
                        if chunk is None:
                            return
                        data, statistics = workspace.compute(chunk)
                        store(chunk, data, statistics)
                        with lock:
                            advance(bytes_moved(self.sources.matches[chunk.index], chunk.count, chunk.begin))
            except BaseException:
                failed.set()
                raise

        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for future in [pool.submit(work) for _ in range(self.threads)]:
                    future.result()
            except BaseException:  # an interrupt reaches only this thread, perhaps when the others have just begun
                failed.set()
                raise


def bytes_moved(match: TensorMatch, count: int, begin: int = 0) -> int:
    """Bytes that ``count`` elements of a tensor from ``begin`` on move: every operand read once, theta written once.

    Of rows that are kept as they are, only theta is read.
    """
    others = (match.tuned, match.base, *match.weighing.values())
    read = sum(ITEM_SIZES[entry.dtype] for entry in others if entry is not None)
    computed = max(0, min(count, match.common - begin))
    return 2 * ITEM_SIZES[match.theta.dtype] * count + read * computed


class MadeArrays:
    """The arrays that are in use now and that no file holds as such, made once for all threads.

    most: how many tensors' arrays are kept.
    """

    def __init__(self, sources: Sources, most: int) -> None:
        self._sources, self._most, self._lock = sources, most, threading.Lock()
        self._cache: dict[int, tuple[FloatArray, ...]] = {}

    def of(self, index: int) -> tuple[FloatArray, ...]:
        """``Sources.made`` for the tensor of ``matches[index]``; tensors come in order."""
        with self._lock:
            if index not in self._cache:
                while self._cache and self._is_full():
                    del self._cache[next(iter(self._cache))]
                self._cache[index] = self._sources.made(self._sources.matches[index])
            return self._cache[index]

    def _is_full(self) -> bool:
        held = sum(array.nbytes for arrays in self._cache.values() for array in arrays)
        return len(self._cache) >= self._most or held > _MADE


class _Workspace:
    """One thread's buffers and open files."""

    def __init__(self, job: Subtraction, made: MadeArrays) -> None:
        self._job, self._made = job, made
        self._width = max([_WIDEST, *(ITEM_SIZES[match.theta.dtype] for match in job.sources.matches)])
        self._buffers: dict[int, ByteArray] = {}  # by operand; the last one is for results
        self._readers: dict[int, PositionReader] = {}  # by operand
        self._batch = ReadBatch(job.hashes, job.drop_cache)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def compute(self, chunk: Chunk) -> tuple[memoryview, Statistics]:
        """Theta's new bytes, valid until the next call, and the kernel's statistics."""
        sources = self._job.sources
        match = sources.matches[chunk.index]
        theta = self._read(0, match.theta, chunk)
        whole, chunk = chunk, Chunk(chunk.index, chunk.begin, min(chunk.count, match.common - chunk.begin))
        if match.copied is not None or (chunk.count <= 0 < whole.count):
            self._batch.run()
            return self._placed(whole, theta).data, {}
        addresses, codes = [0] * _OPERANDS, [0] * _OPERANDS  # 0: there is no such array
        for operand, _, entry in sources.operands(match):
            data = self._read(operand, entry, chunk) if operand else theta
            addresses[operand] = int(data.ctypes.data)
            codes[operand] = KERNEL_CODES[entry.dtype]
        held = self._job.held.get(chunk.index, ())
        for operand, array in enumerate(held, _OPERANDS - len(held)):  # the last ones, as in the kernels
            addresses[operand] = int(array[chunk.begin :].ctypes.data)
            codes[operand] = KERNEL_CODES["F32"]
        factors = None
        arrays = self._made.of(chunk.index) if match.low_rank is not None or match.merged is not None else ()
        if match.merged is not None:
            addresses[_TUNED], codes[_TUNED] = int(arrays[0][chunk.begin :].ctypes.data), KERNEL_CODES["F32"]
        if match.low_rank is not None:
            left, right = arrays
            pointers = int(left.ctypes.data), int(right.ctypes.data)
            factors = (*pointers, *right.shape, match.low_rank.scale, chunk.begin)
        placed = self._place(whole)
        result = self._buffer(_OPERANDS) if placed is None else placed
        operands = (int(result.ctypes.data), *addresses, tuple(codes), chunk.count)
        settings = (self._job.rescaling, 1, True, factors)
        statistics: Statistics = self._batch.run_in(
            lambda reads: compiled.kernels().rescaled_subtract(*operands, *settings, reads)
        )
        _check_finite(match, statistics, self._job)
        width = ITEM_SIZES[match.theta.dtype]
        result[chunk.count * width : whole.count * width] = theta[chunk.count * width :]  # rows that are kept
        return result.data[: whole.count * width], statistics

    def _placed(self, chunk: Chunk, theta: ByteArray) -> ByteArray:
        """Theta where the result is to lie, or as it is."""
        result = self._place(chunk)
        if result is None:
            return theta
        result[:] = theta
        return result

    def _place(self, chunk: Chunk) -> "ByteArray | None":
        return None if self._job.place is None else self._job.place(chunk)

    def _read(self, operand: int, entry: TensorEntry, chunk: Chunk) -> ByteArray:
        """The bytes of a chunk of a tensor: held ones, or copied or, with the next batch, read into a buffer."""
        inputs, parts = self._job.inputs, list(entry.elements(chunk.begin, chunk.count))
        if len(parts) == 1 and (held := inputs.find(parts[0])) is not None:
            return held
        data = self._buffer(operand)[: chunk.count * ITEM_SIZES[entry.dtype]]
        remaining = data
        for stored in parts:
            if (held := inputs.find(stored)) is not None:
                remaining[: stored.size] = held
            else:
                self._note(remaining[: stored.size], operand, stored)
            remaining = remaining[stored.size :]
        return data

    def _buffer(self, operand: int) -> ByteArray:
        import numpy as np

        if operand not in self._buffers:
            self._buffers[operand] = np.empty(self._job.chunk * self._width, np.uint8)
        return self._buffers[operand]

    def _note(self, target: ByteArray, operand: int, stored: TensorEntry) -> None:
        """Have the next batch read a flat entry from its file."""
        reader = self._readers.get(operand)
        if reader is None or reader.path != stored.path:
            if reader is not None:
                self._batch.run()  # what is noted of the file that is closed now
                reader.close()
            reader = self._readers[operand] = PositionReader(stored.path)
        # The other threads are at the chunks that follow. The disk fetches those after them, while this one is hashed
        # and computed: cold files are read 1.3 times as fast.
        threads = self._job.threads
        soon = (stored.end + (threads - 1) * stored.size, threads * stored.size)
        self._batch.add(reader, stored.begin, target, f"tensor {stored.name}", soon)


def _check_finite(match: TensorMatch, statistics: Statistics, job: Subtraction) -> None:
    for key, entry in (("nonfinite_forget", match.forget_importance), ("nonfinite_retain", match.retain_importance)):
        if entry is not None and statistics[key]:
            raise InputError(
                f"{entry.path}: tensor {entry.name} has NaN or infinite importance; estimate it again, "
                "in float32 or bfloat16 if the model ran in float16"
            )
    if match.ratio is not None and statistics["invalid_ratio"]:
        raise InputError(
            f"{match.ratio.path}: tensor {match.ratio.name} has a ratio that is NaN or less than 0; make it again from "
            "both importances"
        )
    if statistics["nonfinite_out"]:
        name = match.theta.name
        advice = (
            "look at this tensor in base and tuned"
            if job.merging
            else f"look at this tensor in model, base and tuned, use a smaller lambda, or keep it as the model has it "
            f"with ‹leave› {name}"
        )
        raise NotFiniteError(
            f"tensor {name}: the result would hold NaN or infinite values; {advice}"
            f"{'. Nothing was written' * (job.place is None)}"
        )
