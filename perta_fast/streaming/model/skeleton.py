"""A causal language model without its weights, which are read part by part."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.tied import importance_key
from perta_fast.data.batches import Batch
from perta_fast.data.samples import Sample
from perta_fast.dtypes import ITEM_SIZES
from perta_fast.errors import NotStreamable
from perta_fast.models.layouts import Run
from perta_fast.models.running_type import first_type
from perta_fast.models.same_names import named_as_module
from perta_fast.models.stored_names import as_stored
from perta_fast.streaming.model.partial_forward import PartialForward
from perta_fast.streaming.model.stored_weights import StoredWeights
from perta_fast.streaming.model.structure import Structure


@dataclass(frozen=True)
class Skeleton(Structure):
    """A structure with its device, its checkpoint, the reader of its weights, and the runner of its parts."""

    checkpoint: Checkpoint
    device: torch.device
    weights: StoredWeights
    partial_forward: PartialForward

    @classmethod
    def open(cls, path: Path, device: torch.device, dtype: torch.dtype | None) -> "Skeleton":
        """Build the model that ``config.json`` describes, with memory for its buffers only.

        dtype: in which it runs; None takes the checkpoint's own, or float32 (``running_type``). Raises InputError,
        naming what was looked for, if the decoder layers or a tensor cannot be found.
        """
        checkpoint = Checkpoint.open(path)
        structure = Structure.build(path, dtype, first_type(checkpoint), device)
        weights = StoredWeights(structure.model, checkpoint, structure.parts)
        _fill_buffers(structure.model, device, weights, path)
        return cls(
            **vars(structure),
            checkpoint=checkpoint,
            device=device,
            weights=weights,
            partial_forward=PartialForward(structure.model, structure.layers, str(path)),
        )

    @property
    def first_shard(self) -> Path:
        """The weight file that comes first."""
        return next(iter(self.checkpoint.shards.values())).path

    @property
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the checkpoint that an importance covers, in order."""
        return self.weights.shapes

    def covered(self, model: Checkpoint) -> dict[str, list[Run]]:
        """Which elements of ``stored_shapes`` cover a tensor of ``model``, by the names that ``model`` has."""
        names = self.stored_shapes
        view = named_as_module(model, self.model, names)
        covered: dict[str, list[Run]] = {}
        pieces: dict[str, list[tuple[int, Run]]] = {}  # of tensors in another form, from which element on
        for name, entry in view.tensors.items():
            key = importance_key(name, view, names)
            if key is not None and not entry.pieces:
                covered[entry.name] = [Run(key, 0, entry.count)]
            elif key is not None:
                position = 0
                for piece in entry.pieces:
                    whole = model.tensors[piece.name]
                    first = (piece.begin - whole.begin) // ITEM_SIZES[piece.dtype]
                    pieces.setdefault(piece.name, []).append((first, Run(key, position, piece.count)))
                    position += piece.count
        return covered | {name: [run for _, run in sorted(runs, key=itemgetter(0))] for name, runs in pieces.items()}

    def as_stored(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means of whole parts, by parameter name, divided and renamed as the tensors are stored."""
        return as_stored(self.model, dict(means))

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The values of parameters from the shards, pinned if they go to a GPU, where they are read ahead."""
        return self.weights.read(names, pinned=self.device.type == "cuda")

    @torch.no_grad()
    def check_chain(self, samples: Iterable[Sample]) -> None:
        """Raise InputError unless the layers are a chain; tried on the shortest sample, if there is one.

        The vocabulary and what is resident must be in memory.
        """
        shortest = min(samples, key=lambda sample: len(sample.input_ids), default=None)
        if shortest is not None:
            batch = Batch.of([shortest], self.device)
            self.partial_forward.check(batch.input_ids, batch.attention_mask, [])

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Give parameters these values inside the context."""
        uses_of: dict[Any, list[tuple[nn.Module, str]]] = {}
        before = {p: name for name, p in self.model.named_parameters() if name in values}
        for module in self.model.modules():
            for key, parameter in module._parameters.items():
                if parameter in before:
                    uses_of.setdefault(parameter, []).append((module, key))
        try:
            for parameter, uses in uses_of.items():
                value = nn.Parameter(values[before[parameter]].to(self.device, non_blocking=True))
                for module, key in uses:
                    module._parameters[key] = value
            yield
        finally:
            for parameter, uses in uses_of.items():
                for module, key in uses:
                    module._parameters[key] = parameter

    @contextmanager
    def in_memory(self, names: Sequence[str]) -> Iterator[None]:
        """Give the parameters ``names`` their values inside the context."""
        with self.holding(self.weights.read(names)):
            yield


def _fill_buffers(model: nn.Module, device: torch.device, weights: StoredWeights, path: Path) -> None:
    """Read the stored buffers; the model's own code fills the others, such as rotary frequencies."""
    stored = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                unset = float("nan") if buffer.is_floating_point() else 0
                module._buffers[key] = torch.full_like(buffer, unset, device=device)
        module.__dict__.pop("_is_hf_initialized", None)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()  # type: ignore[operator]
    buffers = dict(model.named_buffers())
    for name, value in weights.read(sorted(stored)).items():
        buffers[name].copy_(value)
    for name, buffer in buffers.items():
        if name not in stored and buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise NotStreamable(f"{path}: nothing gives buffer {name} a value without the weights")
