"""From the tensors of a checkpoint to the parameters of a model, and the order back.

transformers renames, joins and cuts the tensors of some families when it loads them (all experts of a layer
become one parameter). Its own conversions are used, on as few tensors at a time as they take.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perta_fast.checkpoints.advice import conversion_command
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.dtypes import KERNEL_CODES, TORCH_NAMES, torch_dtype
from perta_fast.errors import InputError
from perta_fast.files.reading import PositionReader
from perta_fast.models.stored_names import as_stored


@dataclass
class _Group:
    """Stored tensors that become one or more of the model's, the first of them ``target``, by ``converter``.

    converter: None for a tensor that is stored as it is. ``stored``: names, with the pattern that each met.
    """

    target: str
    converter: Any
    stored: dict[str, str] = field(default_factory=dict)

    def convert(self, model: Any, read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors, made of all that this group names in ``read``."""
        if self.converter is None:
            return {self.target: read[next(iter(self.stored))]}
        converter = deepcopy(self.converter)  # it keeps what it is given
        for name, pattern in self.stored.items():
            converter.add_tensor(self.target, name, pattern, read[name])
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}


class StoredWeights:
    """Where a checkpoint holds each tensor of a model on the meta device.

    ``shapes``: every stored tensor that an importance covers, in its order.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, parts: Iterable[Sequence[str]]) -> None:
        """Raises InputError, naming the tensor, if the checkpoint lacks one or stores it in another shape."""
        self._model: Any = model
        self._checkpoint = checkpoint
        self._like: dict[str, Tensor] = model.state_dict()
        self._group_of: dict[str, _Group] = {}
        for group in self._groups():
            try:
                made = group.convert(model, {name: self._entry_like(name) for name in group.stored})
            except InputError:
                raise
            except Exception as error:  # shapes that do not go together, or a tensor that is missing
                raise InputError(f"{checkpoint.path}: {self._why_not(group)}") from error
            self._group_of |= dict.fromkeys(made, group)
            for name, tensor in made.items():
                self._check_shape(name, tensor, group)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in as_stored(model, self._parameters(None)).items()}
        self._check_names(parts)
        self._check_ties()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The values of parameters or buffers in the model's types, on the CPU, from the shards.

        Each group of tensors is read by position into fresh memory; while it is joined, both forms are held.
        Raises RunError naming file and tensor if a shard cannot be read, or has been cut short meanwhile.
        """
        names = list(names)
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            files = _OpenFiles(stack)
            for name in names:
                if name not in found:
                    group = self._group_of[name]
                    dtype = self._like[group.target].dtype
                    entries = {each: self._checkpoint.tensors[each] for each in group.stored}
                    read = {each: files.read(entry).to(dtype) for each, entry in entries.items()}
                    found |= group.convert(self._model, read)
        return {name: found[name].contiguous() for name in names}

    def names(self, parameters: Iterable[str]) -> list[str]:
        """The stored tensors that these parameters, a whole part of the model, make up."""
        return list(as_stored(self._model, self._parameters(set(parameters))))

    def _groups(self) -> list[_Group]:
        """How ``from_pretrained`` would put the checkpoint's tensors together, in its order."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        model, like = self._model, self._like
        mapping = get_model_conversion_mapping(model)
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        groups: dict[str, _Group] = {}
        for name in sorted(self._checkpoint.tensors, key=dot_natural_key):
            prefix = model.base_model_prefix
            target, pattern = rename_source_key(name, renamings, converters, prefix, like)
            if target not in like and name in like:
                target, pattern = rename_source_key(name, [], [], prefix, like)
            if target in like:
                converter = None if pattern is None else by_pattern[pattern]
                groups.setdefault(target, _Group(target, converter)).stored[name] = pattern or name
        model._weight_conversions = [each for each in mapping if each.was_used()]  # for the way back
        return list(groups.values())

    def _parameters(self, names: set[str] | None) -> dict[str, Tensor]:
        """Stand-ins for the parameters ``names``, or for all."""
        return {
            name: parameter.detach()
            for name, parameter in self._model.named_parameters()
            if names is None or name in names
        }

    def _entry_like(self, name: str) -> Tensor:
        entry = self._checkpoint.tensors[name]
        if entry.dtype not in TORCH_NAMES:
            raise InputError(f"{self._checkpoint.path}: tensor {name} is {entry.dtype}, not floating point")
        return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device="meta")

    def _why_not(self, group: _Group) -> str:
        """What keeps a group's tensors from being joined: an odd one among like ones, or their number."""
        alike: dict[str, list[str]] = {}
        for name, pattern in group.stored.items():
            alike.setdefault(pattern, []).append(name)
        for names in alike.values():
            shapes = Counter(self._checkpoint.tensors[name].shape for name in names)
            (most, _), (least, _) = shapes.most_common()[0], shapes.most_common()[-1]
            if most != least:
                odd = next(name for name in names if self._checkpoint.tensors[name].shape == least)
                return f"tensor {odd} is {list(least)}, those that it is joined with are {list(most)}"
        counts = ", ".join(f"{len(names)} of {pattern}" for pattern, names in alike.items())
        return f"{group.target} cannot be made of {counts}"

    def _check_shape(self, name: str, tensor: Tensor, group: _Group) -> None:
        like = self._like.get(name)
        stored = ", ".join(list(group.stored)[:3])
        if like is None or like.shape == tensor.shape:
            return
        made = "" if group.converter is None else f" for {name}"
        raise InputError(
            f"{self._checkpoint.path}: tensor {stored} is {list(tensor.shape)}{made}, config.json calls for "
            f"{list(like.shape)}"
        )

    def _check_names(self, parts: Iterable[Sequence[str]]) -> None:
        path, tensors = self._checkpoint.path, self._checkpoint.tensors
        buffers = self._like.keys() - dict(self._model.named_parameters(remove_duplicate=False)).keys()
        lacking = (self._parameters(None).keys() | buffers) - self._group_of.keys()
        if lacking:
            raise InputError(f"{path}: lacks tensor {min(lacking)}, which its config.json calls for")
        renamed = [name for name in self.shapes if name not in tensors]
        if renamed:
            raise InputError(
                f"{path}: lacks tensor {renamed[0]}, the name that transformers now gives to one of its own; "
                f"save it anew with: {conversion_command(path)}"
            )
        for name, shape in self.shapes.items():
            if tensors[name].shape != shape:
                raise InputError(
                    f"{path}: tensor {name} is {list(tensors[name].shape)}, transformers would save "
                    f"{list(shape)}; save it anew with: {conversion_command(path)}"
                )
            if tensors[name].dtype not in KERNEL_CODES:
                raise InputError(f"{path}: tensor {name} is {tensors[name].dtype}, not floating point")
        apart = [name for part in parts for name in self.names(part)]
        if sorted(apart) != sorted(self.shapes):
            odd = min(set(apart) ^ self.shapes.keys())
            raise InputError(
                f"{path}: {odd} is stored together with tensors of other parts of the model; streaming does "
                "not understand this model"
            )

    def _check_ties(self) -> None:
        """Raise InputError if the checkpoint holds two different tensors for what the model has once."""
        first = {parameter: name for name, parameter in self._model.named_parameters()}
        checkpoint = self._checkpoint
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if name == first[parameter] or name not in self._group_of:
                continue
            (one, *_), (other, *_) = self._group_of[name].stored, self._group_of[first[parameter]].stored
            if not checkpoint.equal(one, other):
                raise InputError(f"{checkpoint.path}: {one} and {other} differ, but config.json ties them")


class _OpenFiles:
    """Shards opened once each, closed with ``stack``."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[Path, PositionReader] = {}

    def read(self, entry: TensorEntry) -> Tensor:
        """A stored tensor in fresh memory, in the type it is stored in."""
        result = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
        if entry.path not in self._open:
            self._open[entry.path] = self._stack.enter_context(closing(PositionReader(entry.path)))
        buffer = result.view(-1).view(torch.uint8).numpy().data
        self._open[entry.path].read_into(buffer, entry.begin, f"tensor {entry.name}")
        return result
