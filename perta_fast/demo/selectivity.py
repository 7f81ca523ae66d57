"""How a rule's weights change the direction of the update."""

from dataclasses import dataclass

import torch

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.demo.files import Files
from perta_fast.importance.store import Importance
from perta_fast.ops import reference
from perta_fast.rules import PRECONDITIONED, Rule


@dataclass(frozen=True)
class Update:
    """The update delta = lambda w tau of one run.

    length: ||delta|| / ||tau||. selectivity: sum of I_f delta^2 / sum of I_r delta^2, with the empirical Fisher at
    theta_0 as importance. To second order, and for each parameter alone, that is how much more the update disturbs the
    forget data than the retain data. It does not depend on lambda.
    """

    length: float
    selectivity: float


def measure_update(files: Files, rule_name: str, lam: float) -> Update:
    """Recompute the update of a finished run from the files."""
    rule = Rule.of("tv" if rule_name == PRECONDITIONED else rule_name, lam)
    rescaling = rule.rescaling
    base, tuned = Checkpoint.open(files.base), Checkpoint.open(files.tuned)
    subtracted = Checkpoint.open(files.theta_f(rule_name))
    fisher = _importances(files, "empirical-fisher")
    weighing = None if rule.estimator is None else _importances(files, rule.estimator)
    update_energy = task_energy = on_forget = on_retain = 0.0
    for name in base.tensors:
        task_vector = tuned.tensor(name) - base.tensor(name)
        weights = torch.ones_like(task_vector)
        if weighing is not None:
            forget, retain = (importance.tensors[name] for importance in weighing)
            weights = reference.weights(forget, retain, rescaling)
        update = rescaling.lam * weights * (subtracted.tensor(name) - base.tensor(name))
        squared_update = update.double().square()
        update_energy += squared_update.sum().item()
        task_energy += task_vector.double().square().sum().item()
        on_forget += (fisher[0].tensors[name] * squared_update).sum().item()
        on_retain += (fisher[1].tensors[name] * squared_update).sum().item()
    return Update((update_energy / task_energy) ** 0.5, on_forget / on_retain)


def _importances(files: Files, estimator: str) -> tuple[Importance, Importance]:
    directory = files.importance(estimator)
    return Importance.load(directory / "forget"), Importance.load(directory / "retain")
