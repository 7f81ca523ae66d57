"""The task vector of a checkpoint, read, changed and written with one decoder layer in memory at a time."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.tied import importance_key
from perta_fast.errors import InputError
from perta_fast.files.durable import sync
from perta_fast.files.hashing import hash_file
from perta_fast.files.new_directory import START_OVER
from perta_fast.models.stored_names import as_stored, load_tensor
from perta_fast.preconditioning.unfinished import Begun, DamagedWalk
from perta_fast.preconditioning.vectors import Change, Norms, check_values, oriented
from perta_fast.streaming.model.stored_weights import StoredWeights
from perta_fast.streaming.model.structure import Structure
from perta_fast.streaming.scratch_files import ScratchFiles
from perta_fast.tuning.checkpoint import copy_beside
from perta_fast.tuning.saving import disk_errors

_INDEX = "model.safetensors.index.json"


class LayerVector:
    """That of the linear maps of ``tuned``; the result has a shard for each decoder layer, all of it float32.

    The maps are to be changed layer by layer, in the order of the model. Memory: two layers in float32.
    shards: the hash of the shard of each layer that has ended, "" if it has none.
    """

    def __init__(self, names: Sequence[str], base: Checkpoint, tuned: Checkpoint, directory: Path) -> None:
        """Raise InputError, naming the tensor, if one of the two lacks a tensor or has another shape."""
        self._names, self.norms = names, Norms()
        self._base, self._directory = base, directory
        self._structure = Structure.build(base.path, torch.float32)
        self._theta_0 = StoredWeights(self._structure.model, base, self._structure.parts)
        of_tuned = Structure.build(tuned.path, torch.float32)  # its vocabulary may have another size
        self._theta_f = StoredWeights(of_tuned.model, tuned, of_tuned.parts)
        self._tuned = tuned.path
        outside = [self._structure.resident, *([name] for name in self._structure.vocabulary)]
        self._parts = [*self._structure.by_layer, *outside]
        self._layer_of = {name: k for k, layer in enumerate(self._structure.by_layer) for name in layer}
        self._changed: dict[str, Tensor] = {}  # of the layer that is going on
        self.shards: list[str] = []

    @property
    def names(self) -> Sequence[str]:
        """All linear maps, in the order of the model."""
        return self._names

    def change(self, name: str, change: Change) -> None:
        weight = f"{name}.weight"
        assert len(self.shards) == self._layer_of[weight]
        layer = self._structure.model.get_submodule(name)
        theta_0, theta_f = (reader.read([weight])[weight] for reader in (self._theta_0, self._theta_f))
        if theta_f.shape != theta_0.shape:
            raise InputError(f"{self._tuned}: tensor {weight} has another shape than in {self._base.path}")
        vector = theta_f - theta_0
        check_values(vector, self._tuned, weight)
        changed = oriented(layer, change(oriented(layer, vector)).cpu())
        self._changed[weight] = theta_0 + changed
        self.norms.add(vector, changed)

    def write(self, directory: Path) -> None:
        assert directory == self._directory
        names = [self._theta_0.names(part) for part in self._parts]
        for number in range(len(self.shards), len(self._parts)):
            self._write_part(number)
        covered = self._theta_0.shapes
        names.append([name for name in self._base.tensors if importance_key(name, self._base, covered) is None])
        self._save(len(self._parts), {name: load_tensor(self._base.tensors[name]) for name in names[-1]})  # buffers
        copy_beside(self._base, directory)
        weight_map = {name: _shard_name(number) for number, of_shard in enumerate(names) for name in of_shard}
        index = {"metadata": {}, "weight_map": weight_map}
        if self._base.index is not None:
            (directory / self._base.index.name).unlink(missing_ok=True)
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def end_layer(self, scratch: ScratchFiles) -> None:
        """Write the shard of a layer whose maps are changed, durably."""
        path = self._write_part(len(self.shards))
        if path is not None:
            sync(path)
            sync(path.parent)
        self.shards.append("" if path is None else hash_file(path))

    def restore(self, begun: Begun, maps: Sequence[str], scratch: ScratchFiles, advance: Callable[[int], Any]) -> None:
        """Go on after the layers that ``begun`` names. Raises DamagedWalk if one of their shards has changed."""
        if len(begun.shards) != begun.done:
            raise DamagedWalk(f"{self._directory}: the record of its layers is damaged; {START_OVER}")
        for number, digest in enumerate(begun.shards):
            path = self._directory / _shard_name(number)
            if digest and not (path.is_file() and hash_file(path, advance) == digest):
                raise DamagedWalk(f"{path}: is not what the run wrote; {START_OVER}")
        self.shards = list(begun.shards)

    def written(self, begun: Begun) -> list[Path]:
        """The files that ``restore`` reads."""
        return [self._directory / _shard_name(number) for number, digest in enumerate(begun.shards) if digest]

    def _write_part(self, number: int) -> Path | None:
        """Write a layer, or what lies outside all layers."""
        names = self._parts[number]
        values = self._theta_0.read([name for name in names if name not in self._changed])
        tensors = as_stored(self._structure.model, values | self._changed)
        self._changed = {}
        return self._save(number, tensors)

    def _save(self, number: int, tensors: dict[str, Tensor]) -> Path | None:
        path = self._directory / _shard_name(number)
        path.unlink(missing_ok=True)  # half of a layer that was going on when the run was stopped
        if not tensors:
            return None
        with disk_errors():
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
        return path


def _shard_name(number: int) -> str:
    return f"model-{number:05d}.safetensors"
