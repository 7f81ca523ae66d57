"""From the tensors of a checkpoint to the parameters of a model.

When transformers loads some families, it renames, joins and divides their tensors (all experts of a layer become one
parameter). Its own conversions are used here, on as few tensors at once as possible.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perta_fast.checkpoints.advice import conversion_command
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.dtypes import KERNEL_CODES, TORCH_NAMES, torch_dtype
from perta_fast.errors import InputError, NotStreamable
from perta_fast.files.reading import PositionReader
from perta_fast.models.same_names import named_as_module, stored_under
from perta_fast.models.stored_names import LoadedGroup, as_stored, loaded_groups


class StoredWeights:
    """Reads the tensors of a model on the meta device from a checkpoint.

    ``shapes``: of every stored tensor that an importance covers, in order.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, parts: Iterable[Sequence[str]]) -> None:
        """Raises InputError, naming the tensor, if one is missing or has another shape."""
        self._model: Any = model
        self._checkpoint = checkpoint
        self._like: dict[str, Tensor] = model.state_dict()
        self._group_of: dict[str, LoadedGroup] = {}
        for group in self._groups():
            try:
                made = group.convert(model, {name: self._entry_like(name) for name in group.stored})
            except InputError:
                raise
            except Exception as error:  # shapes that do not fit together, or a missing tensor
                shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
                raise InputError(f"{checkpoint.path}: {group.why_not(shapes)}") from error
            self._group_of |= dict.fromkeys(made, group)
            for name, tensor in made.items():
                self._check_shape(name, tensor, group)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in as_stored(model, self._parameters(None)).items()}
        self._check_names(parts)
        self._check_ties()

    def read(self, names: Iterable[str], *, pinned: bool = False) -> dict[str, Tensor]:
        """The values of parameters or buffers in the model's types, on the CPU, from the shards.

        Each group of tensors is read by position into new memory; joining it needs as much again. pinned: into
        page-locked memory, each group as soon as it is read, so that one at a time is in memory twice. Raises RunError,
        naming file and tensor, if a shard cannot be read or has become shorter.
        """
        with ExitStack() as stack:
            files = _OpenFiles(stack)
            return self.made_of(
                names,
                lambda stored, dtype: files.read(self._checkpoint.tensors[stored]).to(dtype),
                _pinned if pinned else Tensor.contiguous,
            )

    def made_of(
        self,
        names: Iterable[str],
        tensor: Callable[[str, torch.dtype], Tensor],
        placed: Callable[[Tensor], Tensor] = Tensor.contiguous,
    ) -> dict[str, Tensor]:
        """``read``, with stored tensors from elsewhere.

        tensor: gives one by its name, in a type. placed: gives each value, as soon as it is made, its place.
        """
        wanted = dict.fromkeys(names)
        values: dict[str, Tensor] = {}
        for name in wanted:
            if name not in values:
                group = self._group_of[name]
                dtype = self._like[group.target].dtype
                made = group.convert(self._model, {stored: tensor(stored, dtype) for stored in group.stored})
                values |= {key: placed(made.pop(key)) for key in list(made) if key in wanted}
        return {name: values[name] for name in wanted}

    def plain(self, names: Iterable[str]) -> dict[str, torch.dtype]:
        """The stored tensors that are one of these parameters as they are, and the type in which the model has that."""
        groups = [self._group_of[name] for name in names]
        plain = [group for group in groups if group.converter is None]
        return {stored: self._like[group.target].dtype for group in plain for stored in group.stored}

    def needed(self, names: Iterable[str]) -> list[str]:
        """The stored tensors that these parameters or buffers are made of."""
        return list(dict.fromkeys(stored for name in names for stored in self._group_of[name].stored))

    def names(self, parameters: Iterable[str]) -> list[str]:
        """The stored tensors of these parameters, which must be a whole part of the model."""
        return list(as_stored(self._model, self._parameters(set(parameters))))

    def _groups(self) -> list[LoadedGroup]:
        """``loaded_groups`` of the checkpoint."""
        groups = loaded_groups(self._model, self._checkpoint.tensors)
        # A tied matrix may be stored under the name of its other use alone.
        first = {parameter: name for name, parameter in self._model.named_parameters()}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if name in groups and first[parameter] not in groups:
                groups[name].target = first[parameter]
        return list(groups.values())

    def _parameters(self, names: set[str] | None) -> dict[str, Tensor]:
        """The parameters ``names``, or all, without values."""
        parameters = self._model.named_parameters()
        return {name: parameter.detach() for name, parameter in parameters if names is None or name in names}

    def _entry_like(self, name: str) -> Tensor:
        entry = self._checkpoint.tensors[name]
        if entry.dtype not in TORCH_NAMES:
            raise InputError(f"{self._checkpoint.path}: tensor {name} is {entry.dtype}, not floating point")
        return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device="meta")

    def _check_shape(self, name: str, tensor: Tensor, group: LoadedGroup) -> None:
        like = self._like.get(name)
        if like is not None and like.shape != tensor.shape:
            stored = ", ".join(list(group.stored)[:3])
            made = "" if group.converter is None else f" for {name}"
            calls = f"config.json calls for {list(like.shape)}"
            raise InputError(f"{self._checkpoint.path}: tensor {stored} is {list(tensor.shape)}{made}, {calls}")

    def _check_names(self, parts: Iterable[Sequence[str]]) -> None:
        path = self._checkpoint.path
        view = named_as_module(self._checkpoint, self._model, self.shapes)
        tensors = view.tensors
        buffers = self._like.keys() - dict(self._model.named_parameters(remove_duplicate=False)).keys()
        lacking = (self._parameters(None).keys() | buffers) - self._group_of.keys()
        if lacking:
            raise InputError(f"{path}: lacks tensor {min(lacking)}, which its config.json calls for")
        stored = stored_under(self.shapes, view)
        for name, shape in zip(stored.values(), self.shapes.values(), strict=True):
            if tensors[name].shape != shape:
                raise InputError(
                    f"{path}: tensor {name} is {list(tensors[name].shape)}, transformers would save "
                    f"{list(shape)}; save it anew with: {conversion_command(path)}"
                )
            if tensors[name].dtype not in KERNEL_CODES:
                raise InputError(f"{path}: tensor {name} is {tensors[name].dtype}, not floating point")
        by_part = [name for part in parts for name in self.names(part)]
        if sorted(by_part) != sorted(self.shapes):
            odd = min(set(by_part) ^ self.shapes.keys())
            raise NotStreamable(
                f"{path}: {odd} is stored together with tensors of other parts of the model; streaming does "
                "not understand this model"
            )

    def _check_ties(self) -> None:
        """Raise InputError if the checkpoint has two different tensors for one tied parameter."""
        first = {parameter: name for name, parameter in self._model.named_parameters()}
        checkpoint = self._checkpoint
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if name == first[parameter] or name not in self._group_of:
                continue
            (stored, *_), (partner, *_) = self._group_of[name].stored, self._group_of[first[parameter]].stored
            if not checkpoint.equal(stored, partner):
                raise InputError(f"{checkpoint.path}: {stored} and {partner} differ, but config.json ties them")


def _pinned(value: Tensor) -> Tensor:
    return value.contiguous().pin_memory()


class _OpenFiles:
    """Shards, each opened once and closed with ``stack``."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[Path, PositionReader] = {}

    def read(self, entry: TensorEntry) -> Tensor:
        """A stored tensor in new memory, in its stored type."""
        result = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
        if entry.path not in self._open:
            self._open[entry.path] = self._stack.enter_context(closing(PositionReader(entry.path)))
        buffer = result.view(-1).view(torch.uint8).numpy().data
        self._open[entry.path].read_into(buffer, entry.begin, f"tensor {entry.name}")
        return result
