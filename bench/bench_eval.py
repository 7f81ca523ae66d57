"""The scoring pass of an evaluation: 400 TOFU questions, each with its right answer and five wrong ones.

The limit is a plain forward pass over the same batches by length, whose logits are thrown away. The peer takes the
samples in the order of the data and computes the loss of every token, as usual scripts do. Samples are random
tokens, about as long as TOFU's.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from bench.harness.contest import Outcome, alternate, replay, replayed
from bench.harness.tables import Row
from bench.inputs.arrays import timed
from bench.inputs.random_llama import LARGE, TINY, random_llama
from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.data.samples import IGNORED, Sample
from perta_fast.models.token_scores import score_tokens

QUESTIONS, WRONG = 400, 5
BATCH_SIZE = 16
CONTENDERS = {
    "plain forward": "limit",
    "samples as they come, with loss": "peer",
    "ours": "ours",
    "ours, detailed for the right answers": "ours",
}


def make_samples() -> tuple[list[Sample], list[Sample]]:
    """Samples with right and with wrong answers: questions of 10 to 35 tokens, answers of 20 to 80, as in TOFU."""
    numbers = random.Random(0)

    def sample(prompt: list[int]) -> Sample:
        answer = [numbers.randrange(4096) for _ in range(numbers.randint(20, 80))]
        return Sample(tuple(prompt + answer), tuple([IGNORED] * len(prompt) + answer))

    right, wrong = [], []
    for _ in range(QUESTIONS):
        prompt = [numbers.randrange(4096) for _ in range(numbers.randint(10, 35))]
        right.append(sample(prompt))
        wrong += [sample(prompt) for _ in range(WRONG)]
    return right, wrong


@torch.inference_mode()
def plain_forward(model: nn.Module, samples: list[Sample], device: str) -> None:
    """Compute the logits of every token, in batches by length."""
    for numbers in batches_by_length(samples, BATCH_SIZE):
        batch = Batch.of([samples[k] for k in numbers], device)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


@torch.inference_mode()
def as_they_come(model: nn.Module, samples: list[Sample], device: str) -> None:
    """Compute every token's loss, in batches in the order of the data, as usual evaluation scripts do."""
    for begin in range(0, len(samples), BATCH_SIZE):
        batch = Batch.of(samples[begin : begin + BATCH_SIZE], device)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), batch.labels[:, 1:], reduction="none")


@pytest.fixture(scope="module")
def outcomes(device: str, rounds: int) -> tuple[dict[str, Outcome], int]:
    """The outcomes by contender, and the number of tokens in the samples."""
    large = device == "cuda"
    model = random_llama(LARGE if large else TINY, 256, device, tied=not large).eval()
    right, wrong = make_samples()

    def detailed() -> None:
        score_tokens(model, right, batch_size=BATCH_SIZE, detailed=True)
        score_tokens(model, wrong, batch_size=BATCH_SIZE)

    works = {
        "plain forward": lambda: plain_forward(model, right + wrong, device),
        "samples as they come, with loss": lambda: as_they_come(model, right + wrong, device),
        "ours": lambda: score_tokens(model, right + wrong, batch_size=BATCH_SIZE),
        "ours, detailed for the right answers": detailed,
    }
    tokens = sum(len(sample.input_ids) for sample in right + wrong)
    return alternate({name: timed(work, device) for name, work in works.items()}, rounds), tokens


@replayed
@pytest.mark.parametrize("contender", CONTENDERS)
def bench_scoring(
    contender: str, outcomes: tuple[dict[str, Outcome], int], device: str, board: list[Row], benchmark: Any
) -> None:
    """Report one contender on all samples."""
    by_contender, tokens = outcomes
    group = f"evaluation, {device}: {QUESTIONS} questions with {WRONG} wrong answers, {tokens:,} tokens"
    outcome, role = by_contender[contender], CONTENDERS[contender]
    board.append(replay(benchmark, outcome, group=group, contender=contender, role=role))
