"""Files of a benchmark: JSON lines or one JSON list, with the fields that its metrics need."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from perta_fast.data.json_lines import Row
from perta_fast.errors import InputError
from perta_fast.files.reading import read_text


@dataclass(frozen=True)
class Rows:
    """The checked objects of one file, each with where it stands, and the hash of what was read."""

    path: Path
    digest: str
    content: tuple[Mapping[str, Any], ...]
    places: tuple[str, ...]

    def texts(self, field: str) -> list[str]:
        """One text of every object."""
        return [row[field] for row in self.content]

    def records(self, question: str, answer: str) -> list[Row]:
        """Questions and answers to tokenise, from the fields of these names; one for each answer of a list."""
        return [
            Row({"question": row[question], "answer": text}, where)
            for row, where in zip(self.content, self.places, strict=True)
            for text in (row[answer] if isinstance(row[answer], list) else [row[answer]])
        ]


def read_rows(folder: Path, stem: str, texts: Iterable[str], lists: Iterable[str] = ()) -> Rows:
    """Read ``stem``.jsonl or ``stem``.json below ``folder``.

    texts: fields that must be texts which are not empty; lists: fields that must be lists of at least one such
    text. Raises InputError, naming file and line, if the file is missing or an object is not of this form.
    """
    paths = [folder / f"{stem}{ending}" for ending in (".jsonl", ".json")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise InputError(f"{folder}: has no file {stem}.jsonl or {stem}.json")
    text, data = read_text(path)
    objects = _parse(text, path)
    if not objects:
        raise InputError(f"{path}: holds no samples")
    for where, row in objects.items():
        _check(row, where, texts, lists)
    return Rows(path, blake3(data).hexdigest(), tuple(objects.values()), tuple(objects))


def _parse(text: str, path: Path) -> dict[str, Any]:
    """The objects by where they stand."""
    where = str(path)
    try:
        if text.lstrip().startswith("["):
            return {f"{path}, object {number}": row for number, row in enumerate(json.loads(text), start=1)}
        objects = {}
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                objects[where] = json.loads(line)
        return objects
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON") from error


def _check(row: Any, where: str, texts: Iterable[str], lists: Iterable[str]) -> None:
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: is not a JSON object")
    for field in texts:
        if not _is_text(row.get(field)):
            raise InputError(f'{where}: "{field}" must be a text that is not empty')
    for field in lists:
        values = row.get(field)
        if not isinstance(values, list) or not values or not all(map(_is_text, values)):
            raise InputError(f'{where}: "{field}" must be a list of texts that are not empty')


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half a character
        return False
    return True
