"""How fast this machine multiplies, reads and writes; measured in a second or two."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from perta_fast.dtypes import torch_name
from perta_fast.files.durable import write_fully
from perta_fast.files.reading import drop_pages, read_fully
from perta_fast.memory import format_size
from perta_fast.streaming.forecast.costs import Costs

_SIZE = 64 << 20  # bytes that are read and written
_LONG = 0.1  # seconds for which products are measured


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    flops, double_flops: of matrix products in the model's type, and in float64. read, written: bytes. origin: how they
    were found.
    """

    flops: float
    read: float
    written: float
    origin: str
    double_flops: float = math.inf

    def seconds(self, costs: Costs, overlap: bool) -> float:
        """Seconds of a run: arithmetic and scratch files one after the other; weights and result beside them with
        ``overlap``, else after them."""
        scratch = costs.scratch_moved / 2 / self.read + costs.scratch_moved / 2 / self.written
        inside = costs.flops / self.flops + costs.double_flops / self.double_flops + scratch
        outside = (costs.weights_read + costs.result_read) / self.read + costs.result_written / self.written
        return max(inside, outside) if overlap else inside + outside

    def __str__(self) -> str:
        double = "" if math.isinf(self.double_flops) else f"{self.double_flops / 1e12:.3g} in float64, "
        return (
            f"{self.flops / 1e12:.3g} TFLOP/s, {double}reads {format_size(self.read)}/s, "
            f"writes {format_size(self.written)}/s ({self.origin})"
        )


def measure_rates(
    width: int,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    directory: Path,
    shard: Path | None,
    double: bool = False,
) -> Rates:
    """Multiply (rows, width) by (width, width), write a file in ``directory`` and remove it, read ``shard``.

    shard: None reads the written file back. double: multiply in float64 too. Files are read from the disk and not from
    the page cache, if possible.
    """
    written, read_back = _time_file(directory)
    read = read_back if shard is None else _time_reading(shard)
    what = "the file that was written" if shard is None else shard.name
    return Rates(
        _time_product(width, rows, dtype, device),
        read,
        written,
        f"measured: a product of {min(rows, width)} x {width} x {width} in "
        f"{torch_name(dtype)}, {what}, a file in {directory}",
        _time_product(width, rows, torch.float64, device) if double else math.inf,
    )


def _time_product(width: int, rows: int, dtype: torch.dtype, device: torch.device) -> float:
    rows = min(rows, width)
    right = torch.ones(width, width, dtype=dtype, device=device)
    left = torch.ones(rows, width, dtype=dtype, device=device)

    def product() -> None:
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if _seconds(product) < _LONG:  # the first product is slower, which matters only if products are short
        product()
    count, started = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - started < _LONG:
        product()
        count += 1
    return 2.0 * rows * width * width * count / (time.perf_counter() - started)


def _time_file(directory: Path) -> tuple[float, float]:
    """Bytes a second, written with flushes, and read back."""
    path = directory / f".perta-rate-{os.getpid()}"
    data = bytearray(os.urandom(1 << 20) * (_SIZE >> 20))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:

        def write() -> None:
            write_fully(descriptor, memoryview(data), 0)
            os.fsync(descriptor)

        written = _SIZE / _seconds(write)
        drop_pages(descriptor)
        return written, _SIZE / _seconds(lambda: read_fully(descriptor, memoryview(data), 0))
    finally:
        os.close(descriptor)
        path.unlink()


def _time_reading(shard: Path) -> float:
    size = min(_SIZE, shard.stat().st_size)
    data = bytearray(size)
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        drop_pages(descriptor, 0, size)
        return size / _seconds(lambda: read_fully(descriptor, memoryview(data), 0))
    finally:
        os.close(descriptor)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return max(time.perf_counter() - started, 1e-9)
