"""The study's small Llama, its losses, and its tuning, with the training loop of the demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from bench.study.settings import Settings
from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.data.samples import IGNORED, Sample
from perta_fast.demo.training import descend_, new_llama, warmed_up
from perta_fast.models.losses import sample_means

Losses = Callable[[Any, Batch], Tensor]  # (N,), of each sample of a batch


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
    """(N,): ``per_sample_losses`` of a Llama. Only labelled tokens get logits, which saves a fifth of the work."""
    hidden = module.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state  # (N, T, hidden)
    targets = batch.labels[:, 1:]
    labelled = targets != IGNORED
    logits = module.lm_head(hidden[:, :-1][labelled])
    losses = functional.cross_entropy(logits, targets[labelled], reduction="none")
    return sample_means(losses, labelled.nonzero()[:, 0], len(targets))


@torch.no_grad()
def all_losses(module: Any, samples: Sequence[Sample], batch_size: int, losses: Losses = losses_of) -> Tensor:
    """(N,) float32 on the CPU: the loss of each sample, in the order of the samples."""
    values = torch.empty(len(samples))
    device = next(module.parameters()).device
    for numbers in batches_by_length(samples, batch_size):
        values[numbers] = losses(module, Batch.of([samples[k] for k in numbers], device)).cpu()
    return values


def mean_loss(module: Any, samples: Sequence[Sample], batch_size: int, losses: Losses = losses_of) -> float:
    """The mean over samples of their mean token loss, as ``sweep`` measures it."""
    return all_losses(module, samples, batch_size, losses).double().mean().item()


def tune_(
    module: nn.Module,
    samples: Sequence[Sample],
    *,
    epochs: int,
    rate: float,
    batch_size: int,
    seed: int,
    group: int = 16,
    losses: Losses = losses_of,
) -> None:
    """Train on the mean loss of the samples; the rate rises, then falls to 0. seed: decides the order of samples.

    group: batches whose samples are sorted by length together, for little padding in a random order.
    """
    device = next(module.parameters()).device
    order = torch.Generator().manual_seed(seed)
    batches = [batch for _ in range(epochs) for batch in _epoch(samples, batch_size, group, order)]

    def loss(numbers: list[int]) -> Tensor:
        return losses(module, Batch.of([samples[k] for k in numbers], device)).mean()

    for _ in descend_(module, batches, loss, warmed_up(rate, len(batches))):
        pass
    module.eval()


def _epoch(samples: Sequence[Sample], batch_size: int, size: int, order: torch.Generator) -> list[list[int]]:
    """The numbers of all samples, in batches of similar length, in random order."""
    batches = []
    for group in torch.randperm(len(samples), generator=order).split(size * batch_size):
        numbers = group.tolist()
        in_group = [samples[k] for k in numbers]
        batches += [[numbers[k] for k in batch] for batch in batches_by_length(in_group, batch_size)]
    return [batches[k] for k in torch.randperm(len(batches), generator=order).tolist()]
