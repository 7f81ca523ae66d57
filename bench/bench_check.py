"""What the check of ``unlearn`` adds to a run on a real model: PERTA_BENCH_ROWS rows (400) in each data set.

PERTA_BENCH_SMOL names a checkpoint of SmolLM2-135M-Instruct; without it nothing is measured. The run is the default
one, which searches for lambda. theta_full and theta_f are that model with a little noise, which costs as much as tuned
ones. One run gives both numbers: all its time, and its time without the phase of the check.
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
import torch
from safetensors.torch import load_file, save_file

import perta_fast as pf
from bench.harness.contest import Outcome, Sample, Unavailable, replay, replayed
from bench.harness.tables import Row
from perta_fast.runs.check import PHASE

SMOL, ROWS = os.environ.get("PERTA_BENCH_SMOL", ""), int(os.environ.get("PERTA_BENCH_ROWS", "400"))
GROUP = "check of an unlearning"
CONTENDERS = {"the run without its check": "limit", "the whole run": "ours"}


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


def write_noisy(path: Path, seed: int) -> Path:
    """The model with noise in every parameter."""
    shutil.copytree(SMOL, path)
    generator = torch.Generator().manual_seed(seed)
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        noisy = {
            name: tensor + (1e-4 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
            for name, tensor in tensors.items()
        }
        save_file(noisy, shard, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def outcomes(workspace: Path, rounds: int) -> Iterator[dict[str, Outcome]]:
    """The outcomes by contender; a run needs no warming up."""
    if not SMOL:
        missing = Unavailable("PERTA_BENCH_SMOL names no checkpoint of SmolLM2-135M-Instruct")
        yield dict.fromkeys(CONTENDERS, missing)
        return
    folder = workspace / "check"
    folder.mkdir()
    model, tuned = write_noisy(folder / "model", 1), write_noisy(folder / "tuned", 2)
    data = [write_rows(folder / f"{what}.jsonl", what) for what in ("novel", "poem")]
    without: list[Sample] = []
    whole: list[Sample] = []
    for _ in range(rounds):
        started = time.perf_counter()
        report = pf.unlearn(model, SMOL, tuned, *data, out=folder / "out", overwrite=True, progress=False)
        seconds = time.perf_counter() - started
        whole.append(Sample(seconds))
        without.append(Sample(seconds - report.phases[PHASE]["seconds"]))
    yield dict(zip(CONTENDERS, (without, whole), strict=True))
    shutil.rmtree(folder)


@replayed
@pytest.mark.parametrize("contender", CONTENDERS)
def bench_check(contender: str, outcomes: dict[str, Outcome], board: list[Row], benchmark: Any) -> None:
    """Report one contender; "time / ours" of the limit is 1 less the share of the check."""
    group = f"{GROUP}, SmolLM2-135M, {ROWS} + {ROWS} rows"
    board.append(replay(benchmark, outcomes[contender], group=group, contender=contender, role=CONTENDERS[contender]))
