"""``sweep`` of 12 settings against the least that it must do: the importances, then 12 times subtract and score.

The limit does this on one model in memory and never restores the weights. The peer writes a checkpoint for each
setting, loads it and scores it. Ours also scores the unchanged model, restores and rounds the weights, and records
every setting.

With PERTA_BENCH_BUILD, the directory of another build of this project, the two builds' whole commands are measured
instead, on a larger model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import perta_fast as pf
from bench.harness.contest import Outcome, Sample, alternate, another_build, replay, replayed, run_child
from bench.harness.tables import Row
from bench.inputs.arrays import timed
from bench.inputs.stream_models import StreamJob, write_stream_job
from perta_fast.data.rows import read_data
from perta_fast.data.samples import Sample as DataSample
from perta_fast.models.loading import load_subject, samples_for
from perta_fast.models.token_scores import score_tokens
from perta_fast.rules import RuleName

GROUP = "sweep: 12 settings"
CONTENDERS = {
    "importance + 12 × (subtract + score)": "limit",
    "12 checkpoints written, loaded and scored": "peer",
    "ours": "ours",
}
RULES: tuple[RuleName, ...] = ("grad", "fisher")
LAMS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
SETTINGS = [(rule, lam) for rule in RULES for lam in LAMS]
SAMPLES, WORDS, BATCH = 32, 32, 16
ROLES = ("forget", "retain")
BUILD = os.environ.get("PERTA_BENCH_BUILD", "")
BUILDS_GROUP = "sweep: 12 settings, beside another build"
BUILDS = {"perta sweep": "ours", "perta sweep, another build": "peer"}
LARGER, FEWER = (1024, 8), 16  # width and layers, 111 M parameters; samples of each set


@pytest.fixture(scope="module")
def job(workspace: Path) -> Iterator[StreamJob]:
    """A Llama of 5 M parameters, stored in bfloat16 and run in float32."""
    folder = workspace / "sweep"
    yield write_stream_job(folder, 256, 4, SAMPLES, WORDS)
    shutil.rmtree(folder)


def importances(job: StreamJob) -> dict[str, pf.Importance]:
    """The importances of both data sets, in memory."""
    settings: dict[str, Any] = {"batch_size": BATCH, "dtype": torch.float32, "progress": False}
    return {
        role: pf.estimate_importance(job.folder / "base", job.folder / f"{role}.jsonl", **settings) for role in ROLES
    }


def load(job: StreamJob, path: Path) -> tuple[Any, list[list[DataSample]]]:
    """Load a checkpoint, and both data sets in its tokens."""
    subject = load_subject(path, None, torch.float32)
    data_sets = [read_data(job.folder / f"{role}.jsonl")[0] for role in ROLES]
    return subject.module, [samples_for(subject, rows, None) for rows in data_sets]


def score(module: Any, data_sets: list[list[DataSample]]) -> None:
    """Score both data sets."""
    for samples in data_sets:
        score_tokens(module, samples, batch_size=BATCH)


def at_least(job: StreamJob) -> None:
    """Subtract and score for every setting on one model, whose weights are never restored."""
    base, tuned = job.folder / "base", job.folder / "tuned"
    pair = importances(job).values()
    module, data_sets = load(job, job.folder / "model")
    for rule, lam in SETTINGS:
        pf.apply_to_module_(module, base, tuned, *pair, rule=rule, lam=lam)
        score(module, data_sets)


def by_checkpoints(job: StreamJob) -> None:
    """Write, load and score a checkpoint for each setting."""
    inputs = [job.folder / name for name in ("model", "base", "tuned")]
    for role, importance in importances(job).items():
        inputs.append(job.folder / f"{role} importance")
        importance.save(inputs[-1], overwrite=True)
    out = job.folder / "out"
    for rule, lam in SETTINGS:
        pf.apply(*inputs, rule=rule, lam=lam, out=out, overwrite=True, progress=False)
        score(*load(job, out))


def ours(job: StreamJob) -> None:
    """Sweep, and write the results into a directory."""
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
    """The outcomes by contender."""
    works = dict(zip(CONTENDERS, (at_least, by_checkpoints, ours), strict=True))
    return alternate({name: timed(partial(work, job), "cpu") for name, work in works.items()}, rounds)


@replayed
@pytest.mark.skipif(bool(BUILD), reason="not beside another build")
@pytest.mark.parametrize("contender", CONTENDERS)
def bench_sweep(contender: str, outcomes: Mapping[str, Outcome], board: list[Row], benchmark: Any) -> None:
    """Report one contender on all settings."""
    board.append(replay(benchmark, outcomes[contender], group=GROUP, contender=contender, role=CONTENDERS[contender]))


@pytest.fixture(scope="module")
def builds(workspace: Path, rounds: int) -> Iterator[Mapping[str, Outcome]]:
    """The outcomes of both builds, whose processes end with the same numbers."""
    folder = workspace / "sweep builds"
    job = write_stream_job(folder, *LARGER, FEWER, WORDS)
    settings = ["--rules", ",".join(RULES), "--lams", ",".join(map(str, LAMS)), "--batch-size", BATCH, "--overwrite"]
    command = job.perta("sweep", *job.inputs(), *settings, "--dtype", "float32", "--out", folder / "found")

    variables = another_build(BUILD)

    def another() -> Sample:
        return run_child(command, variables=variables)

    yield alternate({"perta sweep": lambda: run_child(command), "perta sweep, another build": another}, rounds)
    shutil.rmtree(folder)


@replayed
@pytest.mark.skipif(not BUILD, reason="PERTA_BENCH_BUILD is not set")
@pytest.mark.parametrize("contender", BUILDS)
def bench_builds(contender: str, builds: Mapping[str, Outcome], board: list[Row], benchmark: Any) -> None:
    """Report one build."""
    note = f"111 M parameters, importances estimated, {2 * FEWER} rows of {WORDS} words"
    board.append(
        replay(benchmark, builds[contender], group=BUILDS_GROUP, contender=contender, role=BUILDS[contender], note=note)
    )
