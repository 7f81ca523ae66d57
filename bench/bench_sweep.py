"""``sweep`` of 12 settings against what it must at least do: importances, and 12 times subtract and score.

The limit does that on one model in memory and never puts the weights back. The usual way writes a checkpoint
for each setting, loads it and scores it. Ours also scores the model as it is, restores and rounds the weights,
and records every setting.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import perta_fast as pf
from bench.harness.contest import Outcome, alternate, replay, replayed
from bench.harness.tables import Row
from bench.inputs.arrays import timed
from bench.inputs.stream_models import StreamJob, write_stream_job
from perta_fast.data.json_lines import read_data
from perta_fast.data.samples import Sample
from perta_fast.models.loading import load_subject, samples_for
from perta_fast.models.token_scores import score_tokens

GROUP = "sweep: 12 settings"
CONTENDERS = {
    "importance + 12 × (subtract + score)": "limit",
    "12 checkpoints written, loaded and scored": "peer",
    "ours": "ours",
}
RULES, LAMS = ("grad", "fisher"), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
SETTINGS = [(rule, lam) for rule in RULES for lam in LAMS]
SAMPLES, WORDS, BATCH = 32, 32, 16
ROLES = ("forget", "retain")


@pytest.fixture(scope="module")
def job(workspace: Path) -> Iterator[StreamJob]:
    """A Llama of 5 M parameters in bfloat16, run in float32."""
    folder = workspace / "sweep"
    yield write_stream_job(folder, 256, 4, SAMPLES, WORDS)
    shutil.rmtree(folder)


def importances(job: StreamJob) -> dict[str, pf.Importance]:
    """The importances of both data sets, in memory."""
    settings: dict[str, Any] = {"batch_size": BATCH, "dtype": torch.float32, "progress": False}
    return {
        role: pf.estimate_importance(job.folder / "base", job.folder / f"{role}.jsonl", **settings) for role in ROLES
    }


def load(job: StreamJob, path: Path) -> tuple[Any, list[list[Sample]]]:
    """A module and both data sets in its tokens."""
    subject = load_subject(path, None, torch.float32)
    rows = [read_data(job.folder / f"{role}.jsonl")[0] for role in ROLES]
    return subject.module, [samples_for(subject, of_role, None) for of_role in rows]


def score(module: Any, samples: list[list[Sample]]) -> None:
    """Score both sets."""
    for of_role in samples:
        score_tokens(module, of_role, batch_size=BATCH)


def at_least(job: StreamJob) -> None:
    """Subtract and score again and again on one model, whose weights are never put back."""
    found = importances(job)
    module, samples = load(job, job.folder / "model")
    for rule, lam in SETTINGS:
        pf.apply_to_module_(module, job.folder / "base", job.folder / "tuned", *found.values(), rule=rule, lam=lam)
        score(module, samples)


def by_checkpoints(job: StreamJob) -> None:
    """Write, load and score a checkpoint for each setting."""
    places = {role: job.folder / f"{role} importance" for role in ROLES}
    for role, found in importances(job).items():
        found.save(places[role], overwrite=True)
    out = job.folder / "out"
    checkpoints = [job.folder / name for name in ("model", "base", "tuned")]
    for rule, lam in SETTINGS:
        pf.apply(*checkpoints, *places.values(), rule=rule, lam=lam, out=out, overwrite=True, progress=False)
        score(*load(job, out))


def ours(job: StreamJob) -> None:
    """The sweep, with its results kept in a directory."""
    pf.sweep(
        *(job.folder / name for name in ("model", "base", "tuned")),
        *(job.folder / f"{role}.jsonl" for role in ROLES),
        rule=RULES,
        lams=LAMS,
        batch_size=BATCH,
        dtype=torch.float32,
        out=job.folder / "found",
        overwrite=True,
        progress=False,
    )


@pytest.fixture(scope="module")
def outcomes(job: StreamJob, rounds: int) -> Mapping[str, Outcome]:
    """All contenders."""
    works = dict(zip(CONTENDERS, (at_least, by_checkpoints, ours), strict=True))
    return alternate({name: timed(partial(work, job), "cpu") for name, work in works.items()}, rounds)


@replayed
@pytest.mark.parametrize("contender", CONTENDERS)
def bench_sweep(contender: str, outcomes: Mapping[str, Outcome], board: list[Row], benchmark: Any) -> None:
    """One contender on all settings."""
    board.append(replay(benchmark, outcomes[contender], group=GROUP, contender=contender, role=CONTENDERS[contender]))
