"""What a model's logits say of each labelled token, in one forward pass a sample."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.data.samples import IGNORED, Sample
from perta_fast.progress import Bar, Progress

_CHUNK = 1 << 24  # logits that are worked on at a time
_FLOOR = -1e4  # a logit of -inf is a probability of 0, and must stay so when multiplied


@dataclass(frozen=True)
class TokenScores:
    """What a model says of one sample's L labelled tokens, each given those before it.

    log_probs: (L,) float32, nats. hits: (L,) bool, whether the token is the likeliest. standardised: (L,)
    float32, (log p - mean) / deviation, both over the vocabulary under the model. The last two are empty unless
    asked for.
    """

    log_probs: NDArray[np.float32]
    hits: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=np.bool_))
    standardised: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, dtype=np.float32))


def score_tokens(
    module: nn.Module,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    detailed: bool = False,
    progress: Progress = False,
    description: str = "scoring",
) -> list[TokenScores]:
    """Score every labelled token of ``samples``, in their order, from float32 logits.

    module: a causal language model in evaluation mode; where it takes ``logits_to_keep``, as those of
    transformers do, no logits are computed ahead of a batch's first label. detailed: ``hits`` and
    ``standardised`` too. Memory beside the model's: the logits of one batch, and 64 MiB a few times over.
    """
    device = device_of(module)
    trims = "logits_to_keep" in inspect.signature(module.forward).parameters
    scores: list[TokenScores | None] = [None] * len(samples)
    with Bar(len(samples), description, progress, "sample") as bar, torch.inference_mode():
        for numbers in batches_by_length(samples, batch_size):
            batch = Batch.of([samples[k] for k in numbers], device)
            labelled = batch.labels[:, 1:] != IGNORED  # token t is predicted at t - 1
            begin = int(labelled.any(dim=0).nonzero()[0]) if trims else 0
            kept = {"logits_to_keep": batch.labels.shape[1] - begin} if trims else {}
            logits = module(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **kept
            ).logits  # (N, T - begin, V)
            labelled = labelled[:, begin:]
            targets = batch.labels[:, 1 + begin :][labelled]
            columns = _by_token(logits[:, :-1][labelled], targets, detailed)
            counts = labelled.sum(dim=1).tolist()
            split = [column.cpu().split(counts) for column in columns]
            for k, number in enumerate(numbers):
                scores[number] = TokenScores(*(column[k].numpy() for column in split))
            bar.update(len(numbers))
    return [score for score in scores if score is not None]


def _by_token(logits: Tensor, targets: Tensor, detailed: bool) -> list[Tensor]:
    """The columns of ``TokenScores`` that are asked for, of M tokens from logits (M, V), a chunk at a time."""
    log_probs, hits, standardised = [], [], []
    step = max(1, _CHUNK // logits.shape[-1])
    for chunk, wanted in zip(logits.split(step), targets.split(step), strict=True):
        chunk = chunk.float()
        if not detailed:
            log_probs.append(-functional.cross_entropy(chunk, wanted, reduction="none"))
            continue
        every = chunk.log_softmax(dim=-1)
        own = every.gather(1, wanted[:, None])[:, 0]
        log_probs.append(own)
        hits.append(every.argmax(dim=-1) == wanted)
        every = every.clamp(min=_FLOOR)
        weights = every.exp()
        center = (weights * every).sum(dim=-1, keepdim=True)
        variance = (weights * (every - center).square()).sum(dim=-1)
        standardised.append((own - center[:, 0]) / variance.clamp(min=1e-6).sqrt())
    return [torch.cat(column) for column in (log_probs, hits, standardised) if column]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Every submodule in evaluation mode, and afterwards as it was."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
