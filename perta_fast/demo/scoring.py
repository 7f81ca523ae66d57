"""Loss and accuracy of a model's answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.data.samples import Sample
from perta_fast.models.losses import sample_means, token_logits

_BATCH_SIZE = 64


@dataclass(frozen=True)
class Score:
    """Loss and accuracy on a set of questions.

    loss: mean over the questions of the mean cross-entropy (nats) of an answer's tokens, the end included. accuracy:
    percentage of the questions whose answer greedy decoding reproduces exactly, to its end. One forward pass over
    question and answer shows this: decoding gives the answer if each of its tokens is the most likely one.
    """

    loss: float
    accuracy: float
    questions: int


@torch.no_grad()
def score(module: nn.Module, samples: Sequence[Sample]) -> Score:
    """Score ``module``, in evaluation mode, on ``samples``."""
    losses, exact = [], []
    for numbers in batches_by_length(samples, _BATCH_SIZE):
        logits, targets, sample_of_token = token_logits(module, Batch.of([samples[k] for k in numbers]))
        token_losses = functional.cross_entropy(logits, targets, reduction="none")
        hits = (logits.argmax(dim=-1) == targets).float()
        losses.append(sample_means(token_losses, sample_of_token, len(numbers)))
        exact.append(sample_means(hits, sample_of_token, len(numbers)) == 1)
    return Score(
        loss=torch.cat(losses).mean().item(),
        accuracy=100 * torch.cat(exact).float().mean().item(),
        questions=len(samples),
    )
