"""What w of a live module is computed from, as it was given: both importances, their ratio, or nothing."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from perta_fast.distributed.sharded import is_distributed
from perta_fast.errors import InputError
from perta_fast.importance import ratio as ratios
from perta_fast.importance.prompts import check_system_prompts, different_dates
from perta_fast.importance.ratio import ImportanceRatio
from perta_fast.importance.store import Importance, ImportanceMetadata
from perta_fast.models.held_tensors import Held
from perta_fast.models.layouts import values_of
from perta_fast.models.same_names import cut_for_module, named_as_module
from perta_fast.progress import LOGGER
from perta_fast.rules import Rule
from perta_fast.subtraction.inputs import EITHER, IMPORTANCES, RATIO

Given = str | Path | Importance | ImportanceRatio
Weighing = Importance | ImportanceRatio


def weighing_of(rule: Rule, forget: Given | None, retain: Given | None, both: Given | None) -> list[Weighing]:
    """Both importances, or their ratio alone, loaded; none for rule ``tv``.

    both: their ratio, or a directory with it or the two. Raises InputError if they are not what the rule needs, or do
    not belong together.
    """
    required: dict[str, Given] = rule.required(_by_role(forget, retain, both), "see estimate_importance")
    loaded = [_loaded(role, importance) for role, importance in required.items()]
    for role, weighing in zip(required, loaded, strict=True):
        rule.check_estimator(_estimator(weighing), role)
    told = [metadata.told for weighing in loaded for metadata in _metadata(weighing)]
    if told:
        check_system_prompts(*told)
        if warning := different_dates(*told):
            LOGGER.warning("%s", warning)
    return loaded


def _by_role(forget: Given | None, retain: Given | None, both: Given | None) -> dict[str, Given | None]:
    if both is None:
        return dict(zip(IMPORTANCES, (forget, retain), strict=True))
    if forget is not None or retain is not None:
        raise InputError(EITHER)
    if isinstance(both, Importance):
        raise InputError("‹importance› is of one data set; give two, as ‹forget_importance› and ‹retain_importance›")
    return {RATIO: both} if isinstance(both, ImportanceRatio) else {**ratios.located(Path(both))}


def _loaded(role: str, given: Given) -> Weighing:
    if role == RATIO:
        return given if isinstance(given, ImportanceRatio) else ImportanceRatio.load(Path(str(given)))
    if isinstance(given, ImportanceRatio):
        raise InputError(f"‹{role}› is the ratio of two importances; give it as ‹importance› alone")
    if isinstance(given, Importance):
        return given
    directory = Path(str(given))
    ratios.refuse_ratio(directory)
    return Importance.load(directory)


def _metadata(weighing: Weighing) -> list[ImportanceMetadata]:
    return [*weighing.metadata.values()] if isinstance(weighing, ImportanceRatio) else [weighing.metadata]


def _estimator(weighing: Weighing) -> str:
    return _metadata(weighing)[0].estimator


def in_form(weighing: Weighing, module: nn.Module, parameters: Mapping[str, Held], *known: Path) -> Weighing:
    """With the tensors that transformers would save of ``module``; one that is sharded stays as it is.

    known: the models that it may be of.
    """
    if weighing.stored is not None:
        return type(weighing).of_checkpoint(named_as_module(weighing.stored, module, parameters, *known))
    tensors = dict(weighing.tensors)
    if not any(map(is_distributed, tensors.values())):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        cut = cut_for_module(module, parameters, shapes, "the importance", *known)
        made = {}
        for name, runs in cut.items():
            values, whole, shape = values_of(runs, tensors), tensors[runs[0].name], parameters[name].shape
            is_one = values.numel() == whole.numel() and whole.dim() == len(shape)
            made[name] = whole if is_one else values.view(shape)  # shapes are compared later
        for name in {run.name for runs in cut.values() for run in runs}:
            del tensors[name]
        tensors |= made
    return replace(weighing, tensors=tensors)
