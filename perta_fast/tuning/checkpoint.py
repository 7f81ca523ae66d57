"""A tuned model as a checkpoint with the tensors, names and shards of its base."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.companions import CONFIG, copy_companions
from perta_fast.checkpoints.configuration import read_config
from perta_fast.checkpoints.tied import importance_key
from perta_fast.models.stored_names import as_stored, load_tensor
from perta_fast.records.file_hashes import HASHES
from perta_fast.records.report import FILE_NAME
from perta_fast.tuning.saving import disk_errors


def copy_beside(base: Checkpoint, directory: Path) -> None:
    """Copy what lies beside the weights of ``base``, but for the records of a run that has made it.

    The config says float32, in which the weights are written.
    """
    copy_companions(base, directory)
    for name in (FILE_NAME, HASHES):
        (directory / name).unlink(missing_ok=True)
    _name_type(directory)


@torch.no_grad()
def write_tuned(module: nn.Module, base: Checkpoint, directory: Path) -> None:
    """Write ``base`` with the parameters of ``module``, in float32; copy what ``module`` lacks, such as buffers.

    Names of wrappers are left out, since transformers does not know them. A type of 16 bits would lose much of a short
    tuning: 15 steps at 1e-5 move half of all parameters by less than the spacing of bfloat16. Memory: one shard.
    """
    tuned = as_stored(module, dict(module.named_parameters()))
    copy_beside(base, directory)
    total = 0
    for shard in base.shards.values():
        tensors = {}
        for name, entry in shard.tensors.items():
            key = importance_key(name, base, tuned)
            tensors[name] = load_tensor(entry) if key is None else tuned[key].to("cpu", copy=True)
        with disk_errors():
            save_file(tensors, directory / shard.path.name, dict(shard.metadata))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if base.index is not None:
        path = directory / base.index.name
        index = json.loads(path.read_bytes())
        index["weight_map"] = {name: entry.path.name for name, entry in base.tensors.items()}
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _name_type(directory: Path) -> None:
    """Let config.json say float32: transformers loads a checkpoint in the type named there, not that of its tensors."""

    def named(settings: dict[str, Any]) -> dict[str, Any]:
        types = dict.fromkeys(settings.keys() & {"dtype", "torch_dtype"}, "float32")
        parts = {
            key: named(value) for key, value in settings.items() if key.endswith("_config") and isinstance(value, dict)
        }
        return settings | parts | types

    if (config := read_config(directory)) is not None:
        (directory / CONFIG).write_text(json.dumps(named(config), indent=2) + "\n", encoding="utf-8")
