"""Two ways to read the subtraction's inputs: by position into buffers, and through mapped files.

Both compute every chunk and write nothing. Warm: the files are in the page cache. Cold: they are evicted from it
before every run, so that the disk is measured too (the host of a virtual machine may still have them in its cache).
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from bench.harness import limits
from bench.harness.conditions import threads
from bench.harness.contest import Contender, Outcome, Sample, alternate, replay, replayed
from bench.harness.tables import Row
from bench.inputs.checkpoints import IMPORTANCES, MERGED, CheckpointSet
from perta_fast import compiled
from perta_fast.dtypes import ITEM_SIZES, KERNEL_CODES
from perta_fast.rules import Rule
from perta_fast.subtraction.compute import CHUNK, Chunk, Subtraction, chunks_of
from perta_fast.subtraction.inputs import Sources, open_importances

RULE = Rule.of("grad", 1.0)
WAYS = {"by position": "ours", "mapped": "reference"}
STATES = ("warm", "cold")


def by_position(sources: Sources) -> None:
    """Do what a run does, without the writing."""
    chunks = chunks_of(enumerate(sources.matches), CHUNK)
    Subtraction(sources, RULE.rescaling, threads(), CHUNK).run(chunks, lambda *_: None, lambda _: None)


def mapped(sources: Sources) -> None:
    """Let the kernel read the mapped files directly, and release the pages that were read."""
    chunks, lock = chunks_of(enumerate(sources.matches), CHUNK), threading.Lock()

    def work() -> None:
        out = np.empty(CHUNK * 4, np.uint8)
        while True:
            with lock:
                chunk = next(chunks, None)
            if chunk is None:
                return
            subtract_mapped(sources, chunk, out)

    with ThreadPoolExecutor(threads()) as pool:
        for future in [pool.submit(work) for _ in range(threads())]:
            future.result()


def subtract_mapped(sources: Sources, chunk: Chunk, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Compute one chunk at the addresses where the files are mapped."""
    ranges = []  # of bytes: file, begin, end; and the code of their type
    for _, checkpoint, entry in sources.operands(sources.matches[chunk.index]):
        width = ITEM_SIZES[entry.dtype]
        begin = entry.begin + chunk.begin * width
        ranges.append((checkpoint.file_of(entry), begin, begin + chunk.count * width, KERNEL_CODES[entry.dtype]))
    compiled.kernels().rescaled_subtract(
        out.ctypes.data,
        *(file.address + begin for file, begin, _, _ in ranges),
        tuple(code for *_, code in ranges),
        chunk.count,
        RULE.rescaling,
        1,
        True,
    )
    for file, begin, end, _ in ranges:
        file.release(begin, end)


@pytest.fixture(scope="module")
def outcomes(checkpoints: CheckpointSet, rounds: int) -> dict[str, dict[str, Outcome]]:
    """The outcomes by state of the files and way of reading."""
    files = [path for name in MERGED + IMPORTANCES for path in checkpoints.files(name)]

    def measured(state: str, way: str) -> Contender:
        def run() -> Sample:
            model, base, tuned, forget, retain = (checkpoints.path(name) for name in MERGED + IMPORTANCES)
            sources = Sources.open(model, base, tuned, open_importances(RULE, forget, retain))
            if state == "cold":
                limits.evict(files)
            start = time.perf_counter()
            (by_position if way == "by position" else mapped)(sources)
            return Sample(time.perf_counter() - start)

        return run

    return {state: alternate({way: measured(state, way) for way in WAYS}, rounds) for state in STATES}


@replayed
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", STATES)
def bench_reading(
    state: str,
    way: str,
    outcomes: dict[str, dict[str, Outcome]],
    checkpoints: CheckpointSet,
    board: list[Row],
    benchmark: Any,
) -> None:
    """Report the time to read and compute everything."""
    moved = sum(checkpoints.size(name) for name in MERGED + IMPORTANCES)
    outcome, group = outcomes[state][way], f"reading: {state} files"
    board.append(replay(benchmark, outcome, group=group, contender=way, role=WAYS[way], bytes=moved))
