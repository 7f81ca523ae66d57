"""``perta unlearn --stream``: memory and time by depth, against the model in memory, and with too little memory.

Every run is a whole command in a new process. PERTA_BENCH_STREAM_HIDDEN sets the width of the models (default 1024).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

from bench.harness.contest import Contender, Outcome, Sample, alternate, replay, replayed, run_child
from bench.harness.tables import Row
from bench.inputs.stream_models import StreamJob, write_stream_job

DEPTH = "stream: depth"
AGAINST = "stream: against the model in memory"
BEYOND = "stream: a checkpoint larger than the memory allowed"
LARGE = "stream: layers of a 70 B Llama, cuda"
DEPTHS = (4, 8, 16, 32)
COMPARED = 16  # layers
WAYS = {"perta unlearn --stream": "ours", "perta unlearn": "limit"}
LIMITED = {"perta unlearn --stream, limited": "ours"}
ON_A_GPU = {"two layers, streamed": "ours", "matrix product": "limit"}
SAMPLES, TOKENS = 16, 32
MEMORY = 1536 << 20  # bytes of data that a limited process may have
TIMES_MEMORY = 3
HIDDEN = int(os.environ.get("PERTA_BENCH_STREAM_HIDDEN", "1024"))


def stream_roles(group: str) -> dict[str, str]:
    """Contenders and roles of one of the groups here."""
    depths = {f"{layers} layers": "ours" for layers in DEPTHS}
    return {DEPTH: depths, AGAINST: WAYS, BEYOND: LIMITED, LARGE: ON_A_GPU}[group]


def run(job: StreamJob, folder: Path, *more: str, limit: int | None = None) -> Sample:
    """Run one command. limit: bytes that its heap, stacks and private mappings may take (ulimit -d)."""
    out = folder / "out"
    command = job.command(out, *more)
    if limit is not None:
        command = ["bash", "-c", f'ulimit -d {limit >> 10} && exec "$@"', "bash", *command]
    try:
        return run_child(command)
    finally:
        shutil.rmtree(out, ignore_errors=True)


@pytest.fixture(scope="module")
def jobs(workspace: Path) -> Iterator[dict[int, StreamJob]]:
    """The same model at each depth; under 0 a model of one narrow layer, for the memory that every run takes."""
    folder = workspace / "stream"
    jobs = {0: write_stream_job(folder / "0", 64, 1, SAMPLES, TOKENS)}
    for layers in DEPTHS:
        jobs[layers] = write_stream_job(folder / str(layers), HIDDEN, layers, SAMPLES, TOKENS)
    yield jobs
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def over_depth(jobs: dict[int, StreamJob], workspace: Path, rounds: int) -> dict[str, Outcome]:
    """The outcome of a streamed run at each depth."""

    def streamed(job: StreamJob) -> Contender:
        return lambda: run(job, workspace, "--stream")

    return alternate({f"{layers} layers": streamed(job) for layers, job in jobs.items()}, rounds)


def fit(outcomes: dict[str, Outcome]) -> str:
    """The line through the median times by depth, by least squares, in words."""
    times = [median(sample.seconds for sample in outcomes[f"{layers} layers"]) for layers in DEPTHS]  # type: ignore[union-attr]
    slope, start = np.polyfit(DEPTHS, times, 1)
    error = np.array(times) - (start + slope * np.array(DEPTHS))
    share = 1 - float(error @ error) / float(np.var(times) * len(times))
    return f"time = {start:.2f} s + {slope:.3f} s x layers, R² {share:.4f}"


@replayed
@pytest.mark.parametrize("layers", DEPTHS)
def bench_depth(
    layers: int, jobs: dict[int, StreamJob], over_depth: dict[str, Outcome], board: list[Row], benchmark: Any
) -> None:
    """Report one depth: peak memory must be that of one layer at any depth, and time grow in proportion to it."""
    outcome, least = over_depth[f"{layers} layers"], over_depth["0 layers"]
    note = ""
    if isinstance(outcome, list) and isinstance(least, list):
        above = max(s.seen["peak_anonymous"] for s in outcome) - max(s.seen["peak_anonymous"] for s in least)
        layer = jobs[layers].layer_parameters * (2 + 2 * 4 + 4)  # weights, two float32 sums, the task vector
        note = f"{above / 1e6:.0f} MB above a run on a tiny model, {above / layer:.2f} times one layer's arrays"
        if layers == DEPTHS[-1]:
            note += f"; {fit(over_depth)}"
    board.append(replay(benchmark, outcome, group=DEPTH, contender=f"{layers} layers", role="ours", note=note))


@pytest.fixture(scope="module")
def against(jobs: dict[int, StreamJob], workspace: Path, rounds: int) -> dict[str, Outcome]:
    """The outcomes of streamed runs and runs in memory, measured in alternation."""

    def measured(*more: str) -> Contender:
        return lambda: run(jobs[COMPARED], workspace, *more)

    ways = {"perta unlearn --stream": measured("--stream"), "perta unlearn": measured()}
    return alternate(ways, rounds)


@replayed
@pytest.mark.parametrize("way", WAYS)
def bench_against(way: str, against: dict[str, Outcome], board: list[Row], benchmark: Any) -> None:
    """Report a way to the same result; without --stream, the model and both importances are in memory."""
    board.append(replay(benchmark, against[way], group=AGAINST, contender=way, role=WAYS[way]))


@replayed
def bench_beyond(workspace: Path, board: list[Row], benchmark: Any) -> None:
    """Report one run under a limit of memory with which the same command without --stream fails."""
    hidden = 2 * HIDDEN
    layer = (4 + 3 * 11 / 4) * hidden**2 * 2  # bytes
    folder = workspace / "beyond"
    job = write_stream_job(folder, hidden, int(TIMES_MEMORY * MEMORY / layer) + 1, 4, TOKENS)
    assert job.size >= TIMES_MEMORY * MEMORY
    try:
        # The limit also counts memory that is reserved and not used, so --memory is less.
        samples = [run(job, workspace, "--stream", "--memory", str(MEMORY * 4 // 5), limit=MEMORY)]
        with pytest.raises(RuntimeError, match="exit status"):
            run(job, workspace, limit=MEMORY)
    finally:
        shutil.rmtree(folder)
    note = (
        f"{job.layers} layers, {job.size / 1e9:.1f} GB a checkpoint, {MEMORY / 1e9:.2f} GB allowed; "
        "without --stream the same limit ends the run"
    )
    (name,) = LIMITED
    board.append(replay(benchmark, samples, group=BEYOND, contender=name, role="ours", note=note))


@pytest.fixture(scope="module")
def large_layers(device: str, workspace: Path, rounds: int) -> dict[str, Outcome]:
    """The outcomes of two streamed layers of a 70 B Llama on a GPU, and of a matrix product of its width."""
    if device != "cuda":
        pytest.skip("measured with --bench-device cuda")
    folder, tokens, layers = workspace / "large", 512, 2
    shape = {"intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    job = write_stream_job(folder, 8192, layers, SAMPLES, tokens, drawn_on=device, **shape)

    def streamed() -> Sample:
        run_child(job.command(folder / "out", "--stream", "--device", "cuda"))
        report = json.loads((folder / "out" / "perta_report.json").read_text())
        seen = {"peak_device": report["memory"]["peak_device_bytes"], "tokens": 2 * SAMPLES * tokens}
        # 2 FLOPs per weight and token, four times: forward, forward again, and two products backward.
        flops = 8 * layers * job.layer_parameters * seen["tokens"]
        return Sample(report["overlap"]["compute_seconds"], {**seen, "flops": flops})

    def product() -> Sample:
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        a @ b
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            a @ b
        torch.cuda.synchronize()
        return Sample(time.perf_counter() - start, {"flops": 20 * 2 * 8192**3})

    try:
        return alternate({"two layers, streamed": streamed, "matrix product": product}, rounds)
    finally:
        shutil.rmtree(folder)


@replayed
@pytest.mark.parametrize("contender", ON_A_GPU)
def bench_large_layers(contender: str, large_layers: dict[str, Outcome], board: list[Row], benchmark: Any) -> None:
    """Report the seconds in which the walk computes, against a product of large matrices."""
    outcome, note = large_layers[contender], ""
    if isinstance(outcome, list) and "tokens" in outcome[0].seen:
        rate = median(sample.seen["tokens"] / sample.seconds for sample in outcome)
        peak = max(sample.seen["peak_device"] for sample in outcome)
        note = f"{rate:.0f} tokens/s, {peak / 1e9:.1f} GB of device memory at most"
    role = ON_A_GPU[contender]
    board.append(replay(benchmark, outcome, group=LARGE, contender=contender, role=role, note=note))
