"""Faults in the file calls of a child process, and the list of its calls.

    shim.perta("resume", out, faults=Faults("result", then="kill before", at=7))

The ordinal of a call counts only the calls of the chosen kinds on the chosen files, so choose the same ones to count
and to inject. Linux only: faults.c is loaded with LD_PRELOAD.
"""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.children import perta, run_child

SIZED = ("write", "copy", "read")  # calls that move bytes; copy: copy_file_range and sendfile
CHANGES = ("write", "copy", "truncate", "fsync", "rename", "unlink")  # calls that change the disk
KINDS = (*CHANGES, "read")
KILLS = ("kill before", "kill after")


@dataclass(frozen=True)
class Faults:
    """What happens to which file calls of a process.

    path: text that the path of the file contains; for a rename or a copy, one of the two paths. kinds: some of
    ``KINDS``. at: ordinal of the call, from 0. lasting: also every later call. log: file for all counted calls.

    then: "nothing" only counts. An error's name ("ENOSPC") makes the call fail with it. "short" takes half of the
    bytes, and the call returns that. "torn" takes half, and the process is killed. "kill before" and "kill after"
    kill it before or after the call. Calls that are not in ``SIZED`` move no bytes: "short" changes nothing there,
    "torn" kills after them.
    """

    path: str
    kinds: tuple[str, ...] = CHANGES
    then: str = "nothing"
    at: int = 0
    lasting: bool = False
    log: Path | None = None

    def __post_init__(self) -> None:
        if not self.path or not self.kinds or not set(self.kinds) <= set(KINDS) or self.at < 0:
            raise ValueError(f"{self}: no call can match this")
        if self.then not in ("nothing", "short", "torn", *KILLS) and not hasattr(errno, self.then):
            raise ValueError(f"{self.then!r} is not a fault")

    def environment(self, library: Path) -> dict[str, str]:
        """The variables with which a new process loads ``library`` and meets these faults."""
        variables = {
            "LD_PRELOAD": str(library),
            "PERTA_FAULT_PATH": self.path,
            "PERTA_FAULT_KINDS": ",".join(self.kinds),
            "PERTA_FAULT_THEN": str(getattr(errno, self.then, self.then)),
            "PERTA_FAULT_AT": str(self.at),
            "PERTA_FAULT_LASTING": str(int(self.lasting)),
        }
        return variables if self.log is None else variables | {"PERTA_FAULT_LOG": str(self.log)}


@dataclass(frozen=True)
class Point:
    """A call that was made. size: bytes requested, or the new length of a file. target: the second path, or ""."""

    kind: str
    size: int
    path: str
    target: str


def points(log: Path) -> list[Point]:
    """The calls in a log, by ordinal."""
    if not log.exists():
        return []
    calls = [os.fsdecode(call).split("\t") for call in log.read_bytes().split(b"\0")[:-1]]
    return [Point(kind, int(size), path, target) for kind, size, path, target in calls]


@dataclass(frozen=True)
class Shim:
    """The compiled library, and ``perta`` under it."""

    library: Path

    @classmethod
    def build(cls, folder: Path) -> "Shim":
        """Compile the library, or skip the test and say why."""
        compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
        if not Path("/proc/self/fd").exists():
            pytest.skip("faults can be injected on Linux only")
        if compiler is None:
            pytest.skip("no C compiler was found")
        library = folder / "faults.so"
        flags = ["-std=gnu17", "-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", "-shared"]
        source = Path(__file__).with_name("faults.c")
        done = run_child([*compiler.split(), *flags, source, "-o", library, "-ldl", "-pthread"])
        assert done.returncode == 0, done.stderr
        return cls(library)

    def perta(self, *arguments: object, faults: Faults) -> CompletedProcess[str]:
        """Run ``perta`` with ``arguments`` in a new process."""
        return perta(*arguments, environment=faults.environment(self.library))
