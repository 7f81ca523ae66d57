"""Measure contenders in alternation, then report their times through pytest-benchmark.

pytest-benchmark runs all rounds of one function, then all rounds of the next. On a machine that is shared, or whose
clock frequency drifts, the ratio of two such times says little. Here every round runs all contenders once, each
round starts with another contender, and ratios are taken within rounds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.harness.tables import seconds_text

ROOT = Path(__file__).resolve().parents[2]
ROLES = ("limit", "reference", "peer", "ours")
NO_TIME = "no time was left to measure it"


class Unavailable(Exception):
    """A contender cannot run here; the message says why."""


@dataclasses.dataclass
class Sample:
    """One measurement: wall-clock seconds, and other quantities by name, such as peak memory."""

    seconds: float
    seen: dict[str, float] = dataclasses.field(default_factory=dict)


Contender = Callable[[], Sample]
Outcome = list[Sample] | Exception


def unavailable(reason: str) -> Callable[[], Any]:
    """What stands for a contender that cannot run here."""

    def run() -> None:
        raise Unavailable(reason)

    return run


def time_left() -> float:
    """Seconds to the deadline in PERTA_BENCH_DEADLINE, which is in seconds since 1970; infinite if there is none."""
    return float(os.environ.get("PERTA_BENCH_DEADLINE", "inf")) - time.time()


def alternate(contenders: Mapping[str, Contender], rounds: int) -> dict[str, Outcome]:
    """Run each contender once to warm up, then ``rounds`` times in rotating order, and print every time as it comes.

    A round that would not end before the deadline, if it took as long as the longest so far, is not begun: what was
    measured before it is returned. Returns by name the samples, or the exception of a contender that failed or is
    unavailable, as is one for which no time was left.
    """
    names = list(contenders)
    outcomes: dict[str, Outcome] = {name: [] for name in names}
    longest = 0.0
    for number in range(rounds + 1):  # 0 is the warm-up
        if number and time_left() < longest:
            break
        began = time.monotonic()
        first = max(0, number - 1) % len(names)
        for name in names[first:] + names[:first]:
            samples = outcomes[name]
            if isinstance(samples, list):
                try:
                    sample = _measure(name, contenders[name], number)
                except Exception as error:  # the others are measured all the same
                    outcomes[name] = error
                else:
                    samples += [sample] if number else []
        longest = max(longest, time.monotonic() - began)
    return {name: Unavailable(NO_TIME) if outcome == [] else outcome for name, outcome in outcomes.items()}


def _measure(name: str, run: Contender, number: int) -> Sample:
    """Run a contender in a round, and print its time."""
    if not number and time_left() <= 0:
        raise Unavailable(NO_TIME)
    sample = run()
    print(f"{name}, {f'round {number}' if number else 'warm-up'}: {seconds_text(sample.seconds)}", flush=True)
    return sample


class ReplayClock:
    """A clock for pytest-benchmark that moves only when a recorded duration is replayed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.now += seconds


CLOCK = ReplayClock()
replayed = pytest.mark.benchmark(timer=CLOCK)


def replay(benchmark: Any, outcome: Outcome, *, group: str, contender: str, role: str, **facts: Any) -> dict[str, Any]:
    """Report a measured contender through the ``benchmark`` fixture and return its table row.

    facts: further JSON values for the row, such as ``bytes`` (moved in one run) or ``note``.
    Skips the benchmark if the contender was unavailable; raises the contender's exception if it failed.
    """
    assert role in ROLES
    benchmark.group = group
    if isinstance(outcome, Unavailable):
        pytest.skip(str(outcome))
    if isinstance(outcome, Exception):
        raise outcome
    durations = iter([sample.seconds for sample in outcome])
    row: dict[str, Any] = {
        "group": group,
        "contender": contender,
        "role": role,
        "seconds": [sample.seconds for sample in outcome],
        **facts,
    }
    for name in outcome[0].seen:
        row[name] = max(sample.seen[name] for sample in outcome)
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: CLOCK.advance(next(durations)), rounds=len(outcome))
    return row


def run_child(command: Sequence[str], *, variables: Mapping[str, str] | None = None) -> Sample:
    """Run ``command`` in a new process and return its wall time and peak memory.

    Peaks are of the process itself; only ``peak_rss`` also covers its children, such as those of a shell.
    Raises RuntimeError with the end of its output if it fails.
    """
    environment = {**os.environ, "PYTHONPATH": _python_path(ROOT), **(variables or {})}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        launcher = [sys.executable, "-I", "-S", str(Path(__file__).with_name("launch.py")), str(report)]
        finished = subprocess.run(
            [*launcher, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if finished.returncode != 0:
            end = finished.stdout[-2000:]
            raise RuntimeError(f"exit status {finished.returncode} from {command[:4]} ...\n{end}")
        cost = json.loads(report.read_text())
    seconds = cost.pop("seconds")
    return Sample(seconds, {name: value for name, value in cost.items() if value is not None})


def another_build(directory: Path | str) -> dict[str, str]:
    """The variables with which ``run_child`` runs this project as it was built in ``directory``.

    Without PYTHONSAFEPATH, ``python -m`` imports what lies in the current directory. Raises RuntimeError if another
    build is imported all the same.
    """
    variables = {"PYTHONPATH": _python_path(directory), "PYTHONSAFEPATH": "1"}
    imported = "Path(perta_fast.__file__).parents[1]"
    proof = f"import sys, perta_fast; from pathlib import Path; assert {imported}.samefile(sys.argv[1]), {imported}"
    run_child([sys.executable, "-c", proof, str(directory)], variables=variables)
    return variables


def _python_path(first: Path | str) -> str:
    """PYTHONPATH with ``first`` before what this process was given, where packages may be installed."""
    return os.pathsep.join([str(first), *filter(None, [os.environ.get("PYTHONPATH")])])
