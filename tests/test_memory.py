"""The peak of a run is its own: not that of what ran before it, nor of the process that started it."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.children import run_child

_MEASURED = """
import json
from perta_fast.memory import PeakMemory
{before}
with PeakMemory() as memory:
    held = b"x" * (40 << 20)
    del held
print(json.dumps(memory.as_dict()))
"""
_LARGE = 'large = b"x" * (400 << 20); del large'  # a block of this size goes back to the system at once
_FROM_A_LARGE_PROCESS = f"""
import subprocess, sys
large = b"x" * (400 << 20)
print(subprocess.run([sys.executable, "-c", {_MEASURED.format(before="")!r}], stdout=subprocess.PIPE, text=True).stdout)
"""
MiB = 1 << 20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells it on Linux only")
@pytest.mark.parametrize("kind", ["nothing before", "of another process", "before the run"])
def test_the_peak_is_that_of_the_run(kind: str) -> None:
    if kind == "before the run" and not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not let a process begin its peak again")
    code = _FROM_A_LARGE_PROCESS if kind == "of another process" else None
    code = code or _MEASURED.format(before=_LARGE if kind == "before the run" else "")
    done = run_child([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout)
    assert memory["anonymous_bytes_at_start"] + 40 * MiB <= memory["peak_resident_bytes"] < 300 * MiB
