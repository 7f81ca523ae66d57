"""12 settings of a checkpoint larger than the memory allowed: one walk, against a checkpoint written for each.

The peer applies each setting to the disk and evaluates what came out, layer by layer, with the same rows. The limit
reads all inputs once and multiplies as many numbers as 12 forward passes do, at the speed of one linear map of the
model's width, in the type that the model runs in. ``perta unlearn --stream`` is there for its memory. All files are
evicted from the page cache before every run. PERTA_BENCH_CHOOSE_LAYERS and PERTA_BENCH_STREAM_HIDDEN set the size of
the model.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear
from transformers import AutoTokenizer

from bench.bench_stream import HIDDEN, MEMORY
from bench.harness import limits
from bench.harness.contest import Outcome, Sample, replay, replayed, run_child
from bench.harness.tables import Row
from bench.inputs.checkpoints import IMPORTANCES, MERGED, write_importances
from bench.inputs.stream_models import StreamJob, write_stream_job
from perta_fast.data.rows import read_data
from perta_fast.models.loading import Subject, samples_for
from perta_fast.models.running_type import running_type
from perta_fast.streaming.model.skeleton import Skeleton

CHOICE = "choose: 12 settings of a checkpoint larger than the memory allowed"
CONTENDERS = {
    "perta sweep --stream": "ours",
    "12 × (perta apply, perta eval --stream)": "peer",
    "inputs read once, products of 12 passes": "limit",
    "perta unlearn --stream": "reference",
}
RULES, LAMS = ("grad", "fisher"), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
LAYERS = int(os.environ.get("PERTA_BENCH_CHOOSE_LAYERS", "48"))
SAMPLES, WORDS = 4, 32
PRODUCTS = 20


@pytest.fixture(scope="module")
def job(workspace: Path) -> Iterator[StreamJob]:
    """Three checkpoints and two importances in bfloat16."""
    folder = workspace / "choose"
    job = write_stream_job(folder, 2 * HIDDEN, LAYERS, SAMPLES, WORDS)
    write_importances(folder, job.shapes, torch.bfloat16)
    yield job
    shutil.rmtree(folder)


def weights(job: StreamJob) -> list[Path]:
    """Every file with tensors."""
    return sorted(job.folder.glob("*/*.safetensors"))


def importances(job: StreamJob) -> list[object]:
    """The options that name the importances."""
    return [word for name in IMPORTANCES for word in (f"--{name.replace('_', '-')}", job.folder / name)]


def limited(job: StreamJob, command: list[str]) -> Sample:
    """Run a command on cold files. Its heap, stacks and private mappings may take ``MEMORY`` bytes (ulimit -d)."""
    limits.evict(weights(job))
    return run_child(["bash", "-c", f'ulimit -d {MEMORY >> 10} && exec "$@"', "bash", *command])


def ours(job: StreamJob) -> Sample:
    """One walk for all settings."""
    chosen = ["--rules", ",".join(RULES), "--lams", ",".join(map(str, LAMS)), "--batch-size", 8]
    inputs = [*job.inputs(), *importances(job)]
    out = job.folder / "swept"
    memory = ["--memory", MEMORY * 4 // 5]
    try:
        return limited(job, job.perta("sweep", "--stream", *inputs, *chosen, *memory, "--out", out, "--overwrite"))
    finally:
        shutil.rmtree(out, ignore_errors=True)


def one_by_one(job: StreamJob) -> Sample:
    """Each setting written, evaluated and removed."""
    three = [word for name in MERGED for word in (f"--{name}", job.folder / name)]
    data = [word for name in ("forget", "retain") for word in (f"--{name}", job.folder / f"{name}.jsonl")]
    out = job.folder / "applied"
    whole = Sample(0.0)
    for rule in RULES:
        for lam in LAMS:
            settings = ["--rule", rule, "--lam", lam, "--out", out]
            try:
                apply = limited(job, job.perta("apply", *three, *importances(job), *settings))
                scores = limited(job, job.perta("eval", "--stream", "--model", out, *data, "--batch-size", 8))
            finally:
                shutil.rmtree(out, ignore_errors=True)
            whole.seconds += apply.seconds + scores.seconds
            for name, value in scores.seen.items():
                whole.seen[name] = max(whole.seen.get(name, 0), value)
    return whole


def floor(job: StreamJob) -> Sample:
    """Read every file once; then the products of 12 forward passes at the speed of one of the model's width."""
    files = weights(job)
    limits.evict(files)
    start = time.perf_counter()
    run_child(["bash", "-c", 'cat "$@" > /dev/null', "bash", *map(str, files)])
    reading = time.perf_counter() - start
    skeleton = Skeleton.open(job.folder / "model", torch.device("cpu"), None)
    subject = Subject(skeleton.model, AutoTokenizer.from_pretrained(job.folder / "model"), "")
    samples = [
        sample
        for name in ("forget", "retain")
        for sample in samples_for(subject, read_data(job.folder / f"{name}.jsonl")[0], None, False)
    ]
    tokens = sum(len(sample.input_ids) for sample in samples)
    parameters = job.size // 2 - 2 * 4096 * 2 * HIDDEN  # without the vocabulary, of which only the head multiplies
    flops = 12 * 2 * tokens * (parameters + 4096 * 2 * HIDDEN)
    width, rows = 2 * HIDDEN, SAMPLES * max(len(sample.input_ids) for sample in samples)  # as in a batch
    dtype = running_type(torch.bfloat16, torch.device("cpu"))
    left, right = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    linear(left, right)  # as a model's maps multiply
    start = time.perf_counter()
    for _ in range(PRODUCTS):
        linear(left, right)
    seconds = (time.perf_counter() - start) / PRODUCTS
    speed = 2 * rows * width * width / seconds
    return Sample(reading + flops / speed, {"reading": reading, "products": flops / speed, "speed": speed})


@pytest.fixture(scope="module")
def outcomes(job: StreamJob) -> dict[str, Outcome]:
    """One round; a run of the peer takes many minutes."""

    def unlearned() -> Sample:
        out = job.folder / "unlearned"
        memory = ["--stream", "--memory", MEMORY * 4 // 5]
        try:
            return limited(job, job.command(out, *memory))
        finally:
            shutil.rmtree(out, ignore_errors=True)

    works = (lambda: ours(job), lambda: one_by_one(job), lambda: floor(job), unlearned)
    outcomes: dict[str, Outcome] = {}
    for name, work in zip(CONTENDERS, works, strict=True):
        try:
            outcomes[name] = [work()]
        except Exception as error:  # the others are measured all the same
            outcomes[name] = error
    return outcomes


@replayed
@pytest.mark.parametrize("contender", CONTENDERS)
def bench_choose(
    contender: str, job: StreamJob, outcomes: dict[str, Outcome], board: list[Row], benchmark: Any
) -> None:
    """Report one contender."""
    outcome, note = outcomes[contender], ""
    if contender == "perta sweep --stream":
        note = (
            f"{LAYERS} layers, {job.size / 1e9:.1f} GB a checkpoint, importances in bfloat16, "
            f"{2 * SAMPLES} rows of {WORDS} words, {MEMORY / 1e9:.2f} GB allowed"
        )
    elif isinstance(outcome, list) and "reading" in outcome[0].seen:
        seen = outcome[0].seen
        note = f"{seen['reading']:.1f} s to read, {seen['products']:.1f} s at {seen['speed'] / 1e9:.0f} GFLOP/s"
    board.append(replay(benchmark, outcome, group=CHOICE, contender=contender, role=CONTENDERS[contender], note=note))
