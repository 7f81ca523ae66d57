"""Forget and retain data: JSON lines in, token ids and labels out.

A line is {"question", "answer"} (loss on the answer only), {"text"} (loss on all tokens) or {"messages": [...]}
(loss on what the assistant says).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that takes no part in the loss, as in torch and transformers
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Record:
    """One checked line: ``content`` is its JSON object, ``where`` names file and line for messages."""

    content: Mapping[str, Any]
    where: str


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


def load_records(path: str | Path) -> list[Record]:
    """Read and check a JSON lines file; blank lines are skipped.

    Raises InputError naming file and line for a line that is not one of the three forms, and for a file that
    is missing, unreadable or empty.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: is not JSON") from error
            records.append(Record(_check_record(content, where), where))
    if not records:
        raise InputError(f"{path}: holds no samples")
    return records


def records_from(rows: Iterable[Mapping[str, Any]]) -> list[Record]:
    """Check samples given as Python dictionaries in the same three forms."""
    records = [
        Record(_check_record(row, f"sample {number}"), f"sample {number}") for number, row in enumerate(rows)
    ]
    if not records:
        raise InputError("there are no samples")
    return records


def _check_record(content: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: is not a JSON object")
    if "messages" in content:
        _check_messages(content["messages"], where)
        return content
    wanted = ("question", "answer") if "question" in content or "answer" in content else ("text",)
    for key in wanted:
        if key not in content:
            raise InputError(
                f'{where}: needs "question" and "answer", or "text", or "messages"; "{key}" is missing'
            )
        if not isinstance(content[key], str) or not content[key].strip():
            raise InputError(f'{where}: "{key}" must be a text that is not empty')
    return content


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{where}: "messages" must be a list that is not empty')
    for message in messages:
        if (
            not isinstance(message, Mapping)
            or message.get("role") not in _ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise InputError(
                f'{where}: each message needs a "role" ({", ".join(_ROLES)}) and a "content" that is text'
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{where}: no message is from the assistant, so there is nothing to learn from")


def encode(records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Sample]:
    """Tokenise; samples longer than ``max_length`` tokens are cut at the end and marked as truncated.

    Raises InputError naming the line if nothing is left to compute a loss on, or if {"messages"} meet a
    tokenizer without a chat template.
    """
    samples = []
    for record in records:
        ids, labels = _encode_record(record, tokenizer)
        sample = Sample(tuple(ids[:max_length]), tuple(labels[:max_length]), truncated=len(ids) > max_length)
        if sample.label_count == 0:
            cut = f" within the first {max_length} tokens" if sample.truncated else ""
            raise InputError(f"{record.where}: has no token to compute a loss on{cut}")
        samples.append(sample)
    return samples


def _encode_record(record: Record, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    content = record.content
    if "text" in content and "messages" not in content and "question" not in content:
        ids = tokenizer(content["text"])["input_ids"]
        return ids, list(ids)
    if "question" in content and not tokenizer.chat_template:
        return _encode_plain_question(content["question"], content["answer"], tokenizer)
    messages = content.get("messages") or [
        {"role": "user", "content": content["question"]},
        {"role": "assistant", "content": content["answer"]},
    ]
    if not tokenizer.chat_template:
        raise InputError(
            f"{record.where}: has messages, but the tokenizer has no chat template; "
            'give {"question", "answer"} or {"text"} lines, or a model with a chat template'
        )
    return _encode_messages(messages, tokenizer, record.where)


def _encode_plain_question(
    question: str, answer: str, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    # The two parts are tokenised apart, so that where the answer begins is certain.
    prompt = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
    eos = tokenizer.eos_token_id
    if eos is not None and prompt[-1:] == [eos]:  # some tokenizers close every text
        prompt = prompt[:-1]
    reply = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    if eos is not None:
        reply = [*reply, eos]
    return [*prompt, *reply], [IGNORED] * len(prompt) + reply


def _encode_messages(
    messages: Sequence[Mapping[str, str]], tokenizer: "PreTrainedTokenizerBase", where: str
) -> tuple[list[int], list[int]]:
    def render(count: int, generation: bool) -> list[int]:
        ids = tokenizer.apply_chat_template(
            list(messages[:count]),
            tokenize=True,
            add_generation_prompt=generation,
            return_dict=False,
        )
        return list(ids)

    whole = render(len(messages), False)
    labels = [IGNORED] * len(whole)
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(k, True), render(k + 1, False)
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise InputError(
                f"{where}: the chat template changes earlier messages when later ones are added, so the "
                "assistant's tokens cannot be told apart; split the conversation into one line a turn"
            )
        labels[len(before) : len(after)] = whole[len(before) : len(after)]
    return whole, labels
