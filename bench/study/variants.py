"""Variants of the empirical Fisher rule: changed importances for the same formula w = I_f / (I_f + α I_r).

They test ideas for a new rule, and are not part of the package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import perta_fast as pf
from bench.study.rules import importances
from bench.study.trial import Trial
from perta_fast.checkpoints.checkpoint import Checkpoint

Tensors = Mapping[str, Tensor]
Pair = tuple[dict[str, Tensor], dict[str, Tensor]]  # forget and retain importance


def smoothed(forget: Tensors, retain: Tensors, *_: Any, share: float) -> Pair:
    """Each importance drawn by ``share`` to the mean of its row, which is less noisy. A row feeds one output."""

    def smooth(tensor: Tensor) -> Tensor:
        return torch.lerp(tensor, tensor.mean(dim=-1, keepdim=True).expand_as(tensor), share)

    changed = [{name: smooth(tensor) for name, tensor in tensors.items()} for tensors in (forget, retain)]
    return changed[0], changed[1]


def shrunk(forget: Tensors, retain: Tensors, *_: Any, strength: float) -> Pair:
    """w drawn to 1 / (1 + α), its value for equal importances, the more the smaller they are.

    w = (I_f + k) / (I_f + k + α (I_r + k)), where k is ``strength`` times the mean of both over the tensor.
    """
    added = {name: strength * (forget[name].mean() + retain[name].mean()) / 2 for name in forget}
    raised = [{name: tensors[name] + added[name] for name in tensors} for tensors in (forget, retain)]
    return raised[0], raised[1]


def trust_region(forget: Tensors, retain: Tensors, trial: Trial, alpha: float) -> Pair:
    """A strength for each layer: larger where a layer forgets more for the same rise of the retain loss.

    The update -lam_l w τ in layer l raises the forget loss by lam_l b_l, b_l = -Σ g_f w τ, and the retain loss by
    lam_l² a_l / 2, a_l = Σ F_r (w τ)². At an equal rise of the retain loss the sum of lam_l b_l is largest if lam_l
    is proportional to b_l / a_l. As w cannot exceed 1, the largest of these is scaled to 1.
    """
    base, tuned = (Checkpoint.open(path) for path in (trial.models.base(), trial.models.tuned(trial.split)))
    gradient = pf.Importance.load(importances(trial, "grad")[0] / "importance").tensors
    gain: dict[str, float] = {}
    cost: dict[str, float] = {}
    for name in forget:
        rescaled = _weights(forget[name], retain[name], alpha) * (tuned.tensor(name) - base.tensor(name))
        layer = _layer(name)
        gain[layer] = gain.get(layer, 0.0) - float((gradient[name] * rescaled).double().sum())
        cost[layer] = cost.get(layer, 0.0) + float((retain[name] * rescaled.square()).double().sum())
    strengths = {layer: max(0.0, gain[layer]) / cost[layer] if cost[layer] else 0.0 for layer in gain}
    largest = max(strengths.values())
    new_forget, new_retain = {}, {}
    for name in forget:
        weights = strengths[_layer(name)] / largest * _weights(forget[name], retain[name], alpha)
        new_forget[name], new_retain[name] = weights, (1 - weights) / alpha  # w of these two is ``weights``
    return new_forget, new_retain


VARIANTS: Mapping[str, Callable[[Tensors, Tensors, Trial, float], Pair]] = {
    "half smoothed in rows": partial(smoothed, share=0.5),
    "one value a row": partial(smoothed, share=1.0),
    "shrunk, strength 0.1": partial(shrunk, strength=0.1),
    "shrunk, strength 1": partial(shrunk, strength=1.0),
    "strength by layer": trust_region,
}


def varied(trial: Trial, name: str, alpha: float) -> list[Path]:
    """The two pieces of forget and retain importance of a variant."""
    pieces = importances(trial, "empirical-fisher")
    made_of: dict[str, Any] = {"given": [trial.name_of(piece) for piece in pieces], "variant": name}
    if name == "strength by layer":
        made_of |= {"tuned": trial.name_of(trial.models.tuned(trial.split)), "alpha": alpha}

    def make(folder: Path, role: int) -> None:
        forget, retain = (pf.Importance.load(piece / "importance") for piece in pieces)
        tensors = VARIANTS[name](forget.tensors, retain.tensors, trial, alpha)[role]
        pf.Importance(tensors, (forget, retain)[role].metadata).save(folder / "importance")

    return [
        trial.piece(f"variant/{name} {role}", {**made_of, "role": role}, partial(make, role=number))
        for number, role in enumerate(("forget", "retain"))
    ]


def _weights(forget: Tensor, retain: Tensor, alpha: float) -> Tensor:
    """w, 0 where both are 0."""
    return torch.nan_to_num(forget / (forget + alpha * retain))


def _layer(name: str) -> str:
    """The decoder layer that a tensor belongs to; the embedding and the last norm count as layers of their own."""
    match = re.search(r"layers\.\d+", name)
    return match.group() if match else name
