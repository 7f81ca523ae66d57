"""Runs the tests that need a GPU, and those of Triton: ``python -m bench.harness.gpu_tests``.

Each file has a process of its own: once a kernel has read beyond its memory, nothing works on the device any more in
that process. Several files run at a time.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from bench.harness.contest import ROOT, time_left

FILES = (  # of each kind one comes early; there may be time for the first alone
    "tests/ops/test_triton_fisher.py",
    "tests/ops/test_rescaled_subtract.py",
    "tests/ops/test_accumulate.py",
    "tests/runs/test_estimate.py",
    "tests/streaming/test_streaming.py",
    "tests/subtraction/test_on_module_copies.py",
    "tests/sweeping/test_sweep.py",
    "tests/evaluation/test_suites.py",
    "tests/ops/test_low_rank_subtract.py",
    "tests/ops/test_ratio.py",
)
CHOSEN = "cuda or triton"  # in the name of a test, or of its file
AT_A_TIME = 8
WELL = {0: "passed", 5: "skipped"}  # by pytest's exit status


def run(file: str) -> tuple[str, str]:
    """How the tests of a file went (one of ``WELL``, or what went wrong), and their output."""
    command = [sys.executable, "-m", "pytest", file, "-k", CHOSEN, "-vv", "-rs", "-p", "no:cacheprovider"]
    seconds = time_left()
    if seconds <= 0:
        return "not run, no time was left", ""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "2"},  # so many processes share the processors
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=None if math.isinf(seconds) else seconds,
            )
            outcome = WELL.get(done.returncode, f"FAILED with exit status {done.returncode}")
        except subprocess.TimeoutExpired:
            outcome = "stopped, no time was left"
        output.seek(0)
        return outcome, output.read()


def main(files: Sequence[str] = FILES) -> int:
    """Run the tests of all files, and print their output and then how each file went; 1 unless all went well."""
    outcomes = []
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for file, (outcome, output) in zip(files, pool.map(run, files), strict=True):
            print(f"-- {file}\n{output}", flush=True)
            outcomes.append(outcome)
    for file, outcome in zip(files, outcomes, strict=True):
        print(f"{file}: {outcome}")
    return int(not set(outcomes) <= set(WELL.values()))


if __name__ == "__main__":
    sys.exit(main())
