"""One importance estimate, ours or a plain backward: ``python -m bench.inputs.importance_job NAME``.

As a program it runs one contender once, so that its peak memory can be read from outside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import perta_fast as pf
from bench.harness.conditions import threads
from bench.inputs.random_llama import SMALL, random_llama
from perta_fast.data.samples import Sample

SAMPLES, TOKENS, BATCH = 32, 128, 8


def make_model() -> nn.Module:
    """Make a random Llama of 22 M parameters in float32."""
    return random_llama(SMALL, TOKENS).train()


def make_tokens() -> torch.Tensor:
    """Make the batch data, (32, 128) int64."""
    return torch.randint(SMALL.vocabulary, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))


def plain_backward(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Accumulate the mean gradient in ``.grad``, as a training step does before the optimizer."""
    model.zero_grad(set_to_none=True)
    for batch in tokens.split(BATCH):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        (loss * len(batch) / len(tokens)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sample_by_sample(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Accumulate the same gradient with batches of one, as published importance scripts do."""
    model.zero_grad(set_to_none=True)
    for sample in tokens.split(1):
        loss = model(input_ids=sample, labels=sample, use_cache=False).loss
        (loss / len(tokens)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ours(model: nn.Module, tokens: torch.Tensor) -> Any:
    """Estimate with perta_fast."""
    samples = [Sample(tuple(row), tuple(row)) for row in tokens.tolist()]
    return pf.estimate_importance(model, samples, estimator="grad", batch_size=BATCH, progress=False).tensors


JOBS: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "training backward": plain_backward,
    "one sample at a time": sample_by_sample,
    "ours, grad": ours,
}
ROLES = {"training backward": "limit", "one sample at a time": "peer", "ours, grad": "ours"}


def main() -> int:
    """Run the contender named on the command line once; "nothing" makes model and data only."""
    torch.set_num_threads(threads())
    model, tokens = make_model(), make_tokens()
    if sys.argv[1] != "nothing":
        JOBS[sys.argv[1]](model, tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
