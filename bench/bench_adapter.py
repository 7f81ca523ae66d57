"""``perta apply`` with a LoRA adapter for theta_f, against the same command with a whole checkpoint.

The adapters change every matrix of every layer, and neither the embedding nor the head nor a norm. Each contender
runs in a new process. Its inputs are in the page cache.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from bench.bench_apply import ours
from bench.harness.contest import Outcome, Sample, alternate, replay, replayed, run_child
from bench.harness.tables import Row
from bench.inputs.checkpoints import CheckpointSet, llama_config, llama_shapes, normal

WHOLE = "apply with an adapter: whole process"
PHASE = "apply with an adapter: the apply phase"
CHECKPOINT = "tuned is a checkpoint"
RANKS = (16, 64)
CONTENDERS = {CHECKPOINT: "reference"} | {f"tuned is an adapter of rank {rank}": "ours" for rank in RANKS}


def write_adapter(folder: Path, shapes: dict[str, tuple[int, ...]], rank: int) -> Path:
    """Write an adapter as peft saves it: random factors for every matrix of every layer."""
    folder.mkdir()
    tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        if ".layers." in name and len(shape) == 2:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = normal(number, (rank, shape[1])) * 1e-2
            tensors[f"{stem}.lora_B.weight"] = normal(number + 10_000, (shape[0], rank)) * 1e-2
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def outcomes(checkpoints: CheckpointSet, workspace: Path, rounds: int) -> dict[str, dict[str, Outcome]]:
    """The outcomes of both groups by contender, all measured in one alternation."""
    out = workspace / "out"
    shapes = llama_shapes(llama_config(checkpoints.parameters))
    tuned = dict.fromkeys(CONTENDERS, checkpoints.path("tuned"))
    for rank in RANKS:
        name = f"tuned is an adapter of rank {rank}"
        tuned[name] = write_adapter(workspace / f"adapter-{rank}", shapes, rank)
    phases: dict[str, list[Sample]] = {name: [] for name in CONTENDERS}

    def contender(name: str) -> Any:
        command = ours(checkpoints, out)
        command[command.index("--tuned") + 1] = str(tuned[name])

        def run() -> Sample:
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            sample = run_child(command)
            report = json.loads((out / "perta_report.json").read_text())
            phases[name].append(Sample(float(report["phases"]["apply"]["seconds"])))
            return sample

        return run

    whole = alternate({name: contender(name) for name in CONTENDERS}, rounds)
    apply_phase: dict[str, Outcome] = {
        name: outcome if isinstance(outcome, Exception) else phases[name][1:] for name, outcome in whole.items()
    }
    return {WHOLE: whole, PHASE: apply_phase}


@replayed
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("group", [WHOLE, PHASE])
def bench_adapter(
    group: str, contender: str, outcomes: dict[str, dict[str, Outcome]], board: list[Row], benchmark: Any
) -> None:
    """Report wall time and peak memory of the command, and the time of the phase that moves the tensors."""
    outcome = outcomes[group][contender]
    board.append(replay(benchmark, outcome, group=group, contender=contender, role=CONTENDERS[contender]))
