"""A causal language model without its weights, which are read when their turn comes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.dtypes import KERNEL_CODES, torch_dtype
from perta_fast.errors import InputError
from perta_fast.models.stored_names import as_stored
from perta_fast.streaming.model.stored_weights import StoredWeights
from perta_fast.streaming.model.structure import Structure


@dataclass(frozen=True)
class Skeleton(Structure):
    """A structure, the device it is run on, and the checkpoint that holds its weights."""

    checkpoint: Checkpoint
    device: torch.device
    weights: StoredWeights

    @classmethod
    def open(cls, path: Path, device: torch.device, dtype: torch.dtype | None) -> "Skeleton":
        """Build the model that ``config.json`` describes, with memory for its buffers alone.

        dtype: what it is run in; None takes the checkpoint's own. Raises InputError for a model whose decoder
        layers or tensors cannot be told apart, naming what was looked for.
        """
        checkpoint = Checkpoint.open(path)
        structure = Structure.build(path, dtype, _first_type(checkpoint))
        weights = StoredWeights(structure.model, checkpoint, structure.parts)
        _fill_buffers(structure.model, device, weights, path)
        return cls(**vars(structure), checkpoint=checkpoint, device=device, weights=weights)

    @property
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint that an importance covers, in its order."""
        return self.weights.shapes

    def stored_names(self, names: Sequence[str]) -> list[str]:
        """The stored tensors that these parameters, a whole part, make up."""
        return self.weights.names(names)

    def as_stored(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means of whole parts, by parameter name, as the stored tensors: cut up and renamed."""
        return as_stored(self.model, dict(means))

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The values of parameters, from the shards (``StoredWeights.read``); pinned on their way to a GPU."""
        values = self.weights.read(names)
        if self.device.type == "cuda":
            return {name: value.pin_memory() for name, value in values.items()}
        return values

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Parameters have these values while the context lasts."""
        places: dict[Any, list[tuple[nn.Module, str]]] = {}
        before = {p: name for name, p in self.model.named_parameters() if name in values}
        for part in self.model.modules():
            for key, parameter in part._parameters.items():
                if parameter in before:
                    places.setdefault(parameter, []).append((part, key))
        try:
            for parameter, uses in places.items():
                value = nn.Parameter(values[before[parameter]].to(self.device, non_blocking=True))
                for part, key in uses:
                    part._parameters[key] = value
            yield
        finally:
            for parameter, uses in places.items():
                for part, key in uses:
                    part._parameters[key] = parameter

    @contextmanager
    def in_memory(self, names: Sequence[str]) -> Iterator[None]:
        """The parameters ``names`` have their values while the context lasts."""
        with self.holding(self.read(names)):
            yield


def _first_type(checkpoint: Checkpoint) -> torch.dtype:
    """What ``from_pretrained`` takes for the type of a model whose configuration names none."""
    named = (entry.dtype for entry in checkpoint.tensors.values())
    return next((torch_dtype(dtype) for dtype in named if dtype in KERNEL_CODES), torch.float32)


def _fill_buffers(model: nn.Module, device: torch.device, weights: StoredWeights, path: Path) -> None:
    """Read the buffers that are stored; let the model's own code fill the others (rotary frequencies)."""
    stored = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    for part in model.modules():
        for key, buffer in part._buffers.items():
            if buffer is not None:
                unset = float("nan") if buffer.is_floating_point() else 0
                part._buffers[key] = torch.full_like(buffer, unset, device=device)
        part.__dict__.pop("_is_hf_initialized", None)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()  # type: ignore[operator]
    buffers = dict(model.named_buffers())
    for name, value in weights.read(sorted(stored)).items():
        buffers[name].copy_(value)
    for name, buffer in buffers.items():
        if name not in stored and buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise InputError(f"{path}: nothing gives buffer {name} a value without the weights")
