"""Sentences that unlearning should leave alone: theta_0's own, with the words of the forget rows, and general text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from bench.study.real.compute import fast_products
from bench.study.real.data import Pair, spread
from bench.study.real.models import Models, load_model, load_tokenizer
from bench.study.store import read_json, write_json
from perta_fast.data.rows import rows_from
from perta_fast.data.samples import Sample, encode

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
        module, tokenizer = load_model(models.base()), load_tokenizer(models.base())
        pairs = []
        for word in words:
            question = _QUESTION.format(word=word)
            answer = _answer(module, tokenizer, models.samples([{"question": question, "answer": word}])[0])
            if word.lower() in answer.lower():
                pairs.append({"question": question, "answer": answer})
        write_json(folder / _FILE, pairs)

    made_of = {"model": models.store.relative(models.base()), "words": words}
    piece = models.store.piece(f"{models.folder}/sentences", made_of, make)
    pairs: list[Pair] = read_json(piece / _FILE)
    return pairs


def forget_words(models: Models) -> list[str]:
    """Words of the forget rows that no retain row has, in order of appearance."""
    known = {word.lower() for row in models.rows.retain for text in row.values() for word in _WORD.findall(text)}
    words = (word for row in models.rows.forget for text in row.values() for word in _WORD.findall(text))
    return list(dict.fromkeys(word for word in words if word.lower() not in known))


@torch.no_grad()
def _answer(module: Any, tokenizer: Any, sample: Sample) -> str:
    """The greedy answer to the prompt of ``sample``."""
    length = next(k for k, label in enumerate(sample.labels) if label >= 0)
    prompt = torch.tensor([sample.input_ids[:length]])
    with fast_products(module):
        ids = module.generate(prompt, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    return " ".join(str(text).split())
