"""Data files of an evaluation: a user's own JSON lines, or a benchmark's, as JSON lines or one JSON list."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from perta_fast.data.json_lines import Row, check_text, parse_lines, read_data
from perta_fast.errors import InputError
from perta_fast.files.reading import read_text


@dataclass(frozen=True)
class DataFile:
    """One file: its path, the hash of what was read, and its checked rows."""

    path: Path
    digest: str
    rows: list[Row]

    @classmethod
    def read(cls, path: str | Path) -> "DataFile":
        """A user's own data, in the forms that ``perta unlearn`` takes."""
        rows, digest = read_data(path)
        return cls(Path(path), digest, rows)

    def texts(self, field: str) -> list[str]:
        """The text of every row in ``field``."""
        return [row.content[field] for row in self.rows]

    def questions(self, question: str, answer: str) -> list[Row]:
        """Rows to tokenise, from the fields of these names; one for each answer where a field has a list."""
        return [
            Row({"question": row.content[question], "answer": text}, row.where)
            for row in self.rows
            for text in (row.content[answer] if isinstance(row.content[answer], list) else [row.content[answer]])
        ]


def benchmark_file(folder: Path, stem: str) -> Path | None:
    """``stem``.jsonl or ``stem``.json below ``folder``, if there is one."""
    paths = [folder / f"{stem}{ending}" for ending in (".jsonl", ".json")]
    return next((path for path in paths if path.is_file()), None)


def read_benchmark_file(folder: Path, stem: str, texts: Iterable[str], lists: Iterable[str] = ()) -> DataFile:
    """Read ``stem``.jsonl or ``stem``.json below ``folder``.

    texts: fields that must be texts and not empty; if it is "text" alone, a row may be that text itself. lists: fields
    that must be lists of such texts and not empty.
    Raises InputError, naming file and line, if the file is missing or a row is not of this form.
    """
    path = benchmark_file(folder, stem)
    if path is None:
        raise InputError(f"{folder}: has no file {stem}.jsonl or {stem}.json")
    text, data = read_text(path)
    texts_alone = tuple(texts) == ("text",)
    rows = [
        Row({"text": content} if texts_alone and isinstance(content, str) else content, where)
        for where, content in _parse(text, path)
    ]
    if not rows:
        raise InputError(f"{path}: holds no samples")
    for row in rows:
        _check(row, texts, lists)
    return DataFile(path, blake3(data).hexdigest(), rows)


def _parse(text: str, path: Path) -> Iterable[tuple[str, Any]]:
    if not text.lstrip().startswith("["):
        return parse_lines(text, path)
    try:
        return [(f"{path}, object {number}", row) for number, row in enumerate(json.loads(text), start=1)]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON") from error


def _check(row: Row, texts: Iterable[str], lists: Iterable[str]) -> None:
    if not isinstance(row.content, Mapping):
        raise InputError(f"{row.where}: is not a JSON object")
    for field in texts:
        check_text(row.content.get(field), field, row.where)
    for field in lists:
        values = row.content.get(field)
        if not isinstance(values, list) or not values:
            raise InputError(f'{row.where}: "{field}" must be a list of texts that is not empty')
        for number, value in enumerate(values):
            check_text(value, f"{field}[{number}]", row.where)
