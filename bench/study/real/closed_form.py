"""Unlearning without training: K-FADE and NegMerge, each as a direction to subtract from theta_full.

A direction has a float32 tensor for each parameter that it changes, by the parameter's name in the module. The caller
subtracts it, times a strength. The linear layers are meant here without the output head, whose second moments would be
as large as the vocabulary squared.

Memory of the second moments, float32, for (d_out, d_in) matrices: 4 Σ d_in² bytes for the inputs and 4 Σ d_out² for the
gradients of the outputs. SmolLM2-135M: 0.52 and 0.69 GB; Gemma 3 270M: 0.53 and 0.75 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.study.real.compute import Direction, SampleLosses
from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.data.samples import Sample

PREDICTED_RISE = 1e-5  # nats of retain loss that K-FADE's curvature predicts at strength 1


def kfade(
    module: Any,
    forget: Sequence[Sample],
    retain: Sequence[Sample],
    losses: SampleLosses,
    *,
    damping: float = 0.1,
    batch_size: int = 8,
) -> Direction:
    """One uphill step on the forget loss, preconditioned by the curvature of the retain loss; theta_f is not needed.

    For each linear layer (d_out, d_in), minus (G + g I)⁻¹ F (A + a I)⁻¹: F is the mean gradient of the forget losses;
    A (d_in, d_in) is the mean of x xᵀ over tokens of ``retain``; G (d_out, d_out) is the mean over samples of Σ y yᵀ
    over tokens, where y is the gradient by the layer's output of a sample's mean token loss, times the root of its
    number of labels. a and g are √damping times the mean eigenvalues of A and G.

    The labels of ``retain`` are to be drawn from the model: then A ⊗ G is K-FAC's form of the Gauss-Newton matrix of
    the retain loss; with the data's it is that of the empirical Fisher. All layers are scaled by one number, so that at
    strength 1 this curvature predicts a rise of the retain loss by ``PREDICTED_RISE``, and c² times that at strength c.
    That is a unit, no forecast: the true rise is much larger. So the strength is to be searched.

    losses: runs its samples as one batch, padded on the right. damping: 0.1 as usual for influence functions.

    Source: K-FADE (arXiv 2602.10568), of which this is the first step; it takes a few, and new curvature for each.
    """
    weights = {name: layer.weight for name, layer in _linear_layers(module).items()}
    gradients = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    for numbers in batches_by_length(forget, batch_size):
        total = losses(module, [forget[k] for k in numbers]).sum() / len(forget)
        for name, found in zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True):
            gradients[name] += found
    inputs, outputs = _factors(module, retain, losses, batch_size)
    direction, squared = {}, 0.0
    for name, gradient in gradients.items():
        halfway = _divided(gradient.T, outputs[name], damping**0.5)  # (d_in, d_out), by G
        direction[name] = _divided(halfway.T, inputs[name], damping**0.5)
        squared += float((direction[name].double() * gradient).sum())
    scale = (2 * PREDICTED_RISE / squared) ** 0.5
    return {name: -scale * tensor for name, tensor in direction.items()}


def agreeing(directions: Sequence[Mapping[str, Tensor]]) -> Direction:
    """The mean of several task vectors where all have the same sign, else 0.

    directions: theta_f - theta_0 for several theta_f that were tuned on the forget rows in different ways.

    Source: NegMerge (arXiv 2410.05583).
    """
    merged = {}
    for name, first in directions[0].items():
        tensors = [direction[name] for direction in directions]
        agree = torch.ones_like(first, dtype=torch.bool)
        for tensor in tensors[1:]:
            agree &= tensor.sign() == first.sign()
        merged[name] = sum(tensors[1:], first) / len(tensors) * agree
    return merged


def _factors(
    module: Any, samples: Sequence[Sample], losses: SampleLosses, batch_size: int
) -> tuple[Direction, Direction]:
    """A and G of ``kfade`` for the weight of each linear layer."""
    inputs: Direction = {}
    outputs: Direction = {}
    count = 0
    for numbers in batches_by_length(samples, batch_size):
        chosen = [samples[k] for k in numbers]
        with _recording(module) as seen:
            values = losses(module, chosen)
        # With drawn labels the gradients of the tokens are independent: their mean over T has a T-th of the square.
        roots = torch.tensor([sample.label_count**0.5 for sample in chosen], device=values.device)
        found = torch.autograd.grad((values * roots).sum(), [output for _, output in seen.values()])
        real = _real_tokens(module, chosen)
        count += int(real.sum())
        for (name, (given, _)), gradient in zip(seen.items(), found, strict=True):
            _add_products_(inputs, name, given.detach()[real])
            _add_products_(outputs, name, gradient[real])
    return (
        {name: total / count for name, total in inputs.items()},
        {name: total / len(samples) for name, total in outputs.items()},
    )


def _linear_layers(module: Any) -> dict[str, nn.Linear]:
    """All but the output head, by the name of their weight."""
    head = module.get_output_embeddings()
    return {
        f"{name}.weight": layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }


@contextmanager
def _recording(module: Any) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input (N, T, d_in) and output (N, T, d_out) of each linear layer, by the name of its weight."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def see(_layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = given[0], output

        return see

    hooks = [layer.register_forward_hook(hook_of(name)) for name, layer in _linear_layers(module).items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _real_tokens(module: Any, samples: list[Sample]) -> Tensor:
    """(N, T) bool: False on padding."""
    return Batch.of(samples, next(module.parameters()).device).attention_mask.bool()


def _add_products_(sums: Direction, name: str, vectors: Tensor) -> None:
    """Add Σ v vᵀ over the rows v of ``vectors`` (M, d), in float32."""
    vectors = vectors.float()
    if name not in sums:
        sums[name] = vectors.new_zeros(vectors.shape[1], vectors.shape[1])
    sums[name].addmm_(vectors.T, vectors)


def _divided(matrix: Tensor, factor: Tensor, damping: float) -> Tensor:
    """``matrix`` (m, d) times the inverse of ``factor`` (d, d) + damping · its mean eigenvalue · I."""
    factor = factor.double()
    mean = factor.diagonal().mean()
    return _solved(matrix, factor + damping * mean * torch.eye(len(factor), dtype=factor.dtype, device=factor.device))


def _solved(matrix: Tensor, factor: Tensor) -> Tensor:
    """``matrix`` (m, d) times the inverse of ``factor`` (d, d), which is symmetric and positive; float32."""
    solution = torch.cholesky_solve(matrix.to(factor).T, torch.linalg.cholesky(factor))
    return solution.T.float().contiguous()
