"""Tokens and labels of questions with a chat template: PERTA_BENCH_ROWS rows of about 200 tokens (20,000).

The limit renders each conversation once and encodes the texts in batches, without labels. The peer is how this project
did it before: three renderings of each row, each tokenised by itself, to find where the answer lies.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest

from bench.harness.contest import Outcome, alternate, replay, replayed
from bench.harness.tables import Row
from bench.inputs.arrays import timed
from bench.inputs.chat_data import chat_tokenizer, questions
from perta_fast.data.samples import IGNORED, encode

ROWS = int(os.environ.get("PERTA_BENCH_ROWS", "20000"))
CONTENDERS = {"one rendering, encoded in batches, no labels": "limit", "three renderings a row": "peer", "ours": "ours"}
_AT_ONCE = 512
tokenizer, rows = cache(chat_tokenizer), cache(lambda: questions(ROWS))


def conversations() -> list[list[dict[str, str]]]:
    """The rows as a template takes them."""
    pairs = (row.content for row in rows())
    return [
        [{"role": "user", "content": pair["question"]}, {"role": "assistant", "content": pair["answer"]}]
        for pair in pairs
    ]


def one_rendering() -> list[list[int]]:
    """Token ids alone."""
    ids, made = [], conversations()
    for begin in range(0, len(made), _AT_ONCE):
        texts = [tokenizer().apply_chat_template(turns, tokenize=False) for turns in made[begin : begin + _AT_ONCE]]
        ids += tokenizer()(texts, add_special_tokens=False)["input_ids"]
    return ids


def three_renderings() -> list[tuple[list[int], list[int]]]:
    """Token ids and labels: the answer is what lies between the prompt and the end of its turn."""
    samples = []
    for turns in conversations():
        whole, before, after = (
            tokenizer().apply_chat_template(some, add_generation_prompt=prompt, return_dict=False)
            for some, prompt in ((turns, False), (turns[:1], True), (turns, False))
        )
        assert whole[: len(before)] == before
        labels = [IGNORED] * len(before) + whole[len(before) : len(after)]
        samples.append((whole, labels + [IGNORED] * (len(whole) - len(labels))))
    return samples


@pytest.fixture(scope="module")
def outcomes(rounds: int) -> dict[str, Outcome]:
    """The outcomes by contender."""
    works = (one_rendering, three_renderings, lambda: encode(rows(), tokenizer(), 1 << 20))
    return alternate({name: timed(work, "cpu") for name, work in zip(CONTENDERS, works, strict=True)}, rounds)


@replayed
@pytest.mark.parametrize("contender", CONTENDERS)
def bench_tokenising(contender: str, outcomes: dict[str, Outcome], board: list[Row], benchmark: Any) -> None:
    """Report one contender."""
    group, role = f"tokenising {ROWS:,} questions of about 200 tokens", CONTENDERS[contender]
    board.append(replay(benchmark, outcomes[contender], group=group, contender=contender, role=role))
