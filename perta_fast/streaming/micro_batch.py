"""Samples that run through a part of the model together, and their rows in a scratch file.

Shapes: N samples, T tokens of the longest of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perta_fast.data.batches import Batch
from perta_fast.data.samples import Sample


@dataclass(frozen=True)
class MicroBatch:
    """Token ids (N, T), padded on the right; a scratch file has a row for each token that is not padding."""

    input_ids: Tensor
    lengths: tuple[int, ...]
    first_row: int
    numbers: tuple[int, ...] = ()  # of the samples

    @property
    def attention_mask(self) -> Tensor:
        """(N, T) int64, 0 on padding and 1 elsewhere."""
        mask = torch.arange(self.input_ids.shape[1]) < torch.tensor(self.lengths)[:, None]
        return mask.long().to(self.input_ids.device)

    def split(self) -> list["MicroBatch"]:
        """A micro-batch for each sample, without padding."""
        row, singles = self.first_row, []
        for k, length in enumerate(self.lengths):
            ids = self.input_ids[k : k + 1, :length]
            singles.append(MicroBatch(ids, (length,), row, self.numbers[k : k + 1]))
            row += length
        return singles


def micro_batches(
    samples: Sequence[Sample], batches: Iterable[Sequence[int]], device: torch.device
) -> list[MicroBatch]:
    """One micro-batch for each list of sample numbers; their rows follow each other."""
    result, row = [], 0
    for numbers in batches:
        chosen = [samples[k] for k in numbers]
        lengths = tuple(len(sample.input_ids) for sample in chosen)
        result.append(MicroBatch(Batch.of(chosen, device).input_ids, lengths, row, tuple(numbers)))
        row += sum(lengths)
    return result
