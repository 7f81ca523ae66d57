"""Checkpoints of one model under other names: a tensor is the same if transformers loads it to the same place.

Files of the hub leave out the prefix of the base model (``wte.weight`` for ``transformer.wte.weight``), and some
families have other names in memory than in files; the language part of a multimodal model may be a checkpoint of its
own. What transformers makes of more than one tensor (joined experts) is not matched. Torch is imported only if names
differ.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.checkpoints.adapters import Adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.checkpoints.tied import tied_partner
from perta_fast.errors import InputError
from perta_fast.models.language_part import empty_model

if TYPE_CHECKING:
    from torch import nn


def named_as_model(other: Checkpoint, model: Checkpoint, *known: Path) -> Checkpoint:
    """``other``, a checkpoint or an importance, with its tensors under the names that ``model`` has for them.

    Tensors that transformers does not load keep their names. known: of an importance, the models that it may be of.
    Raises InputError if two get one name.
    """
    if not _differ(other.tensors, model.tensors):
        return other
    best: dict[str, str] = {}
    # If both are of one class, either knows the names of both. A multimodal model and its language part are not.
    mine, theirs = model.path, other.path
    ways = [(mine, mine, True), (theirs, theirs, True), (mine, theirs, True), (mine, mine, False)]
    ways += [(mine, path, whole) for path in known for whole in (True, False)]
    for own, path, whole in ways:
        by_place = {place: name for name, place in _places(own, model.tensors).items()}
        places = _places(path, other.tensors, whole)
        names = {name: by_place[place] for name, place in places.items() if place in by_place}
        if len(names) > len(best):
            best = names
        if len(best) == min(len(model.tensors), len(other.tensors)):
            break
    return _renamed(other, best)


def named_as_module(checkpoint: Checkpoint, module: "nn.Module", stored: Collection[str]) -> Checkpoint:
    """``checkpoint`` with its tensors under the names ``stored``, under which transformers would save ``module``."""
    return _renamed(checkpoint, names_in_module(checkpoint.tensors, module, stored, checkpoint.path))


def names_in_module(names: Iterable[str], module: "nn.Module", stored: Collection[str], *known: Path) -> dict[str, str]:
    """Those of ``stored``, under which transformers would save ``module``, for ``names``; none if they do not differ.

    known: the models that may have the names.
    """
    from transformers import PreTrainedModel

    from perta_fast.models.stored_names import as_stored, loaded_tensors

    if not isinstance(module, PreTrainedModel) or not _differ(names, stored):
        return {}
    conversions: Any = getattr(module, "_weight_conversions", None)
    try:
        loaded = loaded_tensors(module, names)
    finally:
        module._weight_conversions = conversions  # those of the module's own loading
    parameters = dict(module.named_parameters(remove_duplicate=False))
    best = {tensor.stored: tensor.target for tensor in loaded if tensor.converter is None}
    place_of = _placing(module)
    by_place = {place_of(name): name for name in parameters}
    for path in dict.fromkeys(known) if len(loaded) < len(parameters) else ():
        places = _places(path, names)
        targets = {name: by_place[place] for name, place in places.items() if place in by_place}
        best = max(best, targets, key=len)
    result = {}
    for name, target in best.items():
        if target in parameters:
            made = as_stored(module, {target: parameters[target].detach()})
            if len(made) == 1:
                result[name] = next(iter(made))
    return result


def stored_as_in(base: Checkpoint, adapter: Adapter) -> Adapter:
    """``adapter``, which has the names of a model in memory, with those under which ``base`` stores its tensors."""
    tables = {"low_rank": adapter.low_rank, "whole": adapter.whole, "untouched": adapter.untouched}
    if all(_is_found(name, base.tensors) for table in tables.values() for name in table):
        return adapter
    stored = {place: name for name, place in _names_in_memory(base.path, base.tensors).items()}
    renamed: dict[str, Any] = {
        role: {stored.get(name, name): value for name, value in table.items()} for role, table in tables.items()
    }
    return replace(adapter, **renamed)


def _differ(names: Iterable[str], others: Collection[str]) -> bool:
    """Whether either has names that the other lacks, but for tied matrices that are stored once."""
    mine, theirs = dict.fromkeys(names), dict.fromkeys(others)
    unknown = [name for name in mine if name not in theirs and tied_partner(name, theirs) is None]
    return bool(unknown) and any(name not in mine and tied_partner(name, mine) is None for name in theirs)


def _is_found(name: str, names: Mapping[str, object]) -> bool:
    """Whether ``Adapter.name_in`` would find ``name``."""
    if name in names or tied_partner(name, names) is not None:
        return True
    return any(other.endswith(f".{name}") or name.endswith(f".{other}") for other in names)


def _names_in_memory(path: Path, names: Iterable[str]) -> dict[str, str]:
    """The entries of the state dict, by stored name, that ``config.json`` in ``path`` calls for; empty if unknown."""
    return {name: target for name, (target, _) in _loaded(path, names).items()}


def _places(path: Path, names: Iterable[str], whole: bool = True) -> dict[str, str]:
    """The same, with one place for what a multimodal model and its language part (not ``whole``) have both."""
    return {name: place for name, (_, place) in _loaded(path, names, whole).items()}


def _loaded(path: Path, names: Iterable[str], whole: bool = True) -> dict[str, tuple[str, str]]:
    if not (path / "config.json").is_file():
        return {}
    import torch

    from perta_fast.models.stored_names import loaded_tensors

    try:
        model = empty_model(path, default=torch.float32, whole=whole)
    except InputError:
        return {}
    targets = {tensor.stored: tensor.target for tensor in loaded_tensors(model, names) if tensor.converter is None}
    place = _placing(model)
    return {name: (target, place(target)) for name, target in targets.items()}


def _placing(model: Any) -> Callable[[str], str]:
    """What gives the place of an entry of the state dict: the head, its name beside the input embedding, or its own."""
    names = {module: name for name, module in model.named_modules()}
    embedding = names.get(model.get_input_embeddings(), "")
    head = names.get(model.get_output_embeddings())
    parts = {f"{embedding.rpartition('.')[0]}.": "beside the embedding", f"{head}.": "the head"}

    def place(name: str) -> str:
        for beginning, part in parts.items():
            if name.startswith(beginning):
                return f"{part}: {name.removeprefix(beginning)}"
        return name

    return place


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    tensors: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.tensors.items():
        new = names.get(name, name)
        if new in tensors:
            raise InputError(
                f"{checkpoint.path}: transformers loads {tensors[new].name} and {name} to one place; remove the one "
                "that is out of date"
            )
        tensors[new] = entry
    return replace(checkpoint, tensors=tensors)
