"""Where open-unlearning measures in another way than this project: one record of choices, read where each is made."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from perta_fast.data.rows import Row
from perta_fast.data.samples import IGNORED, Sample
from perta_fast.data.turns import rendered
from perta_fast.errors import InputError

OPEN_UNLEARNING = "open-unlearning"
_QUESTION_TOKENS, _TEXT_TOKENS = 512, 2048  # of a question without a chat template and its answer; of a text


@dataclass(frozen=True)
class Asked:
    """One row as tokens. prompt: what the model answers to. whole: with the answer. begin: where the labels begin."""

    prompt: tuple[int, ...]
    whole: tuple[int, ...]
    begin: int

    @property
    def sample(self) -> Sample:
        return Sample(self.whole, (IGNORED,) * self.begin + self.whole[self.begin :])

    def truth(self, tokenizer: Any) -> str:
        """The text of the whole without that of the prompt: what the answer is compared with."""
        whole, prompt = tokenizer.batch_decode([self.whole, self.prompt], skip_special_tokens=True)
        return cleaned(whole).replace(cleaned(prompt), "").strip()


@dataclass(frozen=True)
class Conventions:
    """The choices.

    name: by which they are asked for; None is this project's own.
    asked: the tokens of a row; None is what ``data.samples`` makes of it.
    hides_padding: every token that equals the padding is masked, in questions and answers too.
    as_configured: greedy answers obey the model's own generation settings, in batches in the order of the data.
    end_alone: extraction strength, Min-K and Min-K++ of an answer that is only its end; NaN leaves it out.
    """

    name: str | None = None
    asked: Callable[[Row, Any], Asked] | None = None
    hides_padding: bool = False
    as_configured: bool = False
    end_alone: float = math.nan

    @classmethod
    def named(cls, name: str | None) -> "Conventions":
        """Raises InputError if there are none of this name."""
        if name not in _BY_NAME:
            raise InputError(f"‹compatible› is {name!r}; it must be {OPEN_UNLEARNING}")
        return _BY_NAME[name]

    def read(self, answer: str) -> str:
        """The text of a model's answer that is compared."""
        return answer if self.asked is None else cleaned(answer).strip()

    def hidden(self, tokenizer: Any) -> int | None:
        """The token that is masked wherever it stands, if any."""
        if not self.hides_padding:
            return None
        padding: int | None = tokenizer.pad_token_id
        return tokenizer.eos_token_id if padding is None else padding


def cleaned(text: str) -> str:
    """Text as transformers 4 decodes it with its clean-up, as far as ROUGE sees it; transformers 5 leaves it alone."""
    return text.replace(" n't", "n't")


def ask(row: Row, tokenizer: Any) -> Asked:
    """The tokens of a row as open-unlearning makes them: labels are counted off, not looked for.

    An answer ends in the end token, after whatever a chat template writes there. Without a chat template, the prompt
    ends in a space, which the tokens of the whole join to the answer: its first token then has no label. A text has no
    end token. Raises InputError for a conversation, or a tokenizer without an end token.
    """
    if row.is_tokenised:
        raise InputError(f"{row.where}: is tokenised already, and {OPEN_UNLEARNING} tokenises in its own way")
    if "text" in row.content:
        whole = list(tokenizer(row.content["text"])["input_ids"])
        prompt = tokenizer("")["input_ids"]
        return Asked(tuple(prompt), tuple(whole[: len(prompt) + _TEXT_TOKENS]), max(1, len(prompt)))
    if "question" not in row.content:
        raise InputError(f"{row.where}: has messages, which {OPEN_UNLEARNING} does not score; give question and answer")
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer has no end token, which {OPEN_UNLEARNING} puts after every answer")
    question, answer = row.content["question"], row.content["answer"]
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt, whole = (
            list(rendered(tokenizer, some, row.where, add_generation_prompt=asks, return_dict=False))
            for some, asks in ((messages[:1], True), (messages, False))
        )
    else:
        start = f"Question: {question}\nAnswer: "
        prompt, whole = (
            list(tokenizer(text, truncation=True, max_length=_QUESTION_TOKENS)["input_ids"])
            for text in (start, start + answer)
        )
    if whole[-1:] != [tokenizer.eos_token_id]:
        whole = [*whole, tokenizer.eos_token_id]
    return Asked(tuple(prompt), tuple(whole), len(prompt))


OURS = Conventions()
_BY_NAME = {
    None: OURS,
    OPEN_UNLEARNING: Conventions(OPEN_UNLEARNING, ask, hides_padding=True, as_configured=True, end_alone=0.0),
}
