"""A small Llama, and the loop that trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from bench.study.settings import Settings
from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.data.samples import IGNORED, Sample
from perta_fast.demo.training import new_llama
from perta_fast.models.losses import sample_means

_GROUP = 16  # batches whose samples are sorted by length together: little padding, and still a random order
_WARM_UP = 0.1  # of the steps


def new_model(settings: Settings, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The study's Llama, untrained; input and output embeddings are tied."""
    return new_llama(
        tokenizer,
        seed,
        hidden_size=settings.hidden_size,
        intermediate_size=8 * settings.hidden_size // 3,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
    )


def losses_of(module: Any, batch: Batch) -> Tensor:
    """(N,): ``per_sample_losses`` of a Llama, with no logits where there is no label: a fifth less work."""
    hidden = module.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state  # (N, T, hidden)
    targets = batch.labels[:, 1:]
    labelled = targets != IGNORED
    logits = module.lm_head(hidden[:, :-1][labelled])
    losses = functional.cross_entropy(logits, targets[labelled], reduction="none")
    return sample_means(losses, labelled.nonzero()[:, 0], len(targets))


def tune_(
    module: nn.Module, samples: Sequence[Sample], *, epochs: int, rate: float, batch_size: int, seed: int
) -> None:
    """Train on the samples' losses, the rate warmed up and then lowered to 0. ``seed`` decides the order."""
    device = next(module.parameters()).device
    order = torch.Generator().manual_seed(seed)
    batches = [batch for _ in range(epochs) for batch in _epoch(samples, batch_size, order)]
    warm_up = max(1, int(_WARM_UP * len(batches)))

    def rate_at(step: int) -> float:
        return rate * min((step + 1) / warm_up, (len(batches) - step) / (len(batches) - warm_up + 1))

    def loss(numbers: list[int]) -> Tensor:
        return losses_of(module, Batch.of([samples[k] for k in numbers], device)).mean()

    for _ in descend_(module, batches, loss, rate_at):
        pass
    module.eval()


def descend_(
    module: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[Any], Tensor],
    rate_at: Callable[[int], float],
) -> Iterator[int]:
    """AdamW down the ``loss`` of each batch, gradients clipped to norm 1; yields the steps taken after each."""
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0, fused=True)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate_at(step)
        module.train()
        loss(batch).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1


def _epoch(samples: Sequence[Sample], batch_size: int, order: torch.Generator) -> list[list[int]]:
    """Every sample once, in batches of about equal length, in random order."""
    batches = []
    for group in torch.randperm(len(samples), generator=order).split(_GROUP * batch_size):
        numbers = group.tolist()
        in_group = [samples[k] for k in numbers]
        batches += [[numbers[k] for k in batch] for batch in batches_by_length(in_group, batch_size)]
    return [batches[k] for k in torch.randperm(len(batches), generator=order).tolist()]
