"""The `grad` estimator against the backward passes of a training step over the same batches.

Those passes are the limit: an estimate needs all of them. Times are measured in this process, in alternation. Peak
memory is measured in a new process that runs a contender once.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from bench.harness.contest import Contender, Outcome, Sample, alternate, replay, replayed, run_child
from bench.harness.tables import Row
from bench.inputs.importance_job import JOBS, ROLES, make_model, make_tokens

GROUP = "importance: grad against a training backward"


@pytest.fixture(scope="module")
def outcomes(rounds: int) -> dict[str, Outcome]:
    """The outcomes by contender, measured in one alternation."""
    model, tokens = make_model(), make_tokens()

    def timed(name: str) -> Contender:
        def measure() -> Sample:
            start = time.perf_counter()
            JOBS[name](model, tokens)
            seconds = time.perf_counter() - start
            model.zero_grad(set_to_none=True)
            return Sample(seconds)

        return measure

    return alternate({name: timed(name) for name in JOBS}, rounds)


def peaks(contender: str) -> dict[str, float]:
    """Peak memory of one run in a new process, in bytes."""
    seen = run_child([sys.executable, "-m", "bench.inputs.importance_job", contender]).seen
    return {name: seen[name] for name in ("peak_rss", "peak_anonymous") if name in seen}


@replayed
@pytest.mark.parametrize("contender", JOBS)
def bench_importance(contender: str, outcomes: dict[str, Outcome], board: list[Row], benchmark: Any) -> None:
    """Report wall time and peak memory of one estimate over 32 samples of 128 tokens."""
    row = replay(
        benchmark, outcomes[contender], group=GROUP, contender=contender, role=ROLES[contender], **peaks(contender)
    )
    board.append(row)
