"""Adapters that are as peft made them before training, though what they add is not quite zero.

Some forms begin with numbers that are computed from the base, and are saved rounded, or rounded otherwise on another
machine. Merged, they give the base but for that rounding, which is no task vector.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_as_before_training(module: nn.Module, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    """Whether an adapter adds no more than rounding to the matrix of ``module``, which has the base's weights.

    tensors: the adapter's for this module, by name within it. False for a form that begins with exact zeros.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    if settings["peft_type"] == "HRA" and not settings.get("apply_GS"):
        return _reflections_cancel(tensors["hra_u"])
    transposed = bool(settings.get("fan_in_fan_out")) or isinstance(module, nn.Embedding)
    logical = weight.T if transposed else weight
    if settings["peft_type"] == "DEFT":
        return _removes_what_it_adds(logical, tensors, settings)
    if settings.get("use_dora"):
        return _keeps_norms(logical, tensors)
    return False


def _keeps_norms(weight: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    """DoRA: nothing is added to the directions, and each row has the length that it had."""
    factors = [tensors[name] for name in tensors if name.startswith(("lora_A", "lora_B", "lora_embedding_"))]
    magnitude = tensors.get("lora_magnitude_vector")
    if magnitude is None or all(bool(factor.any()) for factor in factors):
        return False
    norms = torch.linalg.norm(weight, dim=1)
    return bool(((magnitude.float() - norms).abs() <= _rounding(magnitude) * norms).all())


def _reflections_cancel(vectors: Tensor) -> bool:
    """HRA: each pair of reflections is of one vector, so that the second undoes the first."""
    return vectors.shape[1] % 2 == 0 and torch.equal(vectors[:, 0::2], vectors[:, 1::2])


def _removes_what_it_adds(weight: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    """DEFT: R is the part of the base that the projection removes. P is rounded after R was made of it."""
    if "deft_R" not in tensors:
        return False
    factor = tensors["deft_P"].float()
    right = torch.relu(factor) if settings.get("decomposition_method") == "relu" else torch.linalg.qr(factor)[0]
    added = tensors["deft_R"].float() * (settings["alpha"] / factor.shape[1] if settings.get("alpha") else 1.0)
    limit = _rounding(tensors["deft_R"]) * torch.linalg.norm(right) * torch.linalg.norm(weight, dim=0)
    return bool(((added - right.T @ weight).abs() <= limit).all())


def _rounding(tensor: Tensor) -> float:
    """How far the values of ``tensor``, relative to themselves, may be from those before they were rounded.

    An adapter of a 16-bit base may be stored in float32 though its values were made in 16 bits. In float32 the order
    of a sum shows, which is another on another machine.
    """
    values = tensor.float()
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).float(), values):
            return torch.finfo(dtype).eps
    return 16 * torch.finfo(torch.float32).eps
