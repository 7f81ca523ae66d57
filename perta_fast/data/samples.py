"""Forget and retain data: JSON lines in, token ids and labels out.

A line is {"question", "answer"} (loss on the answer only), {"text"} (loss on all tokens) or {"messages": [...]}
(loss on what the assistant says).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from perta_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that takes no part in the loss, as in torch and transformers
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Record:
    """One checked line: ``content`` has the keys of its form and no others, ``where`` names file and line."""

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
    return read_data(path)[0]


def read_data(path: str | Path) -> tuple[list[Record], str]:
    """``load_records``, and the BLAKE3 hash of the very bytes that they were parsed from.

    The file is read once, so a pipe will do, and a file that changes meanwhile is not recorded wrongly.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: is not JSON; each line must be one object") from error
            records.append(Record(_check_record(row, where), where))
    if not records:
        raise InputError(f"{path}: holds no samples")
    return records, blake3(content).hexdigest()


def records_from(rows: Iterable[Mapping[str, Any]]) -> list[Record]:
    """Check samples given as Python dictionaries in the same three forms."""
    records = [
        Record(_check_record(row, f"sample {number}"), f"sample {number}") for number, row in enumerate(rows)
    ]
    if not records:
        raise InputError("there are no samples")
    return records


def _check_record(content: Any, where: str) -> Mapping[str, Any]:
    """The part of ``content`` that is used, checked."""
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: is not a JSON object")
    if "messages" in content:
        _check_messages(content["messages"], where)
        return {"messages": content["messages"]}
    wanted = ("question", "answer") if "question" in content or "answer" in content else ("text",)
    for key in wanted:
        if key not in content:
            raise InputError(
                f'{where}: needs "question" and "answer", or "text", or "messages"; "{key}" is missing'
            )
        if not isinstance(content[key], str) or not content[key].strip():
            raise InputError(f'{where}: "{key}" must be a text that is not empty')
        _check_unicode(content[key], where)
    return {key: content[key] for key in wanted}


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
        _check_unicode(message["content"], where)
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise InputError(f"{where}: the assistant says nothing, so there is nothing to learn from")
    if messages[0]["role"] == "assistant":
        raise InputError(f"{where}: the assistant speaks first; put what it answers to before it")


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: has half a character, {text[error.start]!a}, which no tokenizer can read"
        ) from error


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
    if "text" in content:
        ids = tokenizer(content["text"])["input_ids"]
        return ids, list(ids)
    if "messages" in content:
        if not tokenizer.chat_template:
            raise InputError(
                f"{record.where}: has messages, but the tokenizer has no chat template; "
                'give {"question", "answer"} or {"text"} lines, or a model with a chat template'
            )
        return _encode_messages(content["messages"], tokenizer, record.where)
    if not tokenizer.chat_template:
        return _encode_plain_question(content["question"], content["answer"], tokenizer)
    messages = [
        {"role": "user", "content": content["question"]},
        {"role": "assistant", "content": content["answer"]},
    ]
    return _encode_messages(messages, tokenizer, record.where)


def _encode_plain_question(
    question: str, answer: str, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    def tokens(text: str) -> list[int]:
        ids = list(tokenizer(text)["input_ids"])
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers close every text

    start = f"Question: {question}\nAnswer:"
    prompt, whole = tokens(start), tokens(f"{start} {answer}")
    reply = whole[len(prompt) :]
    if whole[: len(prompt)] != prompt:  # a token reaches across the boundary: tokenise the parts apart
        reply = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        reply = [*reply, tokenizer.eos_token_id]
    return [*prompt, *reply], [IGNORED] * len(prompt) + reply


def _encode_messages(
    messages: Sequence[Mapping[str, str]], tokenizer: "PreTrainedTokenizerBase", where: str
) -> tuple[list[int], list[int]]:
    def render(count: int, generation: bool) -> list[int]:
        try:
            ids = tokenizer.apply_chat_template(
                list(messages[:count]),
                tokenize=True,
                add_generation_prompt=generation,
                return_dict=False,
            )
        except Exception as error:  # the template is a program of the model's makers, with its own demands
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
                f"{where}: the tokens before an assistant's message change when it or a later message is "
                "added (by the chat template, or a merge with the message's first characters), so its own "
                "cannot be told apart; give each turn its own line"
            )
        labels[len(before) : len(after)] = whole[len(before) : len(after)]
    return whole, labels
