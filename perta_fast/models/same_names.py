"""Checkpoints of one model under other names, or in another form: transformers loads their tensors to one place.

Files of the hub leave out the prefix of the base model (``wte.weight`` for ``transformer.wte.weight``), some families
have other names in memory than in files, and the experts of a layer are apart in files and joined in memory; the
language part of a multimodal model may be a checkpoint of its own. Torch is imported only if names differ.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.checkpoints.adapters import Adapter
from perta_fast.checkpoints.advice import conversion_command
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.checkpoints.tied import tied_partner
from perta_fast.checkpoints.wrappers import by_plain_name
from perta_fast.errors import InputError
from perta_fast.models.language_part import empty_model

if TYPE_CHECKING:
    from torch import nn

    from perta_fast.models.layouts import Layout, Run, Shapes


def named_as_model(other: Checkpoint, model: Checkpoint, *known: Path) -> Checkpoint:
    """``other``, a checkpoint or an importance, with its tensors under the names that ``model`` has for them.

    Tensors that transformers does not load keep their names. known: of an importance, the models that it may be of.
    Raises InputError if two get one name, or a tensor of ``model`` cannot be made of those of ``other``.
    """
    if not _differ(other.tensors, model.tensors):
        return other
    best: dict[str, list[Run]] = {}
    problem = None
    same = len(model.tensors.keys() & other.tensors.keys())
    # If both are of one class, either knows the names of both. A multimodal model and its language part are not.
    mine, theirs = model.path, other.path
    ways = [(mine, mine, True), (theirs, theirs, True), (mine, theirs, True), (mine, mine, False)]
    ways += [(mine, path, whole) for path in known for whole in (True, False)]
    for own, path, whole in ways:
        try:
            layout = _layout(path, other.path, _shapes(other), model.tensors, whole)
            cut = _layout(own, mine, _shapes(model), other.tensors).cut_from(layout)
        except InputError as error:  # also of the wrong class
            problem = problem or error
            continue
        best = max(best, cut, key=len)
        used = {run.name for runs in best.values() for run in runs}
        if same + len(best) == len(model.tensors) or same + len(used) == len(other.tensors):
            break
    if problem is not None and not best:
        raise problem
    return _in_form(other, best, _shapes(model))


def named_as_module(checkpoint: Checkpoint, module: "nn.Module", stored: Mapping[str, Any], *known: Path) -> Checkpoint:
    """``checkpoint`` with the tensors ``stored``, which have shapes, as transformers would save them of ``module``.

    known: other models that may have its names.
    """
    cut = cut_for_module(module, stored, _shapes(checkpoint), checkpoint.path, checkpoint.path, *known)
    return _in_form(checkpoint, cut, {name: tuple(getattr(value, "shape", value)) for name, value in stored.items()})


def cut_for_module(
    module: "nn.Module", stored: Mapping[str, Any], given: "Shapes", where: object, *known: Path
) -> "dict[str, list[Run]]":
    """The tensors ``stored``, as transformers would save them of ``module``, as runs of ``given`` tensors.

    Those that have the same names are left out. where: what messages call what is given. known: the models that may
    have its names.
    """
    from transformers import PreTrainedModel

    from perta_fast.models.layouts import Layout
    from perta_fast.models.stored_names import stored_places

    if not isinstance(module, PreTrainedModel) or not _differ(given, stored):
        return {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    own = Layout.of_places(
        {
            plain: (parameters[name].shape, stored_places(module, name, parameters[name].shape))
            for plain, name in by_plain_name(parameters, "the module").items()
        }
    )
    conversions: Any = getattr(module, "_weight_conversions", None)
    try:
        theirs = Layout.of_checkpoint(module, where, given, stored)
    finally:
        module._weight_conversions = conversions  # those of the module's own loading
    place_of = _placing(module)
    own, theirs = own.placed(place_of), theirs.placed(place_of)
    cut = own.cut_from(theirs)
    if len(stored.keys() & given.keys()) + len(cut) < len(stored):
        for path in dict.fromkeys(known):
            cut = max(cut, own.cut_from(_layout(path, where, given, stored)), key=len)
    return {name: runs for name, runs in cut.items() if name in stored}


def stored_under(names: Iterable[str], checkpoint: Checkpoint) -> dict[str, str]:
    """The names that a checkpoint ``named_as_module`` has for ``names``: the same, or those of tied matrices.

    Raises InputError if a tensor is not stored as such: an importance would have a name that the checkpoint lacks.
    """
    tensors, stored, absent = checkpoint.tensors, {}, []
    for name in names:
        found = name if name in tensors else tied_partner(name, tensors)
        if found is None or tensors[found].pieces:
            absent.append(name)
        else:
            stored[name] = found
    if absent:
        raise InputError(
            f"{checkpoint.path}: lacks tensor {min(absent)}, the name that transformers now gives to one of its own; "
            f"save it anew with: {conversion_command(checkpoint.path)}"
        )
    return stored


def stored_as_in(base: Checkpoint, adapter: Adapter) -> Adapter:
    """``adapter``, which has the names of a model in memory, with those under which ``base`` stores its tensors."""
    tables = {"low_rank": adapter.low_rank, "whole": adapter.whole, "untouched": adapter.untouched}
    if all(is_found(name, base.tensors) for table in tables.values() for name in table):
        return adapter
    stored = _stored_names(base)
    renamed: dict[str, Any] = {
        role: {stored.get(name, name): value for name, value in table.items()} for role, table in tables.items()
    }
    return replace(adapter, **renamed)


def _differ(names: Iterable[str], others: Collection[str]) -> bool:
    """Whether either has names that the other lacks, but for tied matrices that are stored once."""
    mine, theirs = dict.fromkeys(names), dict.fromkeys(others)
    unknown = [name for name in mine if name not in theirs and tied_partner(name, theirs) is None]
    return bool(unknown) and any(name not in mine and tied_partner(name, mine) is None for name in theirs)


def is_found(name: str, names: Mapping[str, object]) -> bool:
    """Whether ``Adapter.name_in`` would find ``name``."""
    if name in names or tied_partner(name, names) is not None:
        return True
    return any(other.endswith(f".{name}") or name.endswith(f".{other}") for other in names)


def _layout(path: Path, where: object, stored: "Shapes", known: Collection[str], whole: bool = True) -> "Layout":
    """How the model that ``path`` describes is made of ``stored`` tensors; of nothing if that is unknown.

    Entries that a multimodal model and its language part (not ``whole``) have both are called by one place.
    """
    from perta_fast.models.layouts import Layout

    skeleton = _skeleton(path, whole)
    if skeleton is None:
        return Layout(where, {}, {})
    return Layout.of_checkpoint(skeleton, where, stored, known).placed(_placing(skeleton))


def _stored_names(base: Checkpoint) -> dict[str, str]:
    """The stored names, by entry of the state dict, of the tensors that are such entries."""
    from perta_fast.models.stored_names import loaded_tensors

    skeleton = _skeleton(base.path)
    loaded = [] if skeleton is None else loaded_tensors(skeleton, base.tensors)
    return {tensor.target: tensor.stored for tensor in loaded if tensor.converter is None}


@dataclass(frozen=True)
class _Described:
    """A model by what is in its ``config.json``. whole: with the parts for images."""

    config: bytes
    whole: bool
    path: Path = field(compare=False)


def _skeleton(path: Path, whole: bool = True) -> Any:
    """The model that ``config.json`` in ``path`` describes, without weights, not to be changed; None if unknown."""
    config = path / "config.json"
    if not config.is_file():
        return None
    try:
        return _built(_Described(config.read_bytes(), whole, path))
    except (InputError, OSError):
        return None


@lru_cache(maxsize=4)  # a run asks for the same ones again, with each checkpoint and each importance
def _built(described: _Described) -> Any:
    import torch

    return empty_model(described.path, default=torch.float32, whole=described.whole)


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


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in checkpoint.tensors.items()}


def _in_form(checkpoint: Checkpoint, cut: "Mapping[str, Sequence[Run]]", shapes: "Shapes") -> Checkpoint:
    """``checkpoint`` with tensors that are ``cut`` from its own; those of which nothing remains go."""
    used: Counter[str] = Counter()
    for run in (run for runs in cut.values() for run in runs):
        used[run.name] += run.count
    tensors = {name: entry for name, entry in checkpoint.tensors.items() if used[name] < max(entry.count, 1)}
    for name, runs in cut.items():
        if name in tensors:
            raise InputError(
                f"{checkpoint.path}: transformers loads {name} and {runs[0].name} to one place; remove the one that is "
                "out of date"
            )
        stored, shape = checkpoint.tensors[runs[0].name], tuple(shapes[name])
        count = sum(run.count for run in runs)
        if count == stored.count and len(runs) == 1 and (count != math.prod(shape) or len(stored.shape) == len(shape)):
            tensors[name] = stored  # shapes are compared later
        elif count == math.prod(shape):
            tensors[name] = TensorEntry.made_of(_pieces(checkpoint, runs), shape)
        else:
            raise InputError(
                f"{checkpoint.path}: {stored.name} has {count} elements for tensor {name}, which has shape "
                f"{list(shape)}; these are not of one model"
            )
    return replace(checkpoint, tensors=tensors)


def _pieces(checkpoint: Checkpoint, runs: "Sequence[Run]") -> list[TensorEntry]:
    stored = checkpoint.tensors
    for run in runs:
        if stored[run.name].dtype != stored[runs[0].name].dtype:
            one, other = stored[runs[0].name], stored[run.name]
            raise InputError(
                f"{checkpoint.path}: {one.name} is {one.dtype} and {other.name} is {other.dtype}, but they are one "
                f"tensor in the model; save the checkpoint in one type with: {conversion_command(checkpoint.path)}"
            )
    return [entry for run in runs for entry in stored[run.name].elements(run.first, run.count)]
