"""Contests between operations on arrays in memory: copies as limits, references and our backends."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from bench.harness.conditions import threads
from bench.harness.contest import Contender, Outcome, Sample, alternate
from bench.harness.limits import MemoryCopy

Work = Callable[[], object]

COPIES = {"cpu": ("torch copy_", "memmove, all threads", "memmove, one thread"), "cuda": ("torch copy_",)}
BACKENDS = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
REPEATS = {"cpu": 1, "cuda": 10}  # calls per measurement; a kernel alone is too short to measure


def roles(device: str) -> dict[str, str]:
    """The contenders of every in-memory benchmark on ``device``, with their roles."""
    return {
        **dict.fromkeys(COPIES[device], "limit"),
        "torch, eager": "reference",
        "torch.compile": "reference",
        **{f"ours, {backend}": "ours" for backend in BACKENDS[device]},
    }


def timed(work: Work, device: str) -> Contender:
    """A contender that measures one call of ``work``, until the device has finished it."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def measure() -> Sample:
        wait()
        start = time.perf_counter()
        for _ in range(REPEATS[device]):
            work()
        wait()
        return Sample((time.perf_counter() - start) / REPEATS[device])

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
        works[f"ours, {backend}"] = partial(ours, backend)
    with torch.no_grad():
        return alternate({name: timed(works[name], device) for name in roles(device)}, rounds)
