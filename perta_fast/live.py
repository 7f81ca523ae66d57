"""The subtraction on a live module's parameters."""

from pathlib import Path

import torch
from torch import nn

from perta_fast.checkpoint import Checkpoint, tied_partner
from perta_fast.errors import InputError
from perta_fast.importance.store import Importance
from perta_fast.ops import rescaled_subtract_
from perta_fast.ops.backends import DTYPE_CODES
from perta_fast.rules import Rule


def apply_to_module_(
    module: nn.Module,
    base: str | Path,
    tuned: str | Path,
    forget_importance: str | Path | Importance | None = None,
    retain_importance: str | Path | Importance | None = None,
    *,
    rule: str = "fisher",
    lam: float = 1.0,
    p: float | None = None,
    alpha: float = 1.0,
    threshold: float | None = None,
    backend: str = "auto",
) -> int:
    """Subtract the rescaled task vector from a live module's parameters in place.

    module: its parameters are theta_full; names and shapes as in the checkpoints ``base`` and ``tuned``.
    forget_importance, retain_importance: for every rule but ``tv``. Other settings as in ``apply``.
    Parameters that the importance does not cover stay as they are; tied ones are changed once.

    Returns the number of parameters (tensors) that were subtracted from. Raises InputError, before anything is
    changed, naming the tensor that is missing, has another shape, a type without arithmetic, or values that are
    not finite. Memory: one tensor of each source at a time, on the module's device. Everything is read twice.
    """
    chosen = Rule.of(rule, lam, p, alpha, threshold)
    sources = [Checkpoint.open(base), Checkpoint.open(tuned)]
    importances = _importances(chosen, forget_importance, retain_importance)
    parameters = _covered_parameters(module, importances)
    for name, parameter in parameters.items():
        _check_parameter(name, parameter)
        for source in sources:
            _check_source(name, parameter, source.tensor(_stored_name(source, name)), str(source.path))
        for importance in importances:
            _check_source(name, parameter, importance.tensors[name], "the importance")
    for name, parameter in parameters.items():
        base_tensor, tuned_tensor = (source.tensor(_stored_name(source, name)) for source in sources)
        weights = [importance.tensors[name].to(parameter.device) for importance in importances]
        rescaled_subtract_(
            parameter.detach(),
            tuned_tensor.to(parameter.device),
            base_tensor.to(parameter.device),
            *weights,
            lam=chosen.lam,
            p=chosen.p,
            alpha=chosen.alpha,
            threshold=chosen.threshold,
            backend=backend,
        )
    return len(parameters)


def _covered_parameters(module: nn.Module, importances: list[Importance]) -> dict[str, nn.Parameter]:
    """The parameters to subtract from; each importance must cover the same ones, and nothing else."""
    parameters = {name: each for name, each in module.named_parameters() if each.is_floating_point()}
    for importance in importances:
        unknown = importance.tensors.keys() - parameters.keys()
        if unknown:
            raise InputError(f"the importance has tensor {min(unknown)}, which the module lacks")
        uneven = importance.tensors.keys() ^ importances[0].tensors.keys()
        if uneven:
            raise InputError(f"tensor {min(uneven)} is in one importance and not in the other")
    if importances:
        parameters = {name: each for name, each in parameters.items() if name in importances[0].tensors}
    return parameters


def _importances(
    rule: Rule,
    forget: str | Path | Importance | None,
    retain: str | Path | Importance | None,
) -> list[Importance]:
    if rule.estimator is None:
        if forget is not None or retain is not None:
            raise InputError("rule tv takes no importance; leave it out or choose another rule")
        return []
    loaded = []
    for role, given in (("forget_importance", forget), ("retain_importance", retain)):
        if given is None:
            raise InputError(f"rule {rule.name} needs {role}; see estimate_importance")
        importance = given if isinstance(given, Importance) else Importance.load(given)
        if importance.metadata.estimator != rule.estimator:
            raise InputError(
                f"{role} holds estimator {importance.metadata.estimator}, rule {rule.name} needs "
                f"{rule.estimator}"
            )
        loaded.append(importance)
    return loaded


def _stored_name(source: Checkpoint, name: str) -> str:
    if name in source.tensors:
        return name
    partner = tied_partner(name, source.tensors)
    if partner is None:
        raise InputError(f"{source.path}: lacks tensor {name}, which the module has")
    return partner


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if parameter.is_meta:
        raise InputError(f"parameter {name} is on the meta device: its values are not in memory")
    if parameter.dtype not in DTYPE_CODES:
        raise InputError(f"parameter {name} is {parameter.dtype}; it must be float32, bfloat16 or float16")
    if not parameter.is_contiguous():
        raise InputError(f"parameter {name} is not contiguous; replace it by a contiguous copy")


def _check_source(name: str, parameter: nn.Parameter, found: torch.Tensor, where: str) -> None:
    if parameter.shape != found.shape:
        raise InputError(
            f"tensor {name}: shape {list(parameter.shape)} in the module, {list(found.shape)} in {where}"
        )
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"tensor {name} has NaN or infinite values in {where}")
