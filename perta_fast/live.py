"""The subtraction on a live module's parameters."""

from pathlib import Path

import torch
from torch import nn

from perta_fast.checkpoint import Checkpoint, tied_partner
from perta_fast.errors import InputError
from perta_fast.importance.store import Importance
from perta_fast.ops import rescaled_subtract_
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

    module: its parameters are theta_full; names and shapes as in ``base`` and ``tuned``, checkpoint directories.
    forget_importance, retain_importance: for every rule but ``tv``. Other settings as in ``apply``.
    Parameters that the importance does not cover stay as they are; tied ones are changed once.

    Returns the number of parameters (tensors) that were subtracted from. Raises InputError, before anything is
    changed, naming the tensor that is missing, has another shape, or has NaN or infinite importance. Memory:
    one tensor of each source at a time, on the module's device.
    """
    chosen = Rule.of(rule, lam, p, alpha, threshold)
    sources = [Checkpoint.open(base), Checkpoint.open(tuned)]
    importances = _importances(chosen, forget_importance, retain_importance)
    parameters = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and all(name in each.tensors for each in importances)
    }
    for name, parameter in parameters.items():
        for source in sources:
            shape = source.tensors[_stored_name(source, name)].shape
            _check_shape(name, tuple(parameter.shape), shape, str(source.path))
        for importance in importances:
            tensor = importance.tensors[name]
            _check_shape(name, tuple(parameter.shape), tuple(tensor.shape), "the importance")
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(f"the importance of {name} has NaN or infinite values")
    for name, parameter in parameters.items():
        base_tensor, tuned_tensor = (source.tensor(_stored_name(source, name)) for source in sources)
        weights = [importance.tensors[name].to(parameter.device) for importance in importances]
        rescaled_subtract_(
            parameter.data,
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


def _check_shape(name: str, wanted: tuple[int, ...], found: tuple[int, ...], where: str) -> None:
    if wanted != found:
        raise InputError(f"tensor {name}: shape {list(wanted)} in the module, {list(found)} in {where}")
