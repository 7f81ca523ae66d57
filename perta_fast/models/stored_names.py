"""From the parameters of a module to the tensors of its checkpoint, which may have other names, and divide them."""

from collections.abc import Iterable
from dataclasses import dataclass
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


def stored_places(module: nn.Module, name: str, shape: torch.Size) -> dict[str, tuple[int, torch.Size]]:
    """The stored tensors of one parameter of ``shape``: the number of each one's first element, and its shape.

    Raises InputError if the elements are stored in another order. Memory: 16 bytes an element if it is divided.
    """
    stand_in = torch.empty(shape, device="meta")
    tensors = as_stored(module, {name: stand_in})
    if len(tensors) == 1 and next(iter(tensors.values())) is stand_in:
        return dict.fromkeys(tensors, (0, shape))
    numbers = torch.arange(shape.numel()).view(shape)  # as values, they show where each element goes
    begins = {}
    for stored, tensor in as_stored(module, {name: numbers}).items():
        first, count = int(tensor.view(-1)[0]), tensor.numel()
        if not torch.equal(tensor.view(-1), numbers.view(-1)[first : first + count]):
            raise InputError(f"the elements of parameter {name} are stored in another order")
        begins[stored] = (first, tensor.shape)
    return begins


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
