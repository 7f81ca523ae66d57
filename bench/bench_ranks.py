"""Importance by two processes of one thread each against one process of two threads, on the same two cores.

All processes have started and made their model before anything is timed. The data is small, 32 samples of 128
tokens. With more data the sums over ranks still take the same time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.harness.contest import ROOT, Contender, Outcome, Sample, alternate, replay, replayed
from bench.harness.tables import Row

ESTIMATORS = ("grad", "empirical-fisher")
ONE, TWO = "one process, 2 threads", "two processes, 1 thread each"
RANK_ROLES = {ONE: "reference", TWO: "ours"}
OVER_PROCESSES = "importance over processes"


def start(world: int, threads: int, store: Path, estimator: str) -> list[subprocess.Popen[str]]:
    """Start the processes of one contender and wait until they are ready."""
    settings = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "bench.inputs.rank_job"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(store), estimator],
            cwd=ROOT,
            env=settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline().strip() == str(threads)
    return ranks


def timed(ranks: list[subprocess.Popen[str]]) -> Contender:
    """A contender that measures the time in which all ranks estimate once."""

    def measure() -> Sample:
        begin = time.perf_counter()
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write("again\n")
            rank.stdin.flush()
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "done\n"
        return Sample(time.perf_counter() - begin)

    return measure


@pytest.fixture(scope="module")
def outcomes(rounds: int) -> Iterator[dict[str, dict[str, Outcome]]]:
    """The outcomes by estimator and contender, measured in alternation."""
    outcomes = {}
    for estimator in ESTIMATORS:
        with tempfile.TemporaryDirectory() as folder:
            one = start(1, 2, Path(folder), estimator)
            two = start(2, 1, Path(folder, "store"), estimator)
            try:
                outcomes[estimator] = alternate({ONE: timed(one), TWO: timed(two)}, rounds)
            finally:
                for process in (*one, *two):
                    process.kill()
                    process.wait()
    yield outcomes


@replayed
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("contender", RANK_ROLES)
def bench_ranks(
    estimator: str, contender: str, outcomes: dict[str, dict[str, Outcome]], board: list[Row], benchmark: Any
) -> None:
    """Report the wall time of one estimate."""
    row = replay(
        benchmark,
        outcomes[estimator][contender],
        group=f"{OVER_PROCESSES}: {estimator}",
        contender=contender,
        role=RANK_ROLES[contender],
    )
    board.append(row)
