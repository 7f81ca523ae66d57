"""Methods without training: a direction that is subtracted from theta_full, times a strength."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.study.real.compute import Direction
from bench.study.real.importances import Weighing, weights_by_name
from bench.study.real.models import FULL_TUNING, Models
from bench.study.real.parts import EVERYTHING, limited, shape_of
from perta_fast.checkpoints.checkpoint import Checkpoint


class Method(Protocol):
    """What gives a direction. name: in tables, and the name of its curve."""

    @property
    def name(self) -> str: ...

    def made_of(self, models: Models) -> dict[str, Any]:
        """What the direction depends on, beside theta_full."""

    def direction(self, models: Models) -> Direction:
        """What is subtracted at strength 1."""


@dataclass(frozen=True)
class Subtraction:
    """PerTA: w times the task vector, in one part of the model. tuned: the kind of theta_f."""

    name: str
    weighing: Weighing
    part: str = EVERYTHING
    tuned: str = FULL_TUNING

    def made_of(self, models: Models) -> dict[str, Any]:
        """What the direction depends on, beside theta_full."""
        relative = models.store.relative
        return {
            "tuned": relative(models.tuned(self.tuned, make=False)),
            "weighing": vars(self.weighing),
            "part": self.part,
        }

    def direction(self, models: Models) -> Direction:
        """w (theta_f - theta_0)."""
        vector = task_vector(models, models.tuned(self.tuned))
        w = weights_by_name(models, self.weighing)
        if w is not None:
            vector = {name: tensor * w[name] for name, tensor in vector.items() if name in w}
        return limited(self.part, shape_of(models), vector)


def task_vector(models: Models, tuned: Path) -> Direction:
    """theta_f - theta_0."""
    base, changed = Checkpoint.open(models.base()), Checkpoint.open(tuned)
    return {name: changed.tensor(name) - base.tensor(name) for name in base.tensors}


@torch.no_grad()
def set_(module: torch.nn.Module, theta: Direction, direction: Direction, strength: float) -> None:
    """Make the module theta - strength · direction. theta: all parameters that directions change."""
    parameters = dict(module.named_parameters())
    for name, tensor in theta.items():
        change = direction.get(name)
        if change is None:
            parameters[name].copy_(tensor)
        else:
            torch.sub(tensor, change.to(tensor.device), alpha=strength, out=parameters[name].data)
