"""Round-to-nearest quantisation of a model's linear maps, simulated: weights take the values that integers would give.

Of each group of weights, with P = 127 for 8 bits and 7 for 4 bits:

    s = max |w| / P        q = round(w / s), ties to even, within [-P, P]        w' = q · s

A group is a row of the matrix (out, in) for 8 bits; for 4 bits, 32 columns of a row, the last group of a row those that
remain. q is the code of a weight. All arithmetic is float32; w' is rounded once, to the type of the weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perta_fast.errors import InputError
from perta_fast.models.held_tensors import check_dtype, check_in_memory
from perta_fast.progress import Bar, Progress

BITS = (8, 4)
GROUP = 32  # columns of a row that share a scale with 4 bits
_LARGEST = {8: 127, 4: 7}


@dataclass(frozen=True)
class LinearWeight:
    """The weight of a linear map. parameter: (out, in), or (in, out) if ``transposed``; (experts, ...) if joined."""

    parameter: nn.Parameter
    transposed: bool = False

    @property
    def matrix(self) -> Tensor:
        """A view: (..., out, in)."""
        weight = self.parameter.detach()
        return weight.transpose(-1, -2) if self.transposed else weight


def linear_weights(module: nn.Module) -> dict[str, LinearWeight]:
    """The weights of all linear maps by the names of their parameters, each once.

    An output head is among them unless it is tied to the embedding, whose weight it is. So are the experts of a layer
    that are joined into one parameter. Embeddings, norms, biases and convolutions are not. Raises InputError if there
    is none, or one that is not plain float32, bfloat16 or float16 in memory.
    """
    from transformers.pytorch_utils import Conv1D

    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    found: dict[int, LinearWeight] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            is_map = name == "weight" and isinstance(part, nn.Linear | Conv1D)
            joined = parameter.ndim == 3 and not isinstance(part, nn.modules.conv._ConvNd)
            if (is_map or joined) and id(parameter) not in embeddings:
                transposed = isinstance(part, Conv1D) or (joined and getattr(part, "is_transposed", False))
                found.setdefault(id(parameter), LinearWeight(parameter, transposed))
    weights = {name: found[id(value)] for name, value in module.named_parameters() if id(value) in found}
    if not weights:
        raise InputError("the model has no linear map whose weights could be rounded")
    for name, weight in weights.items():
        check_in_memory(name, weight.parameter)
        check_dtype(name, weight.parameter.dtype)
    return weights


def codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """q and s of a weight (..., out, in): int8 and float32, both (..., out, groups, columns of a group or 1).

    Columns that the last group of a row lacks have code 0. The weight must be finite. Raises InputError for other bits.
    """
    largest = _LARGEST.get(bits)
    if largest is None:
        raise InputError(f"bits is {bits!r}; it must be 8 or 4")
    *rows, columns = weight.shape
    group = min(columns, GROUP) if bits == 4 else columns
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % group if group else 0))
    groups = padded.view(*rows, padded.shape[-1] // group if group else 0, group)
    if not groups.numel():
        return groups.to(torch.int8), groups.new_zeros(*groups.shape[:-1], 1)
    scale = groups.abs().amax(dim=-1, keepdim=True) / largest
    quotient = groups / scale.masked_fill(scale == 0, 1)  # all of the group is 0 then, or too small for a scale
    return quotient.round_().clamp_(-largest, largest).to(torch.int8), scale


def rounded(weight: Tensor, bits: int) -> Tensor:
    """w' of a weight (..., out, in), in its type. bits, errors: as for ``codes``. Memory: three float32 copies."""
    code, scale = codes(weight, bits)
    limit = torch.finfo(weight.dtype).max  # P · s can be one rounding above max |w|
    values = (code * scale).clamp_(-limit, limit)
    return values.flatten(-2)[..., : weight.shape[-1]].to(weight.dtype)


@torch.no_grad()
def rounded_(module: nn.Module, bits: int, *, progress: Progress = False) -> list[str]:
    """Round the weights of all linear maps of ``module`` in place; returns the names of these parameters.

    module: see ``linear_weights``, whose errors it raises before anything changes; also InputError, naming the
    parameter, for one with infinities or NaN, and for bits other than 8 and 4. Memory: a few float32 copies of one
    parameter.
    """
    if bits not in BITS:
        raise InputError(f"bits is {bits!r}; it must be 8 or 4")
    weights = linear_weights(module)
    check_roundable(weights, bits)
    with Bar(sum(weight.parameter.nbytes for weight in weights.values()), f"int{bits}", progress) as bar:
        for weight in weights.values():
            weight.matrix.copy_(rounded(weight.matrix, bits))
            bar.update(weight.parameter.nbytes)
    return list(weights)


def check_roundable(weights: Mapping[str, LinearWeight], bits: int) -> None:
    """Raise InputError, naming the parameter, for one with infinities or NaN."""
    for name, weight in weights.items():
        if not weight.parameter.isfinite().all():
            raise InputError(f"parameter {name} has values that are not finite, which cannot be rounded to {bits} bits")
