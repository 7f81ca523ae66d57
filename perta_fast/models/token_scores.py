"""Scores of each labelled token from a model's logits, in one forward pass over each sample."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.data.samples import IGNORED, Sample, by_row
from perta_fast.files.kept_rows import KeptRows
from perta_fast.models.scores import TokenScores
from perta_fast.progress import Bar, Progress

_CHUNK = 1 << 24  # logits that are worked on at a time
_FLOOR = -1e4  # a logit of -inf is a probability of 0, and must stay so when multiplied


def score_tokens(
    module: nn.Module,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    detailed: bool = False,
    hits: bool = False,
    hidden: int | None = None,
    rows: KeptRows | None = None,
    progress: Progress = False,
    description: str = "scoring",
) -> list[TokenScores]:
    """Score every labelled token of ``samples``, in their order, from float32 logits.

    module: a causal language model in evaluation mode. If it takes ``logits_to_keep``, as models of transformers do, no
    logits are computed before a batch's first label. detailed: ``hits`` and ``standardised`` too. hits: these alone.
    hidden: a token that is masked wherever it stands. rows: batches that are known already, and the place for others;
    they must have been of the same ``batch_size``. Memory beside the model's: the logits of one batch, and a few
    times 64 MiB.
    """
    device = device_of(module)
    run = partial(module, use_cache=False)
    rows = KeptRows() if rows is None else rows
    scores: dict[int, TokenScores] = dict(rows.done)
    with Bar(len(samples), description, progress, "sample", done=len(scores)) as bar, torch.inference_mode():
        for numbers in batches_by_length(samples, batch_size):
            if all(number in rows.done for number in numbers):
                continue
            batch = Batch.of([samples[k] for k in numbers], device)
            of_batch = score_batch(run, batch, trims=trims(module), detailed=detailed, hits=hits, hidden=hidden)
            scores |= (found := dict(zip(numbers, of_batch, strict=True)))
            rows.add(found)
            bar.update(len(numbers))
    return [scores[number] for number in range(len(samples))]


def score_batch(
    run: Callable[..., Any], batch: Batch, *, trims: bool, detailed: bool, hits: bool, hidden: int | None
) -> list[TokenScores]:
    """``score_tokens`` of one batch. run: takes input_ids and attention_mask. trims: and logits_to_keep."""
    labelled = batch.labels[:, 1:] != IGNORED  # token t is predicted at t - 1
    begin = int(labelled.any(dim=0).nonzero()[0]) if trims else 0
    kept = {"logits_to_keep": batch.labels.shape[1] - begin} if trims else {}
    mask = seen(batch.input_ids, batch.attention_mask, hidden)
    logits = run(input_ids=batch.input_ids, attention_mask=mask, **kept).logits  # (N, T - begin, V)
    labelled = labelled[:, begin:]
    targets = batch.labels[:, 1 + begin :][labelled]
    columns = _by_token(logits[:, :-1][labelled], targets, detailed, hits)
    split = [column.cpu().split(labelled.sum(dim=1).tolist()) for column in columns]
    return [TokenScores(*(column[k].numpy() for column in split)) for k in range(len(batch.labels))]


def seen(input_ids: Tensor, attention_mask: Tensor, hidden: int | None) -> Tensor:
    """The attention mask (N, T) of a batch, 0 on the token ``hidden`` too."""
    return attention_mask if hidden is None else attention_mask * (input_ids != hidden)


def trims(module: nn.Module) -> bool:
    """Whether a model takes ``logits_to_keep``."""
    return "logits_to_keep" in inspect.signature(module.forward).parameters


def score_rows(module: nn.Module, samples: Sequence[Sample], **how: Any) -> list[TokenScores]:
    """``score_tokens``, with the tokens of all samples of a row in one."""
    scores = score_tokens(module, samples, **how)
    return [TokenScores.joined([scores[k] for k in numbers]) for numbers in by_row(samples)]


def _by_token(logits: Tensor, targets: Tensor, detailed: bool, with_hits: bool) -> list[Tensor]:
    """The columns of ``TokenScores`` for M tokens, from logits (M, V), a chunk at a time."""
    log_probs, hits, standardised = [], [], []
    step = max(1, _CHUNK // logits.shape[-1])
    for chunk, target in zip(logits.split(step), targets.split(step), strict=True):
        chunk = chunk.float()
        if not detailed:
            log_probs.append(-functional.cross_entropy(chunk, target, reduction="none"))
            if with_hits:
                hits.append(chunk.argmax(dim=-1) == target)
            continue
        of_all = chunk.log_softmax(dim=-1)
        of_target = of_all.gather(1, target[:, None])[:, 0]
        log_probs.append(of_target)
        hits.append(of_all.argmax(dim=-1) == target)
        of_all = of_all.clamp(min=_FLOOR)
        probabilities = of_all.exp()
        mean = (probabilities * of_all).sum(dim=-1, keepdim=True)
        variance = (probabilities * (of_all - mean).square()).sum(dim=-1)
        standardised.append((of_target - mean[:, 0]) / variance.clamp(min=1e-6).sqrt())
    return [torch.cat(column) for column in (log_probs, hits, standardised) if column]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put every submodule in evaluation mode, and back into its own mode at the end."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
