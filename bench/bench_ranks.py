"""Importance by two processes of one thread each against one process of two threads, on the same two cores.

All processes are started and have their model before anything is timed. What more processes cost, the sums over
ranks, is the same however large the data; this is little data, 32 samples of 128 tokens.
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
    """The processes of one contender, ready."""
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
    for each in ranks:
        assert each.stdout is not None
        assert each.stdout.readline().strip() == str(threads)
    return ranks


def timed(ranks: list[subprocess.Popen[str]]) -> Contender:
    """Have all estimate once."""

    def measure() -> Sample:
        begin = time.perf_counter()
        for each in ranks:
            assert each.stdin is not None
            each.stdin.write("again\n")
            each.stdin.flush()
        for each in ranks:
            assert each.stdout is not None
            assert each.stdout.readline() == "done\n"
        return Sample(time.perf_counter() - begin)

    return measure


@pytest.fixture(scope="module")
def outcomes(rounds: int) -> Iterator[dict[str, dict[str, Outcome]]]:
    """Both contenders by estimator, measured in alternation."""
    found = {}
    for estimator in ESTIMATORS:
        with tempfile.TemporaryDirectory() as folder:
            one = start(1, 2, Path(folder), estimator)
            two = start(2, 1, Path(folder, "store"), estimator)
            try:
                found[estimator] = alternate({ONE: timed(one), TWO: timed(two)}, rounds)
            finally:
                for each in (*one, *two):
                    each.kill()
                    each.wait()
    yield found


@replayed
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("contender", RANK_ROLES)
def bench_ranks(
    estimator: str,
    contender: str,
    outcomes: dict[str, dict[str, Outcome]],
    board: list[Row],
    benchmark: Any,
) -> None:
    """Wall time of one estimate."""
    row = replay(
        benchmark,
        outcomes[estimator][contender],
        group=f"{OVER_PROCESSES}: {estimator}",
        contender=contender,
        role=RANK_ROLES[contender],
    )
    board.append(row)
