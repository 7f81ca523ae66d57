"""Adapters of every kind, made by peft on small models, and what the tuned model computes."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from perta_fast import apply
from tests.support.checkpoints import draw
from tests.support.models import nudge_

Build = Callable[[], PreTrainedModel]
IDS = torch.arange(3, 27).view(2, 12)


def write_adapter(
    folder: Path,
    build: Build,
    config: PeftConfig,
    dtype: torch.dtype = torch.float32,
    loads: Any = AutoModelForCausalLM,
) -> Path:
    """Write base and model, and an adapter with values in all of its tensors."""
    base = build().to(dtype)
    base.save_pretrained(folder / "base")
    model = build()
    nudge_(model, 1)
    model.to(dtype).save_pretrained(folder / "model")
    adapted = get_peft_model(loads.from_pretrained(folder / "base"), config)
    with torch.no_grad():
        for number, parameter in enumerate(adapted.parameters()):
            if parameter.requires_grad:
                parameter.add_(draw(tuple(parameter.shape), seed=number).to(parameter) * 0.05)
    adapted.save_pretrained(folder / "adapter")
    return folder / "adapter"


def change_settings(adapter: Path, **changes: Any) -> None:
    """Rewrite the config of an adapter."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tuned_model(base: Path, adapter: Path) -> Any:
    """The tuned model as peft loads it, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return PeftModel.from_pretrained(model, adapter).float().eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """What a model computes for ``IDS``."""
    result: Tensor = model.eval()(IDS).logits
    return result


def logits_of(checkpoint: Path) -> Tensor:
    """What the model of a checkpoint computes, in float32."""
    return logits(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))


def write_theta_f(base: Path, tuned: Path, out: Path, model: Path | None = None) -> Path:
    """θ_f itself: the base less -1 times the task vector."""
    apply(model or base, base, tuned, rule="tv", lam=-1.0, out=out, progress=False)
    return out


def run_advice(message: str, *, by_shell: bool = False) -> None:
    """Run the command at the end of a message: the program in this process, or all of it as it is printed."""
    if not by_shell:
        program = shlex.split("python -c " + message.rpartition("python -c ")[2])
        exec(program[2], {})
        return
    command = "python -c " + message.rpartition("python -c ")[2]
    python = shlex.quote(sys.executable)
    done = subprocess.run(
        ["sh", "-c", command.replace("python", python, 1)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
