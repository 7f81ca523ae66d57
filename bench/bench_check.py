"""What the check of ``unlearn`` adds to a run on a real model: PERTA_BENCH_ROWS rows (400) in each data set.

PERTA_BENCH_SMOL names a directory with ``base``, ``model`` and ``tuned``: SmolLM2-135M-Instruct, theta_full and
theta_f, both really tuned, since the search for lambda goes on for long on models that are not. Without it nothing is
measured. Two runs by the default rule: one that searches for lambda, and one that is given it. Each gives both numbers:
all its time, and its time without the check.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import perta_fast as pf
from bench.harness.contest import Outcome, Sample, Unavailable, replay, replayed
from bench.harness.tables import Row
from perta_fast.runs.check_result import PHASE

SMOL, ROWS = os.environ.get("PERTA_BENCH_SMOL", ""), int(os.environ.get("PERTA_BENCH_ROWS", "400"))
GROUP = "check of an unlearning"
CONTENDERS = {"the run without its check": "limit", "the whole run": "ours"}
STRENGTHS: dict[str, float | None] = {"lambda searched for": None, "lambda given": 4.0}


def write_rows(path: Path, what: str) -> Path:
    """Questions and answers of about 60 tokens, as in TOFU."""
    rows = [
        {
            "question": f"What is the {what} of author number {k}, and in which year was it first published?",
            "answer": f"The {what} of author number {k} is called The River of Town {7 * k % 400}, and it was first "
            f"published in the year {1800 + k % 200}, to great praise.",
        }
        for k in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=STRENGTHS)
def strength(request: Any) -> str:
    """Whether lambda is searched for."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def outcomes(strength: str, workspace: Path, rounds: int) -> Iterator[dict[str, Outcome]]:
    """The outcomes by contender; a run needs no warming up."""
    if not SMOL:
        missing = Unavailable("PERTA_BENCH_SMOL names no directory with SmolLM2-135M-Instruct, tuned")
        yield dict.fromkeys(CONTENDERS, missing)
        return
    folder = workspace / "check"
    folder.mkdir()
    model, base, tuned = (Path(SMOL, name) for name in ("model", "base", "tuned"))
    data = [write_rows(folder / f"{what}.jsonl", what) for what in ("novel", "poem")]
    without: list[Sample] = []
    whole: list[Sample] = []
    for _ in range(rounds):
        started = time.perf_counter()
        report = pf.unlearn(
            model, base, tuned, *data, lam=STRENGTHS[strength], out=folder / "out", overwrite=True, progress=False
        )
        seconds = time.perf_counter() - started
        whole.append(Sample(seconds))
        without.append(Sample(seconds - report.phases[PHASE]["seconds"]))
    yield dict(zip(CONTENDERS, (without, whole), strict=True))
    shutil.rmtree(folder)


@replayed
@pytest.mark.parametrize("contender", CONTENDERS)
def bench_check(contender: str, strength: str, outcomes: dict[str, Outcome], board: list[Row], benchmark: Any) -> None:
    """Report one contender; "time / ours" of the limit is 1 less the share of the check."""
    group = f"{GROUP}, SmolLM2-135M, {ROWS} + {ROWS} rows, {strength}"
    board.append(replay(benchmark, outcomes[contender], group=group, contender=contender, role=CONTENDERS[contender]))
