"""Rows to samples: token ids, and labels where there is a loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perta_fast.data.json_lines import Row
from perta_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token without a loss, as in torch and transformers


@dataclass(frozen=True)
class Sample:
    """One tokenised sample: ``labels[i]`` is ``input_ids[i]`` or ``IGNORED``. Nothing is shifted yet."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    truncated: bool = False

    @property
    def label_count(self) -> int:
        """Tokens that the loss is averaged over: the first token is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Sample]:
    """Tokenise rows; cut samples at ``max_length`` tokens and mark those as truncated.

    Raises InputError, naming the line, if no token with a loss remains, or the tokenizer cannot encode messages.
    """
    samples = []
    for row in rows:
        ids, labels = _encode_row(row, tokenizer)
        sample = Sample(tuple(ids[:max_length]), tuple(labels[:max_length]), truncated=len(ids) > max_length)
        if sample.label_count == 0:
            cut = f" within the first {max_length} tokens" if sample.truncated else ""
            raise InputError(f"{row.where}: has no token to compute a loss on{cut}")
        samples.append(sample)
    return samples


def _encode_row(row: Row, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    content = row.content
    if "text" in content:
        ids = tokenizer(content["text"])["input_ids"]
        return ids, list(ids)
    if "messages" in content:
        if not tokenizer.chat_template:
            raise InputError(
                f"{row.where}: has messages, but the tokenizer has no chat template; "
                'give {"question", "answer"} or {"text"} lines, or a model with a chat template'
            )
        return _encode_messages(content["messages"], tokenizer, row.where)
    question, answer = content["question"], content["answer"]
    if not tokenizer.chat_template:
        return _encode_plain_question(question, answer, tokenizer)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _encode_messages(messages, tokenizer, row.where)


def _encode_plain_question(
    question: str, answer: str, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    def tokens(text: str) -> list[int]:
        ids = list(tokenizer(text)["input_ids"])
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers end every text with it

    start = f"Question: {question}\nAnswer:"
    prompt, whole = tokens(start), tokens(f"{start} {answer}")
    reply = whole[len(prompt) :]
    if whole[: len(prompt)] != prompt:  # a token spans both: tokenise them separately
        reply = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        reply = [*reply, tokenizer.eos_token_id]
    return [*prompt, *reply], [IGNORED] * len(prompt) + reply


def _encode_messages(
    messages: Sequence[Mapping[str, str]], tokenizer: "PreTrainedTokenizerBase", where: str
) -> tuple[list[int], list[int]]:
    def render(count: int, generation: bool) -> list[int]:
        try:
            settings = {"tokenize": True, "add_generation_prompt": generation, "return_dict": False}
            ids = tokenizer.apply_chat_template(list(messages[:count]), **settings)
        except Exception as error:  # a template is a program and may fail in any way
            raise InputError(f"{where}: the chat template refuses these messages: {error}") from error
        return list(ids)

    whole = render(len(messages), False)
    labels = [IGNORED] * len(whole)
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(k, True), render(k + 1, False)
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise InputError(
                f"{where}: the tokens before an assistant's message change when it or a later message is added (by the "
                "chat template, or a merge with the message's first characters), so its own cannot be told apart; give "
                "each turn its own line"
            )
        labels[len(before) : len(after)] = whole[len(before) : len(after)]
    return whole, labels


def prompt_of(sample: Sample) -> tuple[int, ...]:
    """The tokens before the first label."""
    return sample.input_ids[: next(k for k, label in enumerate(sample.labels) if label != IGNORED)]
