"""BLAKE3 of bytes in memory on one thread: ours, in pieces of any order, beside the package blake3, in order.

Pieces are as long as the chunks that ``perta apply`` reads. GB/s count every byte once.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from bench.harness.contest import Outcome, alternate, replay, replayed
from bench.harness.tables import Row
from bench.inputs.arrays import timed
from perta_fast.files.hashing import HashesInPassing

GROUP = "hash, one thread"
SIZE, PIECE = (256 << 20) + 1000, 512 << 10  # bytes
CONTENDERS = {"pieces in any order": "ours", "blake3, in order": "peer"}


@pytest.fixture(scope="module")
def outcomes(rounds: int) -> dict[str, Outcome]:
    """Measure both on the same bytes."""
    data, path = memoryview(np.random.default_rng(0).bytes(SIZE)), Path("file")
    begins = list(range(0, SIZE, PIECE))
    random.Random(0).shuffle(begins)

    def ours() -> str:
        passing = HashesInPassing({path: SIZE})
        for begin in begins:
            passing.add(path, begin, data[begin : begin + PIECE])
        return passing.digest(path)

    def theirs() -> str:
        digest = blake3()
        for begin in range(0, SIZE, PIECE):
            digest.update(data[begin : begin + PIECE])
        return digest.hexdigest()

    assert ours() == theirs()
    return alternate({"pieces in any order": timed(ours, "cpu"), "blake3, in order": timed(theirs, "cpu")}, rounds)


@replayed
@pytest.mark.parametrize("contender", CONTENDERS)
def bench_hash(contender: str, outcomes: dict[str, Outcome], board: list[Row], benchmark: Any) -> None:
    """Report one of them."""
    role = CONTENDERS[contender]
    board.append(replay(benchmark, outcomes[contender], group=GROUP, contender=contender, role=role, bytes=SIZE))
