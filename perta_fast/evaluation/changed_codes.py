"""How many codes of rounded weights an unlearning has changed: those it has not are as they were, once quantised."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.quantised import open_plain
from perta_fast.dtypes import KERNEL_CODES
from perta_fast.errors import InputError
from perta_fast.models.rounding import BITS, codes, linear_weights
from perta_fast.models.same_names import named_as_module
from perta_fast.models.stored_names import as_stored
from perta_fast.progress import Bar, Progress


def changed_codes(module: nn.Module, directory: Path, before: Path, progress: Progress) -> dict[str, Any]:
    """Of each stored weight of a linear map, how many codes of the two checkpoints differ, by 8 and by 4 bits.

    module: loaded from ``directory``. Returns ``before`` (its path), ``tensors`` (by name: ``elements`` and, by
    ``int8`` and ``int4``, how many codes differ) and ``share`` (by these, of all elements). Scales do not count. Reads
    both tensor by tensor; memory: a few float32 copies of one tensor. Raises InputError, naming the tensor, if
    ``before`` lacks one or has another shape, or a value is not finite.
    """
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in module.named_parameters()}
    stored = as_stored(module, shapes)
    own, other = (named_as_module(open_plain(path), module, stored) for path in (directory, before))
    transposed = {
        name: weight.transposed
        for parameter, weight in linear_weights(module).items()
        for name in as_stored(module, {parameter: shapes[parameter]})
    }
    for name in transposed:
        _check_alike(name, own, other)
    tensors: dict[str, dict[str, int]] = {}
    with Bar(sum(2 * own.tensors[name].size for name in transposed), "codes", progress) as bar:
        for name, turned in transposed.items():
            weights = [_finite(checkpoint, name, turned) for checkpoint in (own, other)]
            tensors[name] = {"elements": weights[0].numel()} | {
                f"int{bits}": _different(weights, bits) for bits in BITS
            }
            bar.update(2 * own.tensors[name].size)
    total = sum(row["elements"] for row in tensors.values())
    share = {kind: sum(row[kind] for row in tensors.values()) / max(total, 1) for kind in map("int{}".format, BITS)}
    return {"before": str(other.path.resolve()), "share": share, "tensors": tensors}


def _check_alike(name: str, own: Checkpoint, other: Checkpoint) -> None:
    """Raise InputError unless both have this tensor, as float numbers of one shape."""
    for checkpoint in (own, other):
        if name not in checkpoint.tensors:
            raise InputError(f"{checkpoint.path}: has no tensor {name}, so its codes cannot be counted")
        entry = checkpoint.tensors[name]
        if entry.dtype not in KERNEL_CODES:
            raise InputError(f"{entry.path}: tensor {name} is {entry.dtype}; it must be float32, bfloat16 or float16")
    shapes = [list(checkpoint.tensors[name].shape) for checkpoint in (own, other)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{other.path}: tensor {name} has shape {shapes[1]}, the model's has {shapes[0]}; give the model that this "
            "one was unlearned from"
        )


def _finite(checkpoint: Checkpoint, name: str, transposed: bool) -> Tensor:
    """The tensor as (..., out, in)."""
    weight = checkpoint.tensor(name)
    if not weight.isfinite().all():
        raise InputError(f"{checkpoint.tensors[name].path}: tensor {name} has values that are not finite")
    return weight.transpose(-1, -2) if transposed else weight


def _different(weights: Sequence[Tensor], bits: int) -> int:
    own, other = (codes(weight, bits)[0] for weight in weights)
    return int((own != other).sum())
