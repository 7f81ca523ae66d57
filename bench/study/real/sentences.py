"""Sentences that unlearning should leave alone: theta_0's own, with the words of the forget rows, and general text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.study.real.compute import BATCH_SIZE, fast_products
from bench.study.real.data import Pair, spread
from bench.study.real.models import Models, load_model, load_tokenizer
from bench.study.store import read_json, write_json
from perta_fast.data.rows import rows_from
from perta_fast.data.samples import Sample, encode, prompt_of
from perta_fast.models.greedy_answers import greedy_answers

TEXTS = Path(__file__).with_name("general_texts.txt")
_WORD = re.compile(r"[A-Za-z]{4,}")
_QUESTION = "Write a sentence with the word {word}."
_NEW_TOKENS = 40
_FILE = "sentences.json"


def general_texts(models: Models) -> list[Sample]:
    """Paragraphs of plain English, a blank line between two; the loss is on every token."""
    texts = [" ".join(text.split()) for text in TEXTS.read_text(encoding="utf-8").split("\n\n")]
    rows = rows_from([{"text": text} for text in texts])
    return encode(rows, load_tokenizer(models.base()), models.settings.context)


def other_sentences(models: Models) -> list[Pair]:
    """What theta_0 answers if asked for a sentence with a word that the forget rows have and the retain rows lack.

    Where theta_0 does not use the word, the sentence is left out.
    """
    words = spread(forget_words(models), models.settings.scored)

    def make(folder: Path) -> None:
        questions = [_QUESTION.format(word=word) for word in words]
        prompts = models.samples([{"question": question, "answer": "."} for question in questions])
        answers = _answers(load_model(models.base()), load_tokenizer(models.base()), prompts)
        pairs = [
            {"question": question, "answer": answer}
            for word, question, answer in zip(words, questions, answers, strict=True)
            if word.lower() in answer.lower()
        ]
        write_json(folder / _FILE, pairs)

    made_of = {"model": models.store.relative(models.base(make=False)), "words": words, "new_tokens": _NEW_TOKENS}
    piece = models.store.piece(f"{models.folder}/sentences", made_of, make)
    pairs: list[Pair] = read_json(piece / _FILE)
    return pairs


def forget_words(models: Models) -> list[str]:
    """Words of the forget rows that no retain row has, in order of appearance."""
    known = {word.lower() for row in models.rows.retain for text in row.values() for word in _WORD.findall(text)}
    words = (word for row in models.rows.forget for text in row.values() for word in _WORD.findall(text))
    return list(dict.fromkeys(word for word in words if word.lower() not in known))


def _answers(module: Any, tokenizer: Any, samples: Sequence[Sample]) -> list[str]:
    """The greedy answers to the prompts of ``samples``."""
    prompts = list(map(prompt_of, samples))
    with fast_products(module):
        answers = greedy_answers(module, tokenizer, prompts, batch_size=BATCH_SIZE, max_new_tokens=_NEW_TOKENS)
    return [" ".join(answer.split()) for answer in answers]
