"""Where the CPU kernels find their threads: torch's OpenMP runtime, or a pool of their own without it."""

import sys

import pytest

from tests.support.children import run_child

# accumulate(accumulator, gradient, dtype code, squared, count, threads); 0 is float32
ACCUMULATE = """
import os
import numpy as np
from perta_fast import compiled

gradient = np.random.default_rng(0).standard_normal(300_001).astype(np.float32)

def accumulate(threads):
    total = np.zeros_like(gradient)
    for _ in range(3):
        compiled.kernels().accumulate(total.ctypes.data, gradient.ctypes.data, 0, True, len(total), threads)
    return total

def threads():
    return len(os.listdir("/proc/self/task"))

def check():
    square = gradient * gradient
    for number in (1, 2, 3, 2):
        assert np.array_equal(accumulate(number), square + square + square), number
"""

WAYS = {
    "a pool of its own": "check()",
    "torch's threads": """
import torch
torch.set_num_threads(3)
torch.ones(1_000_000).add_(1)  # torch's threads exist from now on
before = threads()
accumulate(3)
assert threads() == before, (before, threads())
check()
""",
    "a pool, then torch's threads": "check(); import torch; torch.ones(1_000_000).add_(1); check()",
    "several callers at once": """
import torch
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as callers:
    for done in [callers.submit(check) for _ in range(4)]:
        done.result()
""",
}
FORKED = """
{before}
child = os.fork()
if child == 0:
    check()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
AFTER_USE = {"its own pool": "check()", "torch's threads": "import torch; torch.ones(1_000_000).add_(1); check()"}


def run(program: str) -> None:
    done = run_child([sys.executable, "-c", ACCUMULATE + program])
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("way", WAYS)
def test_results_are_right_on(way: str) -> None:
    run(WAYS[way])


@pytest.mark.skipif(sys.platform != "linux", reason="forking after threads is sure to work on Linux alone")
@pytest.mark.parametrize("used", AFTER_USE)
def test_a_forked_child_works_after_its_parent_used(used: str) -> None:
    run(FORKED.format(before=AFTER_USE[used]))
