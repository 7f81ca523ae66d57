"""The peak of a run is its own: not that of what ran before it, nor of the process that started it."""

import json
import os
import sys
from pathlib import Path

import pytest

from perta_fast import memory
from perta_fast.memory import available_bytes
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
MiB, GiB = 1 << 20, 1 << 30


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


def _system(monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, object]) -> None:
    """A system with 100 GiB free and these control groups; files: below their directory."""
    texts = {"/proc/meminfo": f"MemAvailable: {100 * MiB} kB\n", "/proc/self/cgroup": groups}
    texts |= {f"/sys/fs/cgroup/{name}": f"{content}\n" for name, content in files.items()}

    class Shown(type(Path())):  # type: ignore[misc]
        def read_text(self) -> str:
            if str(self) not in texts:
                raise FileNotFoundError(self)
            return texts[str(self)]

    monkeypatch.setattr(memory, "Path", Shown)
    monkeypatch.setattr(memory, "_GROUPS", Shown("/sys/fs/cgroup"))


_OF_FILES = f"anon {17 * GiB}\nactive_file {5 * GiB}\ninactive_file {9 * GiB}"
_FIRST_VERSION = {
    "memory/memory.limit_in_bytes": 32 * GiB,
    "memory/memory.usage_in_bytes": 31 * GiB,
    "memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {9 * GiB}\ntotal_active_file {5 * GiB}",
}


def test_pages_of_files_count_as_free_in_a_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"memory.max": 32 * GiB, "memory.current": 31 * GiB, "memory.stat": _OF_FILES}
    _system(monkeypatch, "0::/\n", files)
    assert available_bytes() == 15 * GiB
    _system(monkeypatch, "0::/\n", {"memory.max": 32 * GiB, "memory.current": 31 * GiB})
    assert available_bytes() == GiB


def test_the_tightest_of_the_groups_above_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a/b/memory.max": "max", "a/b/memory.current": GiB, "a/memory.max": 8 * GiB, "a/memory.current": 2 * GiB}
    _system(monkeypatch, "0::/a/b\n", files)
    assert available_bytes() == 6 * GiB
    _system(monkeypatch, "0::/a/b\n", {**files, "a/memory.max": "max"})
    assert available_bytes() == 100 * GiB


@pytest.mark.parametrize("groups", ["5:cpu:/\n3:memory:/docker/1\n", "3:cpu,memory:/docker/1\n0::/docker/1\n"])
def test_control_groups_of_version_1_limit_the_memory(groups: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _system(monkeypatch, groups, _FIRST_VERSION)  # a container sees its own group as the root
    assert available_bytes() == 15 * GiB
    _system(monkeypatch, groups, {**_FIRST_VERSION, "memory/memory.limit_in_bytes": (1 << 63) - 4096})  # none
    assert available_bytes() == 100 * GiB
