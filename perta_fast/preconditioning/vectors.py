"""The task vector of linear maps, read from an adapter or a checkpoint, and written with other values."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from perta_fast.checkpoints.adapters import Adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.low_rank import LowRank
from perta_fast.errors import InputError
from perta_fast.models.loading import load_subject
from perta_fast.models.stored_names import load_tensor
from perta_fast.preconditioning.input_moments import in_size
from perta_fast.tuning.checkpoint import write_tuned
from perta_fast.tuning.saving import disk_errors

Change = Callable[[str, Tensor], Tensor]  # of (rows, d_in), for the map of this name


@dataclass
class Norms:
    """The squared norm of the task vector of all linear maps, before and after."""

    before: float = 0.0
    after: float = 0.0

    @property
    def kept(self) -> float:
        """The norm after, as a share of that before."""
        return (self.after / self.before) ** 0.5 if self.before else 0.0


class TaskVector(Protocol):
    """Theta_f - theta_0 of the linear maps of a model."""

    maps: Mapping[str, nn.Module]  # those that it changes, by name

    def write(self, directory: Path, change: Change) -> Norms:
        """Write theta_f into ``directory`` with changed rows of the task vector."""


@dataclass
class LowRankVector:
    """That of a LoRA adapter: only A meets the inputs, so only A changes."""

    adapter: Adapter
    maps: Mapping[str, nn.Module]
    updates: Mapping[str, LowRank]  # by the same names

    @classmethod
    def of(cls, adapter: Adapter, module: nn.Module, maps: Mapping[str, nn.Module], base: Path) -> "LowRankVector":
        """Raise InputError, naming the tensor, unless the adapter is plain LoRA of ``maps``."""
        path = adapter.checkpoint.path
        for name in (*adapter.whole, *adapter.by_peft):
            raise _not_linear(path, name)
        weights = {f"{name}.weight": name for name in maps}
        parameters = dict(module.named_parameters())
        updates: dict[str, LowRank] = {}
        for name, update in adapter.low_rank.items():
            stored = adapter.name_in(name, parameters, base)
            if stored not in weights:
                raise _not_linear(path, name)
            size = in_size(maps[weights[stored]])
            if update.a.shape[1] != size:
                raise InputError(
                    f"{update.a.path}: tensor {update.a.name} is for inputs of {update.a.shape[1]} numbers, but "
                    f"{stored} in {base} takes {size}; is that the checkpoint that the adapter was tuned from?"
                )
            updates[weights[stored]] = update
        return cls(adapter, {name: maps[name] for name in updates}, updates)

    def write(self, directory: Path, change: Change) -> Norms:
        tensors = {name: load_tensor(entry) for name, entry in self.adapter.checkpoint.tensors.items()}
        norms = Norms()
        for name, update in self.updates.items():
            a, b = (tensors[factor.name].float() for factor in (update.a, update.b))
            changed = change(name, a).cpu()
            tensors[update.a.name] = changed
            norms.before += update.scale**2 * _squared_norm(b, a)
            norms.after += update.scale**2 * _squared_norm(b, changed)
        with disk_errors():
            save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
        shutil.copyfile(self.adapter.config, directory / self.adapter.config.name)
        return norms


@dataclass
class FullVector:
    """That of a checkpoint. ``module`` is theta_0 in float32, and becomes the result."""

    module: nn.Module
    maps: Mapping[str, nn.Module]
    base: Checkpoint
    tuned: Path

    @torch.no_grad()
    def write(self, directory: Path, change: Change) -> Norms:
        tuned: Any = load_subject(self.tuned, next(self.module.parameters()).device, torch.float32, text=False).module
        parameters = dict(tuned.named_parameters())
        norms = Norms()
        for name, layer in self.maps.items():
            weight: Any = layer.weight
            other = parameters.get(f"{name}.weight")
            if other is None or other.shape != weight.shape:
                shape = "none" if other is None else list(other.shape)
                raise InputError(
                    f"{self.tuned}: tensor {name}.weight is {shape}, but {list(weight.shape)} in {self.base.path}; was "
                    "tuned made from this base?"
                )
            stored_in_out = not isinstance(layer, nn.Linear)
            vector = other - weight
            changed = change(name, vector.T if stored_in_out else vector)
            weight += changed.T if stored_in_out else changed
            norms.before += float(vector.double().square().sum())
            norms.after += float(changed.double().square().sum())
        write_tuned(self.module, self.base, directory)
        return norms


def _squared_norm(b: Tensor, a: Tensor) -> float:
    """|b a|² without the product: b (rows, rank), a (rank, columns)."""
    b, a = b.double(), a.double()
    return float(((b.T @ b) * (a @ a.T)).sum())


def _not_linear(path: Path, name: str) -> InputError:
    return InputError(
        f"{path}: changes {name}, which is not plain LoRA of a linear map; only such adapters can be preconditioned, "
        "as perta tune makes them, or whole checkpoints (perta tune --full)"
    )
