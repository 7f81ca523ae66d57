"""Seconds until a command that computes nothing has answered: help, a wrong argument, a bad data file.

The limit starts the interpreter and does nothing. The reference is what a command pays that imports torch and
transformers before it looks at its arguments. "time / ours" compares both with the command.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.harness.contest import Contender, Outcome, alternate, replay, replayed, run_child
from bench.harness.tables import Row
from bench.inputs.stream_models import StreamJob, write_stream_job

ANSWERS = "answers"
LIMIT, REFERENCE = "python -c pass", "import torch, transformers"
CONTENDERS = {"ours": "ours", LIMIT: "limit", REFERENCE: "reference"}
KINDS = ("--help", "apply, a wrong argument", "unlearn, a wrong argument", "unlearn, a bad data file")
REFUSED = 2  # the exit status


def command_of(kind: str, job: StreamJob) -> list[str]:
    """The command that answers; its exit status is 0 if it answers as it should."""
    if kind == "--help":
        return [sys.executable, "-m", "perta_fast", "--help"]
    name, fault = kind.split(", ")
    words: list[object] = job.inputs() if name == "unlearn" else job.inputs()[:6]
    if fault == "a bad data file":
        bad = job.folder / "bad.jsonl"
        bad.write_text('{"question": "Who?", "answer": "Nobody."}\n{"question": "Where?"\n')
        words[words.index("--forget") + 1] = bad
    rule = ("--rule", "grad" if name == "unlearn" else "tv")
    lam = ("--lam", "1" if fault == "a bad data file" else "nan")
    refused = shlex.join(job.perta(name, *words, *rule, *lam, "--out", job.folder / "out"))
    return ["sh", "-c", f"{refused}; test $? = {REFUSED}"]


def contenders(kind: str, job: StreamJob) -> dict[str, Contender]:
    """The answer, and what it is compared with."""
    commands = {
        "ours": command_of(kind, job),
        LIMIT: [sys.executable, "-c", "pass"],
        REFERENCE: [sys.executable, "-c", REFERENCE],
    }
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "")}
    return {
        name: lambda command=command: run_child(command, variables=compiled)  # type: ignore[misc]
        for name, command in commands.items()
    }


@pytest.fixture(scope="module")
def outcomes(workspace: Path, rounds: int) -> dict[str, Mapping[str, Outcome]]:
    """The outcomes by kind of answer and contender."""
    job = write_stream_job(workspace / ANSWERS, 64, 1, 1, 8)
    return {kind: alternate(contenders(kind, job), rounds) for kind in KINDS}


@replayed
@pytest.mark.parametrize(("kind", "contender"), [(kind, contender) for kind in KINDS for contender in CONTENDERS])
def bench_answers(
    kind: str, contender: str, outcomes: dict[str, Mapping[str, Outcome]], board: list[Row], benchmark: Any
) -> None:
    """Report one contender of one answer."""
    outcome, role = outcomes[kind][contender], CONTENDERS[contender]
    board.append(replay(benchmark, outcome, group=f"{ANSWERS}: perta {kind}", contender=contender, role=role))
