"""A careful script: the same formula in plain torch, with one tensor of each input in memory."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


class LazyCheckpoint:
    """Reads tensors one by one from a directory of safetensors files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = {file.name: safe_open(file, "pt") for file in path.glob("*.safetensors")}
        self.file_of = {name: file for file, opened in self.files.items() for name in opened.offset_keys()}

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        tensor: torch.Tensor = self.files[self.file_of[name]].get_tensor(name)
        return tensor


@torch.no_grad()
def main() -> None:
    """θ_full − λ · |I_f| / (|I_f| + |I_r|) ⊙ (θ_f − θ_0), tensor by tensor, shard by shard."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "base", "tuned", "forget-importance", "retain-importance", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--lam", type=float, default=1.0)
    arguments = parser.parse_args()

    model = LazyCheckpoint(arguments.model)
    base = LazyCheckpoint(arguments.base)
    tuned = LazyCheckpoint(arguments.tuned)
    forget = LazyCheckpoint(arguments.forget_importance)
    retain = LazyCheckpoint(arguments.retain_importance)
    arguments.out.mkdir(parents=True)

    for file, opened in sorted(model.files.items()):
        results: dict[str, torch.Tensor] = {}
        for name in opened.offset_keys():
            parameter = model.read(name)
            weights = forget.read(name).float().abs_()
            total = retain.read(name).float().abs_().add_(weights)
            weights.div_(total).nan_to_num_(nan=0.0).mul_(arguments.lam)
            update = tuned.read(name).float().sub_(base.read(name).float()).mul_(weights)
            results[name] = parameter.float().sub_(update).to(parameter.dtype)
        save_file(results, arguments.out / file, metadata={"format": "pt"})

    index = arguments.model / "model.safetensors.index.json"
    if index.exists():
        layout = json.loads(index.read_text())
        (arguments.out / index.name).write_text(json.dumps(layout, indent=2))
    shutil.copy(arguments.model / "config.json", arguments.out)


if __name__ == "__main__":
    main()
