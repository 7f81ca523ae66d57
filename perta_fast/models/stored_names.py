"""From the parameters of a module to the tensors of its checkpoint, which may have other names, and divide them."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.checkpoints.wrappers import by_plain_name
from perta_fast.errors import InputError, RunError


def load_tensor(entry: TensorEntry) -> torch.Tensor:
    """A stored tensor of any type. Raises RunError if it cannot be read any more."""
    try:
        with safe_open(entry.path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(entry.stored_name or entry.name)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{entry.path}: tensor {entry.name} cannot be read any more: {error}") from error
    return tensor


def as_stored(module: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename and divide ``tensors``, one for each parameter and by its name, as ``save_pretrained`` would.

    When transformers loads a model, it renames the parameters of some families and joins all experts of a layer into
    one; saving undoes both. No value changes, so importances can be renamed in the same way. The tensors of a module
    that is not of transformers keep their names, but for those of wrappers. Divided tensors are copied. Raises
    InputError if two get one name.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    tensors = {plain: tensors[name] for plain, name in by_plain_name(tensors, "the module").items()}
    if not isinstance(module, PreTrainedModel):
        return tensors
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(module, tensors).items()}


def joined(module: nn.Module) -> set[str]:
    """The parameters that are made of several stored tensors, or of one whose elements have another order."""
    stand_ins = {name: torch.empty(tensor.shape, device="meta") for name, tensor in module.named_parameters()}
    as_they_are = {id(tensor) for tensor in as_stored(module, stand_ins).values()}
    return {name for name, tensor in stand_ins.items() if id(tensor) not in as_they_are}


def copied(module: nn.Module) -> set[str]:
    """The parameters that ``as_stored`` copies; the stored tensors of the others are views of them."""
    stand_ins = {name: torch.empty(tensor.shape, device="meta") for name, tensor in module.named_parameters()}
    viewed: Counter[int] = Counter()
    for tensor in as_stored(module, stand_ins).values():
        viewed[tensor.untyped_storage()._cdata] += tensor.numel()
    return {name for name, tensor in stand_ins.items() if viewed[tensor.untyped_storage()._cdata] < tensor.numel()}


def stored_places(module: nn.Module, name: str, shape: torch.Size) -> dict[str, tuple[int, torch.Size]]:
    """The stored tensors of one parameter of ``shape``: the number of each one's first element, and its shape.

    Raises InputError if the elements are stored in another order. Memory: 128 bytes a row if it is divided.
    """
    stand_in = torch.empty(shape, device="meta")
    tensors = as_stored(module, {name: stand_in})
    if len(tensors) == 1 and next(iter(tensors.values())) is stand_in:
        return dict.fromkeys(tensors, (0, shape))
    width = number_width(tensor.shape for tensor in (stand_in, *tensors.values()))
    begins = {}
    for stored, numbers in as_stored(module, {name: numbered(shape, width)}).items():
        runs = runs_of(numbers, tensors[stored].shape, width)
        if len(runs) != 1:
            raise InputError(f"the elements of parameter {name} are stored in another order")
        begins[stored] = (runs[0][0], tensors[stored].shape)
    return begins


def number_width(shapes: Iterable[Sequence[int]]) -> int:
    """How many elements may share a number where tensors of these shapes are made of each other: an eighth of a row.

    1 if their rows differ. With eight numbers a row, whatever moves elements within rows is seen as well.
    """
    lasts = {shape[-1] if len(shape) else 1 for shape in shapes}
    last = lasts.pop()
    return 1 if lasts or not last else last // math.gcd(last, 8)


def numbered(shape: Sequence[int], width: int, first: int = 0) -> torch.Tensor:
    """The numbers of every ``width``-th element of a tensor, from ``first`` on: as values, they show where it goes."""
    shape = (*shape[:-1], shape[-1] // width) if shape else shape
    return (torch.arange(math.prod(shape)) * width + first).view(*shape)


def runs_of(numbers: torch.Tensor, shape: Sequence[int], width: int) -> list[tuple[int, int]]:
    """The runs of consecutive elements in what was made of ``numbered``: the first number of each, and how many.

    shape: of what is made of the elements themselves. No runs if that of ``numbers`` does not fit it.
    """
    if tuple(numbers.shape) != ((*shape[:-1], shape[-1] // width) if shape else ()):
        return []
    flat = numbers.reshape(-1)
    ends = [*((flat[1:] != flat[:-1] + width).nonzero().view(-1) + 1).tolist(), len(flat)]
    begins = [0, *ends[:-1]]
    return [(int(flat[begin]), (end - begin) * width) for begin, end in zip(begins, ends, strict=True) if begin < end]


@dataclass(frozen=True)
class LoadedTensor:
    """A stored tensor that transformers loads. target: the entry of the state dict that it goes to.

    converter: what makes the entry of this and other tensors, and ``pattern``, which of its patterns the name matches;
    None if the tensor is the entry.
    """

    stored: str
    target: str
    converter: Any = None
    pattern: str | None = None


def loaded_tensors(model: Any, names: Iterable[str]) -> list[LoadedTensor]:
    """Those of the stored tensors ``names`` that ``from_pretrained`` would use for ``model``, in its order.

    It ignores all others. From now on ``as_stored`` knows the conversions that these names need.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state, prefix = model.state_dict(), model.base_model_prefix
    like = {plain: state[name] for plain, name in by_plain_name(state, "the module").items()}
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    loaded = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, like)
        if target not in like and name in like:
            target, pattern = rename_source_key(name, [], [], prefix, like)
        if target in like:
            loaded.append(LoadedTensor(name, target, None if pattern is None else by_pattern[pattern], pattern))
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]
    return loaded


@dataclass
class LoadedGroup:
    """Stored tensors that ``converter`` makes into one or more entries of the state dict, the first of them ``target``.

    converter: None if the tensor is used as it is stored. stored: names, with the pattern that each one matches.
    """

    target: str
    converter: Any
    stored: dict[str, str] = field(default_factory=dict)

    def convert(self, model: Any, read: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The entries, from the stored tensors in ``read``."""
        if self.converter is None:
            return {self.target: read[next(iter(self.stored))]}
        converter = deepcopy(self.converter)  # it keeps the tensors it gets
        for name, pattern in self.stored.items():
            converter.add_tensor(self.target, name, pattern, read[name])
        converted = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def why_not(self, shapes: Mapping[str, Sequence[int]]) -> str:
        """Why its tensors cannot be joined: one has another shape, or their number is wrong. shapes: as stored."""
        by_pattern: dict[str, list[str]] = {}
        for name, pattern in self.stored.items():
            by_pattern.setdefault(pattern, []).append(name)
        for names in by_pattern.values():
            counted = Counter(tuple(shapes[name]) for name in names).most_common()
            most, least = counted[0][0], counted[-1][0]
            if most != least:
                odd = next(name for name in names if tuple(shapes[name]) == least)
                return f"tensor {odd} is {list(least)}, those that it is joined with are {list(most)}"
        counts = ", ".join(f"{len(names)} of {pattern}" for pattern, names in by_pattern.items())
        return f"{self.target} cannot be made of {counts}"


def loaded_groups(model: Any, names: Iterable[str]) -> dict[str, LoadedGroup]:
    """The groups in which ``from_pretrained`` would convert the stored tensors ``names``, in its order, by target.

    What is said of ``loaded_tensors`` holds here too.
    """
    groups: dict[str, LoadedGroup] = {}
    for loaded in loaded_tensors(model, names):
        group = groups.setdefault(loaded.target, LoadedGroup(loaded.target, loaded.converter))
        group.stored[loaded.stored] = loaded.pattern or loaded.stored
    return groups
