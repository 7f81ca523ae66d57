"""The task vector of linear maps, read from an adapter or a checkpoint, and written with other values."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from perta_fast.progress import Progress
from perta_fast.tuning.checkpoint import write_tuned
from perta_fast.tuning.saving import disk_errors

Change = Callable[[Tensor], Tensor]  # of (rows, d_in)


@dataclass
class Norms:
    """The squared norm of the task vector of all linear maps, before and after."""

    before: float = 0.0
    after: float = 0.0

    @property
    def kept(self) -> float:
        """The norm after, as a share of that before."""
        return (self.after / self.before) ** 0.5 if self.before else 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Count one matrix."""
        self.before += float(before.double().square().sum())
        self.after += float(after.double().square().sum())


class TaskVector(Protocol):
    """Theta_f - theta_0 of some linear maps of a model, which becomes another one map by map."""

    norms: Norms

    @property
    def names(self) -> Sequence[str]:
        """Of the maps, in the order of the model."""

    def change(self, name: str, change: Change) -> None:
        """Change the rows of one map."""

    def write(self, directory: Path) -> None:
        """Write theta_f with what was changed into ``directory``."""


@dataclass
class LowRankVector:
    """That of a LoRA adapter: only A meets the inputs, so only A changes."""

    adapter: Adapter
    updates: Mapping[str, LowRank]  # by the names of the maps
    changed: dict[str, Tensor] = field(default_factory=dict)  # by the names in the file
    norms: Norms = field(default_factory=Norms)

    @classmethod
    def of(cls, adapter: Adapter, module: nn.Module, maps: Mapping[str, nn.Module], base: Path) -> "LowRankVector":
        """Raise InputError, naming the tensor, unless the adapter is plain LoRA of ``maps``."""
        check_low_rank(adapter)
        path = adapter.checkpoint.path
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
        return cls(adapter, {name: updates[name] for name in maps if name in updates})

    def anew(self) -> "LowRankVector":
        """The same with nothing changed."""
        return replace(self, changed={}, norms=Norms())

    @property
    def names(self) -> list[str]:
        """The adapted maps, in the order of the model."""
        return list(self.updates)

    def change(self, name: str, change: Change) -> None:
        update = self.updates[name]
        a, b = (load_tensor(factor).float() for factor in (update.a, update.b))
        for factor, tensor in ((update.a, a), (update.b, b)):
            check_values(tensor, factor.path, factor.name)
        changed = change(a).cpu()
        self.changed[update.a.name] = changed
        self.norms.before += update.scale**2 * _squared_norm(b, a)
        self.norms.after += update.scale**2 * _squared_norm(b, changed)

    def write(self, directory: Path) -> None:
        tensors = {name: load_tensor(entry) for name, entry in self.adapter.checkpoint.tensors.items()} | self.changed
        with disk_errors():
            save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
        shutil.copyfile(self.adapter.config, directory / self.adapter.config.name)


def check_low_rank(adapter: Adapter) -> None:
    """Raise InputError, naming the tensor, unless the adapter is plain LoRA."""
    for name in (*adapter.whole, *adapter.by_peft):
        raise _not_linear(adapter.checkpoint.path, name)


class FullVector:
    """That of a checkpoint. It holds theta_0, which becomes the result, and theta_f, both in float32."""

    def __init__(
        self, names: Sequence[str], base: Checkpoint, tuned: Path, device: torch.device, progress: Progress = False
    ) -> None:
        """Raise InputError, naming the tensor, if one of the maps has another shape in ``tuned``."""
        self._names, self.norms = names, Norms()
        self._base, self._path = base, tuned
        self._module: Any = load_subject(base.path, device, torch.float32, text=False, progress=progress).module
        theta_f: Any = load_subject(tuned, device, torch.float32, text=False, progress=progress).module
        self._tuned = dict(theta_f.named_parameters())
        for name in names:
            weight, other = self._module.get_parameter(f"{name}.weight"), self._tuned.get(f"{name}.weight")
            if other is None or other.shape != weight.shape:
                shape = "none" if other is None else list(other.shape)
                raise InputError(
                    f"{tuned}: tensor {name}.weight is {shape}, but {list(weight.shape)} in {base.path}; was "
                    "tuned made from this base?"
                )

    @property
    def names(self) -> Sequence[str]:
        """All linear maps, in the order of the model."""
        return self._names

    @torch.no_grad()
    def change(self, name: str, change: Change) -> None:
        layer = self._module.get_submodule(name)
        vector = self._tuned[f"{name}.weight"] - layer.weight
        check_values(vector, self._path, f"{name}.weight")
        changed = oriented(layer, change(oriented(layer, vector)))
        layer.weight += changed
        self.norms.add(vector, changed)

    def write(self, directory: Path) -> None:
        write_tuned(self._module, self._base, directory)


def check_values(tensor: Tensor, path: Path, name: str) -> None:
    """Raise InputError unless all values of what ``tuned`` or the base has under ``name`` are finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{path}: tensor {name}, or that of the base, has NaN or infinite values; give a sound copy")


def oriented(layer: nn.Module, matrix: Tensor) -> Tensor:
    """(d_out, d_in) from how a map stores it, or back; Conv1D stores (d_in, d_out)."""
    return matrix if isinstance(layer, nn.Linear) else matrix.T


def _squared_norm(b: Tensor, a: Tensor) -> float:
    """|b a|² without the product: b (rows, rank), a (rank, columns)."""
    b, a = b.double(), a.double()
    return float(((b.T @ b) * (a @ a.T)).sum())


def _not_linear(path: Path, name: str) -> InputError:
    return InputError(
        f"{path}: changes {name}, which is not plain LoRA of a linear map; only such adapters can be preconditioned, "
        "as perta tune makes them, or whole checkpoints (perta tune with ‹full›). Other adapters need another rule"
    )
