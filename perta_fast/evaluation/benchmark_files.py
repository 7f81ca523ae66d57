"""Data files of an evaluation: a user's own, or a benchmark's."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from perta_fast.data.formats import ENDINGS, read_entries
from perta_fast.data.forms import Fields, read_as
from perta_fast.data.given import NOTHING_GIVEN, Given
from perta_fast.data.rows import Row, check_text, read_data
from perta_fast.errors import InputError


@dataclass(frozen=True)
class DataFile:
    """One file, or rows given in Python: the path, or the name; the hash of what was read; the checked rows."""

    path: Path
    digest: str
    rows: list[Row]

    @classmethod
    def read(cls, path: str | Path, fields: Fields | None = None, given: Given = NOTHING_GIVEN) -> "DataFile":
        """A user's own data, in the forms that ``perta unlearn`` takes; ``path`` may be a name in ``given``."""
        rows, digest = read_data(given.get(str(path), path), fields)
        return cls(Path(path), digest, rows)

    @property
    def read_as(self) -> str:
        """What was taken for what in the rows."""
        return read_as(self.rows)

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
    """``stem``.jsonl, ``stem``.json or another format of data below ``folder``, if there is one.

    The hub puts the number of a file between name and ending.
    """
    paths = [folder / f"{stem}{number}{ending}" for number in ("", "-00000-of-00001") for ending in ENDINGS]
    return next((path for path in paths if path.is_file()), None)


def read_benchmark_file(folder: Path, stem: str, texts: Iterable[str], lists: Iterable[str] = ()) -> DataFile:
    """Read ``stem``.jsonl, ``stem``.json or another format of data below ``folder``.

    texts: fields that must be texts and not empty; if it is "text" alone, a row may be that text itself. lists: fields
    that must be lists of such texts and not empty.
    Raises InputError, naming file and line, if the file is missing or a row is not of this form.
    """
    path = benchmark_file(folder, stem)
    if path is None:
        raise InputError(f"{folder}: has no file {stem}.jsonl or {stem}.json")
    entries, digest = read_entries(path)
    texts_alone = tuple(texts) == ("text",)
    rows = [
        Row({"text": content} if texts_alone and isinstance(content, str) else content, where)
        for where, content in entries
    ]
    for row in rows:
        _check(row, texts, lists)
    return DataFile(path, digest, rows)


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
