"""Variants of the empirical Fisher rule, as other importances for the same formula w = I_f / (I_f + α I_r).

They are evidence for or against a new rule, not a part of the package.
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
    """Each importance mixed with its mean over the row, the weights into one output: fewer, surer numbers."""

    def smooth(tensor: Tensor) -> Tensor:
        return torch.lerp(tensor, tensor.mean(dim=-1, keepdim=True).expand_as(tensor), share)

    return _each(forget, smooth), _each(retain, smooth)


def shrunk(forget: Tensors, retain: Tensors, *_: Any, strength: float) -> Pair:
    """w pulled towards 1 / (1 + α), its value where both matter alike, the more the less evidence there is.

    w = (I_f + k) / (I_f + k + α (I_r + k)), k being ``strength`` times the mean of both over the tensor.
    """
    added = {name: strength * (forget[name].mean() + retain[name].mean()) / 2 for name in forget}
    raised = [{name: each[name] + added[name] for name in each} for each in (forget, retain)]
    return raised[0], raised[1]


def trust_region(forget: Tensors, retain: Tensors, trial: Trial, alpha: float) -> Pair:
    """lam for each layer by how much it forgets for what it costs.

    By the step -lam_l w τ in layer l the forget loss grows by lam_l b_l, b_l = -Σ g_f w τ, and the retain loss
    by lam_l² a_l / 2, a_l = Σ F_r (w τ)². For a given cost the sum of lam_l b_l is largest with lam_l in
    proportion to b_l / a_l. As w cannot exceed 1, these are scaled so that the largest is 1.
    """
    base, tuned = (Checkpoint.open(path) for path in (trial.models.base(), trial.models.tuned(trial.split)))
    gradient = pf.Importance.load(importances(trial, "grad")[0] / "importance").tensors
    gain: dict[str, float] = {}
    cost: dict[str, float] = {}
    for name in forget:
        step = _weights(forget[name], retain[name], alpha) * (tuned.tensor(name) - base.tensor(name))
        layer = _layer(name)
        gain[layer] = gain.get(layer, 0.0) - float((gradient[name] * step).double().sum())
        cost[layer] = cost.get(layer, 0.0) + float((retain[name] * step.square()).double().sum())
    worth = {layer: max(0.0, gain[layer]) / cost[layer] if cost[layer] else 0.0 for layer in gain}
    largest = max(worth.values())
    forget_, retain_ = {}, {}
    for name in forget:
        weights = worth[_layer(name)] / largest * _weights(forget[name], retain[name], alpha)
        forget_[name], retain_[name] = weights, (1 - weights) / alpha  # whose w is ``weights``
    return forget_, retain_


VARIANTS: Mapping[str, Callable[[Tensors, Tensors, Trial, float], Pair]] = {
    "half smoothed in rows": partial(smoothed, share=0.5),
    "one value a row": partial(smoothed, share=1.0),
    "shrunk, strength 0.1": partial(shrunk, strength=0.1),
    "shrunk, strength 1": partial(shrunk, strength=1.0),
    "strength by layer": trust_region,
}


def varied(trial: Trial, name: str, alpha: float) -> list[Path]:
    """The pieces of both importances of a variant."""
    given = importances(trial, "empirical-fisher")
    made_of: dict[str, Any] = {"given": [trial.name_of(each) for each in given], "variant": name}
    if name == "strength by layer":
        made_of |= {"tuned": trial.name_of(trial.models.tuned(trial.split)), "alpha": alpha}

    def make(folder: Path, role: int) -> None:
        loaded = [pf.Importance.load(each / "importance") for each in given]
        forget, retain = (dict(each.tensors) for each in loaded)
        tensors = VARIANTS[name](forget, retain, trial, alpha)[role]
        pf.Importance(tensors, loaded[role].metadata).save(folder / "importance")

    return [
        trial.piece(f"variant/{name} {role}", {**made_of, "role": role}, partial(make, role=number))
        for number, role in enumerate(("forget", "retain"))
    ]


def _weights(forget: Tensor, retain: Tensor, alpha: float) -> Tensor:
    """w, 0 where both are 0."""
    return torch.nan_to_num(forget / (forget + alpha * retain))


def _each(tensors: Tensors, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: change(tensor) for name, tensor in tensors.items()}


def _layer(name: str) -> str:
    """The decoder layer that a tensor belongs to; the embedding and the last norm are their own."""
    found = re.search(r"layers\.\d+", name)
    return found.group() if found else name
