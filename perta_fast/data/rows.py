"""Forget and retain data, read and checked: files of every format, and rows of Python."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from perta_fast.data.formats import read_entries
from perta_fast.data.forms import Fields, Row, check_fields, check_text, rows_of_entries
from perta_fast.data.given import IN_WORDS, GivenRows
from perta_fast.errors import InputError

__all__ = ["Row", "check_text", "load_rows", "read_data", "rows_from"]


def load_rows(path: str | Path, fields: Fields | None = None) -> list[Row]:
    """Read and check a data file. Raises InputError, naming file and line."""
    return read_data(path, fields)[0]


def read_data(source: str | Path | GivenRows, fields: Fields | None = None) -> tuple[list[Row], str]:
    """The checked rows and their BLAKE3 hash. A file is read once: it can be a pipe."""
    check_fields(fields)
    if not isinstance(source, GivenRows):
        entries, digest = read_entries(source)
        return rows_of_entries(entries, fields, source), digest
    if isinstance(source.entries[0][1], Row):  # of tokens
        if fields is not None:
            raise InputError("‹fields› is for rows of text, and this data is tokenised already; leave it out")
        return [row for _, row in source.entries], source.digest
    return rows_of_entries(source.entries, fields, IN_WORDS), source.digest


def evenly_spread(count: int, most: int) -> list[int]:
    """The numbers of at most ``most`` of ``count`` rows; the first row is among them."""
    chosen = min(count, most)
    return [k * count // chosen for k in range(chosen)]


def rows_from(rows: Iterable[Any], fields: Fields | None = None) -> list[Row]:
    """Check rows that are dictionaries in the same forms."""
    entries = [(f"sample {number}", row) for number, row in enumerate(rows)]
    if not entries:
        raise InputError("there are no samples")
    return rows_of_entries(entries, fields, "the data")
