"""Forget and retain data: JSON lines, read and checked.

A line is {"question", "answer"} (loss on the answer only), {"text"} (loss on all tokens) or {"messages": [...]}
(loss on what the assistant says).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from perta_fast.errors import InputError
from perta_fast.files.reading import read_text

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """One checked line: ``content`` has the keys of its form and no others, ``where`` names file and line."""

    content: Mapping[str, Any]
    where: str


def load_rows(path: str | Path) -> list[Row]:
    """Read and check a JSON lines file; blank lines are skipped. Raises InputError, naming file and line."""
    return read_data(path)[0]


def read_data(path: str | Path) -> tuple[list[Row], str]:
    """``load_rows``, and the BLAKE3 hash of the file, which is read once: it can be a pipe."""
    text, data = read_text(Path(path))
    rows = [Row(_check_row(content, where), where) for where, content in parse_lines(text, path)]
    if not rows:
        raise InputError(f"{path}: holds no samples")
    return rows, blake3(data).hexdigest()


def parse_lines(text: str, path: str | Path) -> Iterator[tuple[str, Any]]:
    """The file and number of each line that is not blank, and its JSON. Raises InputError for a line without JSON."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: is not JSON; each line must be one object") from error


def rows_from(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Check rows that are dictionaries in the same three forms."""
    checked = [Row(_check_row(row, f"sample {number}"), f"sample {number}") for number, row in enumerate(rows)]
    if not checked:
        raise InputError("there are no samples")
    return checked


def _check_row(content: Any, where: str) -> Mapping[str, Any]:
    """The fields of ``content`` that its form has, checked."""
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: is not a JSON object")
    if "messages" in content:
        _check_messages(content["messages"], where)
        return {"messages": content["messages"]}
    form = ("question", "answer") if "question" in content or "answer" in content else ("text",)
    for key in form:
        if key not in content:
            raise InputError(f'{where}: needs "question" and "answer", or "text", or "messages"; "{key}" is missing')
        check_text(content[key], key, where)
    return {key: content[key] for key in form}


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{where}: "messages" must be a list that is not empty')
    for message in messages:
        if (
            not isinstance(message, Mapping)
            or message.get("role") not in _ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise InputError(f'{where}: each message needs a "role" ({", ".join(_ROLES)}) and a "content" that is text')
        _check_unicode(message["content"], where)
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise InputError(f"{where}: the assistant says nothing, so there is nothing to learn from")
    if messages[0]["role"] == "assistant":
        raise InputError(f"{where}: the assistant speaks first; put what it answers to before it")


def check_text(value: Any, key: str, where: str) -> None:
    """Raise InputError unless ``value``, found under ``key``, is a text that a tokenizer can read and not blank."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f'{where}: "{key}" must be a text that is not empty')
    _check_unicode(value, where)


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: has half a character, {text[error.start]!a}, which no tokenizer can read"
        ) from error
