"""Inputs of one ``perta apply``, of odd sizes and any types, and the output that the formula gives."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.support.checkpoints import draw, write_checkpoint, write_importance

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPES: dict[str, tuple[int, ...]] = {
    EMBED: (37, 5),
    "model.layers.0.up": (33, 31),
    "model.layers.0.norm": (5,),
    "model.layers.0.scale": (),
    "model.layers.0.none": (0, 3),
    "model.layers.1.up": (1, 257),
    HEAD: (37, 5),
}
FROZEN, COUNTER = "model.frozen", "model.counter"  # not covered by the importance; not floating point
ROLES = ("model", "base", "tuned", "forget", "retain")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Inputs:
    """Five directories and the tensors in them."""

    folder: Path
    tensors: dict[str, Tensors]

    def __getitem__(self, role: str) -> Path:
        return self.folder / role

    @property
    def checkpoints(self) -> tuple[Path, Path, Path]:
        """model, base, tuned."""
        return self["model"], self["base"], self["tuned"]

    @property
    def all(self) -> tuple[Path, Path, Path, Path, Path]:
        """The five directories, in the order of ``apply``."""
        return *self.checkpoints, self["forget"], self["retain"]

    def expected(self, weigh: Callable[[Tensor, Tensor], Tensor] | None, lam: float) -> Tensors:
        """The output by the formula. weigh: computes w from the two importances; None is rule tv."""
        result = {}
        for name, theta in self.tensors["model"].items():
            forget, retain = self.tensors["forget"].get(name), self.tensors["retain"].get(name)
            if not theta.is_floating_point() or (weigh is not None and forget is None):
                result[name] = theta
                continue
            update = self.tensors["tuned"][name].float() - self.tensors["base"][name].float()
            if weigh is None or forget is None or retain is None:
                update = lam * update
            else:
                update = lam * weigh(forget.float(), retain.float()) * update
            result[name] = torch.where(update == 0, theta, (theta.float() - update).to(theta.dtype))
        return result


def weights(p: float, alpha: float = 1.0, threshold: float | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """w = |I_f|^p / (|I_f|^p + alpha |I_r|^p), 0 where both are 0; with ``threshold``, its hard mask."""

    def weigh(forget: Tensor, retain: Tensor) -> Tensor:
        f, r = (raise_to(importance.abs(), p) for importance in (forget, retain))
        w = (f / (f + alpha * r)).nan_to_num(nan=0.0)
        return w if threshold is None else (w > threshold).float()

    return weigh


def raise_to(magnitude: Tensor, p: float) -> Tensor:
    """Each value to the power p; for p = 1, 2 and 1/2 it is rounded once to float32."""
    if p == 2:
        return magnitude.square()
    return magnitude.double().pow(p).float()


def write_inputs(
    folder: Path, types: tuple[torch.dtype, ...] = (F32,) * 5, shards: int = 1, estimator: str = "grad"
) -> Inputs:
    """Draw and write model, base, tuned and two importances, whose types are ``types``.

    For some elements both importances are 0. The tensor ``FROZEN`` has no importance.
    """
    tensors = {
        role: {
            name: draw(shape, dtype, seed=100 * number + k)
            for k, (name, shape) in enumerate((SHAPES | {FROZEN: (6,)}).items())
        }
        for number, (role, dtype) in enumerate(zip(ROLES, types, strict=True))
    }
    tensors["model"][COUNTER] = torch.arange(11)
    for role in ("forget", "retain"):
        del tensors[role][FROZEN]
        tensors[role]["model.layers.0.up"].view(-1)[::7] = 0
    for role in ("model", "base", "tuned"):
        write_checkpoint(folder / role, tensors[role], shards)
    for role in ("forget", "retain"):
        write_importance(folder / role, tensors[role], estimator, shards)
    return Inputs(folder, tensors)
