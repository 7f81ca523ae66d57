"""The batches of ``score_tokens``, with a row of a scratch file for each of their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.data.samples import Sample
from perta_fast.distributed.ranks import Ranks, deal
from perta_fast.streaming.micro_batch import MicroBatch
from perta_fast.streaming.schedule import Schedule


@dataclass(frozen=True)
class PaddedBatch:
    """Samples that run together. rows: of a scratch file, of which padding has some too; mask: (N, T), 0 on padding.

    Where a layer routes tokens to experts, what stands on padding decides how their rows are laid out, and so their
    last bits.
    """

    rows: MicroBatch
    mask: Tensor


def batches_of(
    samples: Sequence[Sample], schedule: Schedule, group: int, device: torch.device, ranks: Ranks
) -> list[PaddedBatch]:
    """The batches of a group that this rank runs: those of ``score_tokens``, whole."""
    batches = list(batches_by_length(samples, schedule.batch_size))
    tokens = [sum(len(samples[k].input_ids) for k in batch) for batch in batches]
    own: list[PaddedBatch] = []
    row = 0
    for number in schedule.of_group(deal(tokens, ranks.world)[ranks.rank], group):
        numbers = batches[number]
        batch = Batch.of([samples[k] for k in numbers], device)
        count, longest = batch.input_ids.shape
        rows = MicroBatch(batch.input_ids, (longest,) * count, row, tuple(numbers))
        own.append(PaddedBatch(rows, batch.attention_mask))
        row += count * longest
    return own
