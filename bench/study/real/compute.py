"""Losses and training of a real model, with products in bfloat16 and everything else in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.study.training import losses_of
from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.data.samples import Sample
from perta_fast.demo.training import descend_, warmed_up

_GROUP = 8  # batches whose samples are sorted by length together


def sample_losses(module: Any, samples: Sequence[Sample]) -> Tensor:
    """(N,) float32: the mean token loss of each sample, as one batch; can be differentiated."""
    device = next(module.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        return losses_of(module, Batch.of(samples, device)).float()


@torch.no_grad()
def all_losses(module: Any, samples: Sequence[Sample], batch_size: int = 16) -> Tensor:
    """(N,) float32 on the CPU: the losses of any number of samples, in their order."""
    losses = torch.empty(len(samples))
    for numbers in batches_by_length(samples, batch_size):
        losses[numbers] = sample_losses(module, [samples[k] for k in numbers]).cpu()
    return losses


def mean_loss(module: Any, samples: Sequence[Sample]) -> float:
    """The mean over samples of their mean token loss."""
    return all_losses(module, samples).double().mean().item()


def tune_(
    module: nn.Module, samples: Sequence[Sample], *, epochs: int, rate: float, batch_size: int, seed: int
) -> None:
    """Train the parameters that require gradients; the rate rises, then falls to 0. seed: the order of the samples."""
    order = torch.Generator().manual_seed(seed)
    batches = [batch for _ in range(epochs) for batch in _epoch(samples, batch_size, order)]

    def loss(numbers: list[int]) -> Tensor:
        return sample_losses(module, [samples[k] for k in numbers]).mean()

    for _ in descend_(module, batches, loss, warmed_up(rate, len(batches))):
        pass
    module.eval()


def _epoch(samples: Sequence[Sample], batch_size: int, order: torch.Generator) -> list[list[int]]:
    """The numbers of all samples, in batches of similar length, in random order."""
    batches = []
    for group in torch.randperm(len(samples), generator=order).split(_GROUP * batch_size):
        numbers = group.tolist()
        in_group = [samples[k] for k in numbers]
        batches += [[numbers[k] for k in batch] for batch in batches_by_length(in_group, batch_size)]
    return [batches[k] for k in torch.randperm(len(batches), generator=order).tolist()]
