"""The rows of Python objects: lists, data sets, loaders, DataFrames, dictionaries of columns."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from perta_fast.data.formats import without_nulls
from perta_fast.data.tokenised import is_tokenised
from perta_fast.errors import InputError


class MapStyle(Protocol):
    """A data set of rows numbered from 0, as torch's ``Dataset``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def rows_of(data: Any) -> Iterator[Any]:
    """The rows of an iterable, of a data set, or of a single batch. Raises InputError for anything else."""
    if is_tokenised(data):
        return iter([data])
    if isinstance(data, Mapping):
        return _rows_of_columns(data)
    for method in ("to_pylist", "to_dicts"):  # a table of Arrow; a DataFrame of polars
        if hasattr(data, method):
            return map(without_nulls, getattr(data, method)())
    if hasattr(data, "columns") and hasattr(data, "itertuples"):  # a DataFrame of pandas
        names = list(data.columns)
        return (_row_of_cells(names, cells) for cells in data.itertuples(index=False, name=None))
    if hasattr(data, "features") and hasattr(data, "column_names"):  # of the library datasets
        return map(without_nulls, iter(data))
    if hasattr(data, "__iter__"):
        return iter(data)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):  # it may not raise IndexError at its end
        return (data[number] for number in range(len(data)))
    raise InputError(
        f"‹data› is {type(data).__name__}; it must be a file, or have __iter__, or __len__ and __getitem__"
    )


def _rows_of_columns(data: Mapping[Any, Any]) -> Iterator[Any]:
    """The rows of a dictionary of columns, or of splits if there is one alone."""
    values = list(data.values())
    if values and all(hasattr(value, "column_names") for value in values):
        if len(values) > 1:
            example = f"data[{next(iter(data))!r}]"
            raise InputError(f"‹data› has the splits {', '.join(map(str, data))}; give one of them, as in {example}")
        return rows_of(values[0])
    columns = [list(value) for value in values if hasattr(value, "__iter__") and not isinstance(value, str | Mapping)]
    if not columns or len(columns) < len(values) or any(column and _is_message(column[0]) for column in columns):
        raise InputError("sample 0: is not a JSON object; data is a dictionary, but no columns: put one row in a list")
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in zip(data, columns, strict=True))
        raise InputError(f"‹data› has columns of different lengths: {lengths}")
    return (dict(zip(data, cells, strict=True)) for cells in zip(*columns, strict=True))


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _row_of_cells(names: Sequence[Any], cells: Sequence[Any]) -> dict[Any, Any]:
    """A row of a DataFrame of pandas, where a cell without a value is not a number, and a list is an array."""
    given = ((name, _plain(cell)) for name, cell in zip(names, cells, strict=True))
    return {name: without_nulls(cell) for name, cell in given if not _is_missing(cell)}


def _is_missing(cell: Any) -> bool:
    return cell is None or type(cell).__name__ in ("NAType", "NaTType") or (isinstance(cell, float) and cell != cell)


def _plain(value: Any) -> Any:
    """Arrays of NumPy, at any depth, as lists; its numbers as Python's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value
