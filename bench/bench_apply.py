"""Whole commands on checkpoints in files: how long a user waits, and how fast the disk is.

Each contender runs in a new process and writes a new directory. The inputs are in the page cache. With
PERTA_BENCH_COLD=1 they are evicted from it before every run. With PERTA_BENCH_BUILD, the directory of another build of
this project, only the two builds and the limit are measured.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench.harness import limits
from bench.harness.conditions import threads
from bench.harness.contest import (
    ROOT,
    Outcome,
    Sample,
    Unavailable,
    alternate,
    another_build,
    replay,
    replayed,
    run_child,
)
from bench.harness.tables import Row
from bench.inputs.checkpoints import IMPORTANCES, MERGED, CheckpointSet
from bench.peers import mergekit_task_arithmetic as mergekit
from perta_fast.importance.ratio import ImportanceRatio

WHOLE = "apply: whole process"
PHASE = "apply: the apply phase against copying the same bytes"
LAM = 1.0
RATIO = "ratio"  # its directory in the workspace
COLD = os.environ.get("PERTA_BENCH_COLD") == "1"
BUILD = os.environ.get("PERTA_BENCH_BUILD", "")
BESIDE = ", beside another build"
STATE = (BESIDE if BUILD else "") + (", cold files" if COLD else "")  # at the end of the names of the tables

WHOLE_PROCESS = {
    "perta apply": "ours",
    "perta apply --importance RATIO": "ours",
    "perta apply --in-place": "ours",
    "careful script": "peer",
    "research script": "peer",
    "mergekit task_arithmetic": "peer",
    "cat inputs; cp model": "limit",
    "import torch": "limit",
}
BUILDS = {
    "perta apply": "ours",
    "perta apply --importance RATIO": "ours",
    "perta apply, another build": "peer",
    "cat inputs; cp model": "limit",
}
MEASURED = BUILDS if BUILD else WHOLE_PROCESS
COPIES = {"copy": "limit", "copy with fsync": "limit"}
APPLY_PHASE = {"apply phase": "ours", **COPIES}
NOTES = {
    "perta apply --importance RATIO": "one file of bfloat16 in place of both importances",
    "mergekit task_arithmetic": "three inputs, plain task vector, bfloat16 arithmetic",
    "perta apply --in-place": "computes everything once to check it, then writes each byte twice and syncs it",
    "import torch": "nothing but the interpreter and the import",
}


def inputs(checkpoints: CheckpointSet) -> list[str]:
    """The command-line options that name the five inputs."""
    options: list[str] = []
    for name in MERGED + IMPORTANCES:
        options += [f"--{name.replace('_', '-')}", str(checkpoints.path(name))]
    return options


def ours(checkpoints: CheckpointSet, out: Path) -> list[str]:
    """The command under test."""
    options = ["--rule", "grad", "--lam", str(LAM), "--out", str(out), "--quiet"]
    return [sys.executable, "-m", "perta_fast", "apply", *inputs(checkpoints), *options]


def ours_by_ratio(checkpoints: CheckpointSet, ratio: Path, out: Path) -> list[str]:
    """The command under test, with the ratio in place of both importances."""
    options = ["--importance", str(ratio), "--rule", "grad", "--lam", str(LAM), "--out", str(out), "--quiet"]
    return [sys.executable, "-m", "perta_fast", "apply", *inputs(checkpoints)[: 2 * len(MERGED)], *options]


def ours_in_place(checkpoints: CheckpointSet, model: Path) -> list[str]:
    """The command under test, on a copy of the model."""
    options = ["--rule", "grad", "--lam", str(LAM), "--in-place", "--quiet"]
    others = inputs(checkpoints)[2:]
    return [sys.executable, "-m", "perta_fast", "apply", "--model", str(model), *others, *options]


def peer(script: str, checkpoints: CheckpointSet, out: Path) -> list[str]:
    """The command of a script in peers/."""
    path = ROOT / "bench" / "peers" / f"{script}.py"
    options = ["--lam", str(LAM), "--out", str(out)]
    return [sys.executable, str(path), *inputs(checkpoints), *options]


def read_and_copy(checkpoints: CheckpointSet, out: Path) -> list[str]:
    """A shell that reads every input and copies the model."""
    files = [str(path) for name in MERGED + IMPORTANCES for path in checkpoints.files(name)]
    copy = shlex.join(["cp", "-r", str(checkpoints.path("model")), str(out)])
    return ["sh", "-c", f"cat {shlex.join(files)} >/dev/null; {copy}"]


@pytest.fixture(scope="module")
def outcomes(checkpoints: CheckpointSet, workspace: Path, rounds: int) -> dict[str, Outcome]:
    """The outcomes of both groups by contender, all measured in one alternation."""
    out, ratio = workspace / "out", workspace / RATIO
    ImportanceRatio.of(*map(checkpoints.path, IMPORTANCES)).save(ratio)
    recipe = workspace / "recipe.yaml"
    paths = {name: checkpoints.path(name) for name in MERGED}
    mergekit.write_recipe(recipe, lam=LAM, **paths)
    read = [checkpoints.files(name) for name in MERGED + IMPORTANCES]
    evicted = [path for files in (*read, ratio.iterdir()) for path in files]
    phases: list[Sample] = []

    def fresh(measure: Callable[[], Sample]) -> Callable[[], Sample]:
        def run() -> Sample:
            shutil.rmtree(out, ignore_errors=True)
            os.sync()  # so that this contender does not wait for writes of an earlier one
            if COLD:
                limits.evict(evicted)
            try:
                return measure()
            finally:
                shutil.rmtree(out, ignore_errors=True)

        return run

    def measure_ours() -> Sample:
        sample = run_child(ours(checkpoints, out))
        report = json.loads((out / "perta_report.json").read_text())
        phases.append(Sample(float(report["phases"]["apply"]["seconds"])))
        return sample

    another = another_build(BUILD) if BUILD else {}

    def measure_build() -> Sample:
        return run_child(ours(checkpoints, out), variables=another)

    def measure_in_place() -> Sample:
        shutil.copytree(checkpoints.path("model"), out)
        os.sync()
        if COLD:
            limits.evict([*checkpoints.files("model"), *out.glob("*.safetensors")])
        return run_child(ours_in_place(checkpoints, out))

    def measure_mergekit() -> Sample:
        program = mergekit.executable()
        if program is None:
            raise Unavailable("mergekit-yaml: not on PATH, and PERTA_BENCH_MERGEKIT is not set")
        command = mergekit.command(program, recipe, out, threads=threads())
        return run_child(command, variables={"HF_HUB_OFFLINE": "1"})

    def copy(fsync: bool) -> Sample:
        return Sample(limits.copy_files(read, out, threads=threads(), fsync=fsync))

    contenders = {
        "perta apply": fresh(measure_ours),
        "perta apply, another build": fresh(measure_build),
        "perta apply --importance RATIO": fresh(lambda: run_child(ours_by_ratio(checkpoints, ratio, out))),
        "perta apply --in-place": fresh(measure_in_place),
        "careful script": fresh(lambda: run_child(peer("careful_script", checkpoints, out))),
        "research script": fresh(lambda: run_child(peer("research_script", checkpoints, out))),
        "mergekit task_arithmetic": fresh(measure_mergekit),
        "cat inputs; cp model": fresh(lambda: run_child(read_and_copy(checkpoints, out))),
        "import torch": fresh(lambda: run_child([sys.executable, "-c", "import torch"])),
        "copy": fresh(lambda: copy(fsync=False)),
        "copy with fsync": fresh(lambda: copy(fsync=True)),
    }
    names = BUILDS if BUILD else (*WHOLE_PROCESS, *COPIES)
    results = alternate({name: contenders[name] for name in names}, rounds)
    whole = results["perta apply"]
    results["apply phase"] = whole if isinstance(whole, Exception) else phases[1:]
    return results


def bytes_moved(checkpoints: CheckpointSet, workspace: Path, contender: str) -> int | None:
    """Bytes that a contender reads plus bytes that it writes; None if it moves no checkpoint."""
    if contender == "import torch":
        return None
    if contender.endswith("RATIO"):
        ratio = sum(path.stat().st_size for path in (workspace / RATIO).iterdir())
        return ratio + sum(checkpoints.size(name) for name in MERGED) + checkpoints.size("model")
    read = MERGED if contender.startswith("mergekit") else MERGED + IMPORTANCES
    return sum(checkpoints.size(name) for name in read) + checkpoints.size("model")


@replayed
@pytest.mark.parametrize("contender", MEASURED)
def bench_whole_process(
    contender: str,
    outcomes: dict[str, Outcome],
    checkpoints: CheckpointSet,
    workspace: Path,
    board: list[Row],
    benchmark: Any,
) -> None:
    """Report wall time and peak memory of a command from start to exit."""
    facts: dict[str, Any] = {"bytes": bytes_moved(checkpoints, workspace, contender)}
    if contender in NOTES:
        facts["note"] = NOTES[contender]
    role = MEASURED[contender]
    outcome = outcomes[contender]
    board.append(replay(benchmark, outcome, group=WHOLE + STATE, contender=contender, role=role, **facts))


@replayed
@pytest.mark.skipif(bool(BUILD), reason="not beside another build")
@pytest.mark.parametrize("contender", APPLY_PHASE)
def bench_apply_phase(
    contender: str,
    outcomes: dict[str, Outcome],
    checkpoints: CheckpointSet,
    workspace: Path,
    board: list[Row],
    benchmark: Any,
) -> None:
    """Report the phase that moves and hashes the tensors, as our run report states it, and the limit: copying."""
    role = APPLY_PHASE[contender]
    moved = bytes_moved(checkpoints, workspace, contender)
    outcome = outcomes[contender]
    row = replay(benchmark, outcome, group=PHASE + STATE, contender=contender, role=role, bytes=moved)
    board.append(row)


def bench_outputs_agree(checkpoints: CheckpointSet, workspace: Path) -> None:
    """Ours and the careful script write the same bits: both times are of the same work."""
    mine, theirs = workspace / "ours", workspace / "careful"
    run_child(ours(checkpoints, mine))
    run_child(peer("careful_script", checkpoints, theirs))
    for path in checkpoints.files("model"):
        expected = load_file(theirs / path.name)
        for name, tensor in load_file(mine / path.name).items():
            assert torch.equal(tensor, expected[name]), f"{name} differs"
    shutil.rmtree(mine)
    shutil.rmtree(theirs)
