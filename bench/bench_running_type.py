"""A bfloat16 checkpoint on this CPU: in the type that ``perta`` takes, and in its own.

On a processor that torch multiplies bfloat16 fast on, both are the same. "time / ours" compares with what perta takes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness.contest import Outcome, alternate, replay, replayed, run_child
from bench.harness.tables import Row
from bench.inputs.stream_models import StreamJob, write_stream_job
from perta_fast.dtypes import torch_name
from perta_fast.models.running_type import running_type

GROUP = "type to run in"
OURS, OWN = "as perta takes it", "--dtype bfloat16"
CONTENDERS = {OURS: "ours", OWN: "peer"}
SIZE = (1024, 6)  # width and layers
ROWS, WORDS, ROUNDS = 8, 32, 1
COMMANDS = ("eval", "importance", "importance --stream")


def command_of(name: str, job: StreamJob, *more: str) -> list[str]:
    """``perta NAME`` on these files."""
    command, *stream = name.split()
    data = ("--forget", job.folder / "forget.jsonl", "--metrics", "forget_loss")
    out = job.folder / "scores.json"
    if command == "importance":
        data, out = (
            ("--data", job.folder / "forget.jsonl", "--estimator", "empirical-fisher"),
            job.folder / "importance",
        )
    return job.perta(command, *stream, "--model", job.folder / "model", *data, "--out", out, "--overwrite", *more)


@pytest.fixture(scope="module")
def outcomes(workspace: Path, rounds: int) -> dict[str, Mapping[str, Outcome]]:
    """The outcomes by command and contender."""
    job = write_stream_job(workspace / "running-type", *SIZE, ROWS, WORDS)
    found: dict[str, Mapping[str, Outcome]] = {}
    for name in COMMANDS:
        commands = {OURS: command_of(name, job), OWN: command_of(name, job, *OWN.split())}
        ways = {way: lambda command=command: run_child(command) for way, command in commands.items()}
        found[name] = alternate(ways, min(rounds, ROUNDS))
    shutil.rmtree(job.folder)
    return found


@replayed
@pytest.mark.parametrize(("command", "contender"), [(name, contender) for name in COMMANDS for contender in CONTENDERS])
def bench_running_type(
    command: str, contender: str, outcomes: dict[str, Mapping[str, Outcome]], board: list[Row], benchmark: Any
) -> None:
    """Report one command in one type."""
    taken = torch_name(running_type(torch.bfloat16, torch.device("cpu")))
    row = replay(
        benchmark,
        outcomes[command][contender],
        group=f"{GROUP}: perta {command}",
        contender=contender,
        role=CONTENDERS[contender],
        note=f"{taken}, {ROWS} rows of {WORDS} words, width {SIZE[0]}, {SIZE[1]} layers" if contender == OURS else "",
    )
    board.append(row)
