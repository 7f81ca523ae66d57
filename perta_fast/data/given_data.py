"""The data that a Python function is given: a file, or rows of any kind that can be kept in memory."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from perta_fast.data.forms import Row
from perta_fast.data.given import GivenRows, is_given, no_longer_there
from perta_fast.data.python_rows import MapStyle, rows_of
from perta_fast.data.samples import Sample, by_row
from perta_fast.data.tokenised import is_tokenised, samples_from
from perta_fast.errors import InputError
from perta_fast.files.hub import local_data

Data = str | Path | Iterable[Mapping[str, Any]] | Iterable[Sample] | MapStyle
Source = Path | GivenRows


def source_of(data: Data | GivenRows, download: bool, role: str) -> Source:
    """The file, by its path here; or the rows, read from ``data`` once. role: of the data, for messages.

    Raises InputError for what is no data, or has no row.
    """
    source = _rows_or_path(data, role)
    return source if isinstance(source, GivenRows) else local_data(source, download)


def _rows_or_path(data: Data | GivenRows, role: str) -> GivenRows | str:
    if isinstance(data, GivenRows):
        return data
    if isinstance(data, str | os.PathLike):
        if is_given(Path(data).name):
            raise no_longer_there(Path(data).name)
        return os.fspath(data)
    try:
        rows = list(rows_of(data))
        if not rows:
            raise InputError("there are no samples")
        if is_tokenised(rows[0]):
            rows = samples_from(rows)
    except InputError as error:
        raise InputError(f"{role} data: {error}") from error
    if all(isinstance(row, Sample) for row in rows):
        return _of_samples(rows, role)
    return GivenRows.of([(f"{role} data, row {number}", row) for number, row in enumerate(rows)])


def _of_samples(samples: list[Sample], role: str) -> GivenRows:
    """Rows of tokens; the parts of one row stay together."""
    grouped = [tuple(samples[k] for k in numbers) for numbers in by_row(samples)]
    if sum(map(len, grouped)) < len(samples):
        raise InputError(f"{role} data: the shares of the last samples do not add up to a row")
    named = [(f"{role} data, row {number}", parts) for number, parts in enumerate(grouped)]
    plain = [
        (where, {"input_ids": sample.input_ids, "labels": sample.labels}) for where, parts in named for sample in parts
    ]
    rows = [(where, Row({"samples": parts}, where)) for where, parts in named]
    return GivenRows(rows, GivenRows.of(plain).digest)


def taken_out(arguments: Mapping[str, Any], names: Iterable[str]) -> tuple[dict[str, Any], dict[str, GivenRows]]:
    """``arguments``, with names in place of rows that were given; and these rows by their names."""
    sources = {name: _rows_or_path(arguments[name], name) for name in names if arguments[name] is not None}
    rows = {str(source): source for source in sources.values() if isinstance(source, GivenRows)}
    return {**arguments, **{name: str(source) for name, source in sources.items()}}, rows
