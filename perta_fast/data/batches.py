"""Batches of samples: padded, and grouped by length."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from perta_fast.data.samples import IGNORED, Sample


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right to the longest."""

    input_ids: torch.Tensor  # (N, T) int64
    attention_mask: torch.Tensor  # (N, T) int64, 1 on real tokens
    labels: torch.Tensor  # (N, T) int64, IGNORED where there is no loss
    shares: torch.Tensor  # (N,) float32, what each loss is weighted by

    @classmethod
    def of(cls, samples: Sequence[Sample], device: torch.device | str = "cpu") -> "Batch":
        """Pad ``samples`` and move them to ``device``."""
        longest = max(len(sample.input_ids) for sample in samples)

        def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
            return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], device=device)

        return cls(
            # Padding can be any token id: it is masked, and no real token comes after it.
            input_ids=padded([sample.input_ids for sample in samples], 0),
            attention_mask=padded([[1] * len(sample.input_ids) for sample in samples], 0),
            labels=padded([sample.labels for sample in samples], IGNORED),
            shares=torch.tensor([sample.share for sample in samples], device=device),
        )


def batches_by_length(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """The numbers of the samples in each batch, the longest samples first.

    So samples of similar length share a batch, and a batch that is too large for the memory fails at the start.
    """
    order = sorted(range(len(samples)), key=lambda k: -len(samples[k].input_ids))
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]


def batches_of_one_length(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """The same, but all samples of a batch have one length, so that none is padded."""
    by_length = defaultdict(list)
    for number, sample in enumerate(samples):
        by_length[len(sample.input_ids)].append(number)
    for _, numbers in sorted(by_length.items(), reverse=True):
        for begin in range(0, len(numbers), batch_size):
            yield numbers[begin : begin + batch_size]
