"""Losses of a real model, with products in bfloat16 and everything else in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.study import training
from perta_fast.data.batches import Batch
from perta_fast.data.samples import Sample

BATCH_SIZE = 16  # of what needs no gradients
Direction = dict[str, Tensor]  # what a method subtracts at strength 1, by the name of the parameter; float32
SampleLosses = Callable[[Any, list[Sample]], Tensor]  # (N,), of samples that make one batch


def fast_products(module: Any) -> torch.autocast:
    """Within it, matrix products take bfloat16 inputs."""
    return torch.autocast(next(module.parameters()).device.type, torch.bfloat16)


def losses_of(module: Any, batch: Batch) -> Tensor:
    """(N,) float32: the mean token loss of each sample; can be differentiated."""
    with fast_products(module):
        return training.losses_of(module, batch).float()


def sample_losses(module: Any, samples: Sequence[Sample]) -> Tensor:
    """The same of samples that make one batch."""
    return losses_of(module, Batch.of(samples, next(module.parameters()).device))


all_losses = partial(training.all_losses, batch_size=BATCH_SIZE, losses=losses_of)
mean_loss = partial(training.mean_loss, batch_size=BATCH_SIZE, losses=losses_of)
tune_ = partial(training.tune_, group=8, losses=losses_of)
