"""Whole commands on a machine that is quiet otherwise, and with one busy process on each core: ten minutes or more.

A fair share of a crowded core is half of it, so twice the quiet time is the least. One group has beside ours the same
command with threads that spin while they wait, as OpenMP's do by default. Start it on a quiet machine. "time / ours"
compares with the quiet time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.harness.contest import Contender, Outcome, Sample, alternate, replay, replayed, run_child
from bench.harness.tables import Row
from bench.inputs.stream_models import StreamJob, write_stream_job

CROWDED = "crowded"
ROUNDS = 2  # at most: a crowded run takes long
QUIET, BUSY = "quiet", "one busy process a core"
SPINNING = "threads that spin"
CONTENDERS = {QUIET: "ours", BUSY: "ours"}
SPINS = {**CONTENDERS, f"{SPINNING}, {QUIET}": "peer", f"{SPINNING}, {BUSY}": "peer"}
SPIN = {"GOMP_SPINCOUNT": "300000"}  # what GCC's runtime takes where nothing is set
# By command: width and layers of the models, rows of a data set, and what is done.
COMMANDS: dict[str, tuple[tuple[int, int], int, tuple[str, ...]]] = {
    "sweep": ((256, 4), 16, ("--rules", "tv", "--lams", "1", "--batch-size", "8")),
    "unlearn": ((256, 4), 16, ("--rule", "grad", "--lam", "1", "--batch-size", "8")),
    "eval": ((256, 4), 4, ("--max-new-tokens", "4")),
    "apply": ((1024, 8), 1, ("--rule", "tv", "--lam", "1")),
}
BUSY_PROCESS = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"


@contextmanager
def busy_neighbours() -> Iterator[None]:
    """Keep every core that this process may use busy."""
    processes = []
    try:
        for core in sorted(os.sched_getaffinity(0)):
            command = [sys.executable, "-I", "-S", "-c", BUSY_PROCESS, str(core)]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it runs
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def command_of(name: str, job: StreamJob) -> list[str]:
    """``perta NAME`` on these files."""
    words: list[object] = job.inputs()
    if name == "apply":
        words = words[:6]
    elif name == "eval":
        words = [*words[:2], *words[6:]]
    out = job.folder / ("scores.json" if name == "eval" else "out")
    return job.perta(name, *words, *COMMANDS[name][2], "--out", out, "--overwrite")


def contenders(name: str, command: list[str]) -> dict[str, Contender]:
    """Every way to run the command."""

    def run(variables: Mapping[str, str], crowded: bool) -> Sample:
        if not crowded:
            return run_child(command, variables=variables)
        with busy_neighbours():
            return run_child(command, variables=variables)

    return {
        contender: lambda contender=contender: run(SPIN if SPINNING in contender else {}, BUSY in contender)  # type: ignore[misc]
        for contender in group_of(name)
    }


def group_of(name: str) -> dict[str, str]:
    """The contenders of one command and their roles."""
    return SPINS if name == "sweep" else CONTENDERS


@pytest.fixture(scope="module")
def outcomes(workspace: Path, rounds: int) -> Iterator[dict[str, Mapping[str, Outcome]]]:
    """The outcomes by command and contender."""
    with pytest.MonkeyPatch.context() as environment:
        for variable in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", *SPIN):
            environment.delenv(variable, raising=False)
        found: dict[str, Mapping[str, Outcome]] = {}
        for name, (size, rows, _) in COMMANDS.items():
            job = write_stream_job(workspace / CROWDED, *size, rows, 32)
            found[name] = alternate(contenders(name, command_of(name, job)), min(rounds, ROUNDS))
            shutil.rmtree(job.folder)
    yield found


@replayed
@pytest.mark.parametrize(
    ("command", "contender"), [(name, contender) for name in COMMANDS for contender in group_of(name)]
)
def bench_crowded(
    command: str, contender: str, outcomes: dict[str, Mapping[str, Outcome]], board: list[Row], benchmark: Any
) -> None:
    """Report one command in one way."""
    role = group_of(command)[contender]
    row = replay(
        benchmark, outcomes[command][contender], group=f"{CROWDED}: perta {command}", contender=contender, role=role
    )
    board.append(row)
