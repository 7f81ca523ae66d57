"""Batches of samples, and each sample's own loss, independent of the batch it is in."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from perta_fast.data.samples import IGNORED, Sample


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right to the longest."""

    input_ids: torch.Tensor  # (N, T) int64
    attention_mask: torch.Tensor  # (N, T) int64, 1 on real tokens
    labels: torch.Tensor  # (N, T) int64, IGNORED where there is no loss

    @classmethod
    def of(cls, samples: Sequence[Sample], device: torch.device | str = "cpu") -> "Batch":
        """Pad ``samples`` and move them to ``device``."""
        longest = max(len(sample.input_ids) for sample in samples)

        def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
            return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], device=device)

        return cls(
            # Any token id will do for padding: it is masked, and comes after all that could attend to it.
            input_ids=padded([sample.input_ids for sample in samples], 0),
            attention_mask=padded([[1] * len(sample.input_ids) for sample in samples], 0),
            labels=padded([sample.labels for sample in samples], IGNORED),
        )


def batches_by_length(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """Numbers of the samples of each batch, the longest samples first.

    Samples of like length share a batch, and a batch too large for the memory fails at the start.
    """
    order = sorted(range(len(samples)), key=lambda k: -len(samples[k].input_ids))
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]


def token_logits(module: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (M, V) float32, targets (M,) and sample numbers (M,) of the M tokens that have a label.

    module: a causal language model, or what is called as one.
    """
    logits = module(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits  # (N, T, V)
    targets = batch.labels[:, 1:]  # token t is predicted at t - 1
    labelled = targets != IGNORED
    return logits[:, :-1][labelled].float(), targets[labelled], labelled.nonzero()[:, 0]


def sample_means(values: torch.Tensor, sample_of_token: torch.Tensor, count: int) -> torch.Tensor:
    """(count,): the mean of the tokens' ``values`` (M,) over each sample's tokens; NaN if it has none."""
    zeros = values.new_zeros(count)
    sums = zeros.index_add(0, sample_of_token, values)
    return sums / zeros.index_add(0, sample_of_token, torch.ones_like(values))


def per_sample_losses(module: Callable[..., Any], batch: Batch) -> torch.Tensor:
    """(N,) float32: each sample's cross-entropy, averaged over its own labels."""
    logits, targets, sample_of_token = token_logits(module, batch)
    losses = functional.cross_entropy(logits, targets, reduction="none")
    return sample_means(losses, sample_of_token, len(batch.labels))
