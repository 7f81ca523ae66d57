"""Contests between operations on arrays in memory: copies as limits, references and our backends."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from math import ceil

import torch

from bench.harness.conditions import threads
from bench.harness.contest import Contender, Outcome, Sample, alternate, unavailable
from bench.harness.limits import MemoryCopy
from perta_fast.ops import available_backends

Work = Callable[[], object]

COPIES = {"cpu": ("torch copy_", "memmove, all threads", "memmove, one thread"), "cuda": ("torch copy_",)}
BACKENDS = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
# On a GPU a kernel alone is too short to measure, so a measurement has several calls: as many as take about
# LONG_ENOUGH seconds, at most MOST_CALLS.
LONG_ENOUGH = 0.2
MOST_CALLS = 10


def roles(device: str) -> dict[str, str]:
    """The contenders of every in-memory benchmark on ``device``, with their roles."""
    return {
        **dict.fromkeys(COPIES[device], "limit"),
        "torch, eager": "reference",
        "torch.compile": "reference",
        **{f"ours, {backend}": "ours" for backend in BACKENDS[device]},
    }


def timed(work: Work, device: str) -> Contender:
    """A contender that measures one call of ``work``, until the device has finished it.

    On a GPU its first run, the warm-up, has two calls: one that builds what is built once, and one that is measured
    and says of how many calls each later run is the mean.
    """
    calls = 0 if device == "cuda" else 1  # 0: not known yet

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def mean_of(count: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(count):
            work()
        wait()
        return (time.perf_counter() - start) / count

    def measure() -> Sample:
        nonlocal calls
        if calls:
            return Sample(mean_of(calls))
        mean_of(1)
        seconds = mean_of(1)
        calls = min(MOST_CALLS, ceil(LONG_ENOUGH / max(seconds, LONG_ENOUGH / MOST_CALLS)))
        return Sample(seconds)

    return measure


def contest(
    device: str, rounds: int, *, moved: int, eager: Work, compiled: Work, ours: Callable[[str], object]
) -> dict[str, Outcome]:
    """Measure limits, references and backends in one alternation.

    moved: bytes that the operation reads plus bytes that it writes; the copies move as many.
    eager, compiled: the operation in plain torch, and the same with torch.compile.
    ours: runs the operation on the backend of this name.
    """
    torch.compiler.reset()  # the compiler gives up on a function that it has compiled for many types
    copy = MemoryCopy(moved, threads=threads(), device=device)
    works: dict[str, Work] = {
        "torch copy_": copy.torch_copy,
        "memmove, all threads": copy.threaded_memmove,
        "memmove, one thread": copy.memmove,
        "torch, eager": eager,
        "torch.compile": compiled,
    }
    for backend in BACKENDS[device]:
        served = backend in available_backends(device)
        works[f"ours, {backend}"] = partial(ours, backend) if served else unavailable(f"no backend {backend} here")
    with torch.no_grad():
        return alternate({name: timed(works[name], device) for name in roles(device)}, rounds)
