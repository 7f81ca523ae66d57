"""Faults in the file calls of a child process: which, where, when; and the calls that it makes.

    points = shim.count("resume", out, path="out")
    for number, point in enumerate(points):
        shim.perta("resume", copy, faults=Faults(copy.name, then="kill before", at=number))

The ordinal of a call is its place among the calls of the chosen kinds on the chosen files, so a run that counts
and a run that is struck must choose the same. Linux only: faults.c is loaded with LD_PRELOAD.
"""

import errno
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.children import perta, run_child

SIZED = ("write", "copy", "read")  # calls that move bytes; copy: copy_file_range and sendfile
CHANGES = ("write", "copy", "truncate", "fsync", "rename", "unlink")  # calls after which a disk is not the same
KINDS = (*CHANGES, "read")
KILLS = ("kill before", "kill after")


@dataclass(frozen=True)
class Faults:
    """What happens to the calls of a process.

    path: text in the path of the file; a rename or a copy counts if it is in one of the two. kinds: some of
    ``KINDS``. then: "nothing" (the calls are only counted), the name of the error ("ENOSPC") that the call
    fails with, "short" (half of the bytes are taken, and the call says so), "torn" (half are, and the process
    is killed), "kill before" or "kill after". A call that is none of ``SIZED`` has no halves: "short" changes
    nothing there, "torn" kills after it. at: ordinal of the call, from 0. lasting: every later call, too.
    log: file to add each counted call to.
    """

    path: str
    kinds: tuple[str, ...] = CHANGES
    then: str = "nothing"
    at: int = 0
    lasting: bool = False
    log: Path | None = None

    def __post_init__(self) -> None:
        if not self.path or not self.kinds or not set(self.kinds) <= set(KINDS) or self.at < 0:
            raise ValueError(f"{self}: no call can match it")
        if self.then not in ("nothing", "short", "torn", *KILLS) and not hasattr(errno, self.then):
            raise ValueError(f"{self.then!r} is no fault")

    def environment(self, library: Path) -> dict[str, str]:
        """The variables that make a new process load ``library`` and do this."""
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
    """A call that was made. size: bytes asked for, or the length to cut to; target: the second path, if any."""

    kind: str
    size: int
    path: str
    target: str


def points(log: Path) -> list[Point]:
    """The calls in a log, in the order of their ordinals."""
    if not log.exists():
        return []
    rows = [os.fsdecode(row).split("\t") for row in log.read_bytes().split(b"\0")[:-1]]
    return [Point(kind, int(size), path, target) for kind, size, path, target in rows]


@dataclass(frozen=True)
class Shim:
    """The compiled library, and ``perta`` under it."""

    library: Path

    @classmethod
    def build(cls, folder: Path) -> "Shim":
        """Compile the library; skip the test, by name, where that cannot be."""
        compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
        if not Path("/proc/self/fd").exists():
            pytest.skip("faults are injected on Linux only")
        if compiler is None:
            pytest.skip("no C compiler was found")
        library = folder / "faults.so"
        flags = ["-std=gnu17", "-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", "-shared"]
        source = Path(__file__).with_name("faults.c")
        done = run_child([*compiler.split(), *flags, source, "-o", library, "-ldl", "-pthread"])
        assert done.returncode == 0, done.stderr
        return cls(library)

    def perta(self, *arguments: object, faults: Faults, setup: str = "") -> CompletedProcess[str]:
        """Run ``perta`` with ``arguments`` in its own process, after the Python statements of ``setup``."""
        return perta(*arguments, setup=setup, environment=faults.environment(self.library))

    def count(self, *arguments: object, path: str, kinds: tuple[str, ...] = CHANGES, setup: str = "") -> list[Point]:
        """The calls that ``perta`` makes with ``arguments`` when nothing goes wrong."""
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log")
            done = self.perta(*arguments, faults=Faults(path, kinds, log=log), setup=setup)
            assert done.returncode == 0, done.stderr
            return points(log)
