"""The loss of each sample, which does not depend on the batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from perta_fast.data.batches import Batch
from perta_fast.data.samples import IGNORED


def token_logits(module: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (M, V) float32, targets (M,) and sample numbers (M,) of the M labelled tokens.

    module: a causal language model, or a function that is called like one.
    """
    logits = module(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits  # (N, T, V)
    targets = batch.labels[:, 1:]  # token t is predicted at t - 1
    labelled = targets != IGNORED
    return logits[:, :-1][labelled].float(), targets[labelled], labelled.nonzero()[:, 0]


def sample_means(values: torch.Tensor, sample_of_token: torch.Tensor, count: int) -> torch.Tensor:
    """(count,): the mean of the tokens' ``values`` (M,) over each sample's tokens; NaN if it has none."""
    zeros = values.new_zeros(count)
    sums = zeros.index_add(0, sample_of_token, values)
    return sums / zeros.index_add(0, sample_of_token, torch.ones_like(values))


def per_sample_losses(module: Callable[..., Any], batch: Batch) -> torch.Tensor:
    """(N,) float32: each sample's cross-entropy, averaged over its labels, times the sample's share of its row."""
    logits, targets, sample_of_token = token_logits(module, batch)
    losses = functional.cross_entropy(logits, targets, reduction="none")
    return sample_means(losses, sample_of_token, len(batch.labels)) * batch.shares
