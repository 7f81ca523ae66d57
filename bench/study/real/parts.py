"""Parts of a model: which parameters a method changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.study.real.compute import Direction
from bench.study.real.models import Models
from perta_fast.checkpoints.checkpoint import Checkpoint

EVERYTHING, LINEAR = "everything", "linear layers"
ONLY_FORGET = "embedding of tokens in forget rows only"
SPLIT_EMBEDDING = ("embedding, as input", "head")  # parts of models that are not tied
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Shape:
    """What a part is chosen by. layers: decoder layers. rows: (V,) bool, tokens that only forget rows have."""

    layers: int
    rows: Tensor


def group_of(name: str) -> str:
    """The group of a parameter by its name: embedding, head, attention, MLP or norms."""
    if "embed_tokens" in name:
        return "embedding"
    if "lm_head" in name:
        return "head"
    if "norm" in name:
        return "norms"
    return "attention" if "self_attn" in name else "MLP"


def _third(name: str, shape: Shape) -> int | None:
    layer = _LAYER.search(name)
    return None if layer is None else 3 * int(layer[1]) // shape.layers


def _linear(name: str) -> bool:
    return group_of(name) in ("attention", "MLP")


# Whether a parameter belongs to the part; a mask of rows where only some of them do.
PARTS: Mapping[str, Callable[[str, Shape], bool | Tensor]] = {
    EVERYTHING: lambda name, shape: True,
    LINEAR: lambda name, shape: _linear(name),
    "embedding": lambda name, shape: group_of(name) in ("embedding", "head"),
    "embedding, as input": lambda name, shape: group_of(name) == "embedding",
    "head": lambda name, shape: group_of(name) == "head",
    "norms": lambda name, shape: group_of(name) == "norms",
    "attention": lambda name, shape: group_of(name) == "attention",
    "MLP": lambda name, shape: group_of(name) == "MLP",
    "first third of the layers": lambda name, shape: _third(name, shape) == 0 and _linear(name),
    "middle third of the layers": lambda name, shape: _third(name, shape) == 1 and _linear(name),
    "last third of the layers": lambda name, shape: _third(name, shape) == 2 and _linear(name),
    ONLY_FORGET: lambda name, shape: shape.rows if group_of(name) in ("embedding", "head") else False,
    f"everything but the {ONLY_FORGET}": lambda name, shape: (
        ~shape.rows if group_of(name) in ("embedding", "head") else True
    ),
}


def limited(part: str, shape: Shape, direction: Direction) -> Direction:
    """What of ``direction`` belongs to the part."""
    kept = {}
    for name, tensor in direction.items():
        chosen = PARTS[part](name, shape)
        if chosen is True:
            kept[name] = tensor
        elif isinstance(chosen, Tensor):
            kept[name] = tensor * chosen[:, None]
    return kept


def shape_of(models: Models) -> Shape:
    """The shape of a model and its rows."""
    tokens = {
        role: {token for sample in models.samples(getattr(models.rows, role)) for token in sample.input_ids}
        for role in ("forget", "retain")
    }
    tensors = Checkpoint.open(models.base()).tensors
    embedding = next(entry for name, entry in tensors.items() if group_of(name) == "embedding")
    rows = torch.zeros(embedding.shape[0], dtype=torch.bool)
    rows[sorted(tokens["forget"] - tokens["retain"])] = True
    return Shape(1 + max(int(layer[1]) for layer in map(_LAYER.search, tensors) if layer is not None), rows)
