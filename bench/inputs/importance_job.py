"""One importance estimate, by perta_fast or by plain backward passes: ``python -m bench.inputs.importance_job NAME``.

As a program it runs one contender once, so that the process that started it can read its peak memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import perta_fast as pf
from bench.harness.conditions import threads
from bench.inputs.random_llama import SMALL, random_llama
from perta_fast.data.samples import Sample

SAMPLES, TOKENS, BATCH = 32, 128, 8


def make_model() -> nn.Module:
    """The model that all contenders use: 22 M parameters in float32."""
    return random_llama(SMALL, TOKENS).train()


def make_tokens() -> torch.Tensor:
    """The data that all contenders use, (32, 128) int64."""
    return torch.randint(SMALL.vocabulary, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))


def plain_backward(model: nn.Module, tokens: torch.Tensor, batch_size: int) -> dict[str, torch.Tensor]:
    """Accumulate the mean gradient in ``.grad``, as a training step does before the optimizer."""
    model.zero_grad(set_to_none=True)
    for batch in tokens.split(batch_size):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        (loss * len(batch) / len(tokens)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ours(model: nn.Module, tokens: torch.Tensor) -> Any:
    """Estimate with perta_fast."""
    return pf.estimate_importance(model, samples_of(tokens), "grad", batch_size=BATCH, progress=False).tensors


def samples_of(tokens: torch.Tensor) -> list[Sample]:
    """The rows of ``tokens`` as samples whose tokens all have labels."""
    return [Sample(tuple(row), tuple(row)) for row in tokens.tolist()]


JOBS: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "training backward": partial(plain_backward, batch_size=BATCH),
    "one sample at a time": partial(plain_backward, batch_size=1),  # as published importance scripts do
    "ours, grad": ours,
}
ROLES = {"training backward": "limit", "one sample at a time": "peer", "ours, grad": "ours"}


def main() -> int:
    """Run the contender that is named on the command line once; "nothing" only makes model and data."""
    torch.set_num_threads(threads())
    model, tokens = make_model(), make_tokens()
    if sys.argv[1] != "nothing":
        JOBS[sys.argv[1]](model, tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
