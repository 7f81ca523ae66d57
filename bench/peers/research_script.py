"""The usual research script: loads everything, loops over the parameters, saves everything."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel


def load_model(path: Path) -> PreTrainedModel:
    """Load a checkpoint in the type that it is stored in."""
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


def load_importance(path: Path) -> dict[str, torch.Tensor]:
    """Load all importance shards into one dictionary."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


@torch.no_grad()
def main() -> None:
    """θ_full − λ · |I_f| / (|I_f| + |I_r|) ⊙ (θ_f − θ_0), tensor by tensor in float32."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "base", "tuned", "forget-importance", "retain-importance", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--lam", type=float, default=1.0)
    arguments = parser.parse_args()

    model = load_model(arguments.model)
    base = dict(load_model(arguments.base).named_parameters())
    tuned = dict(load_model(arguments.tuned).named_parameters())
    forget = load_importance(arguments.forget_importance)
    retain = load_importance(arguments.retain_importance)

    for name, parameter in model.named_parameters():
        forget_magnitude = forget[name].float().abs()
        retain_magnitude = retain[name].float().abs()
        weights = forget_magnitude / (forget_magnitude + retain_magnitude)
        weights = torch.nan_to_num(weights, nan=0.0)
        task_vector = tuned[name].float() - base[name].float()
        result = parameter.float() - arguments.lam * weights * task_vector
        parameter.copy_(result.to(parameter.dtype))

    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
