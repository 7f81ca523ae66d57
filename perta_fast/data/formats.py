"""Data files of every format, read into entries: JSON lines, JSON, CSV, parquet, Arrow, any of them compressed by gzip.

A format is known by what the file holds; CSV, which may begin with anything, by its name.
"""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from perta_fast.data.given import GivenRows, is_given, no_longer_there
from perta_fast.errors import InputError
from perta_fast.files.hashing import hash_file
from perta_fast.files.hub import fetch_data_again
from perta_fast.files.reading import check_fetched, checked_path, decode, exists, read_json

Entries = Iterable[tuple[str, Any]]  # where each comes from, by file and line, and what it holds

ENDINGS = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz")
_ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json")  # of a data set, not its rows
_SHARD = re.compile(r"-(\d+)-of-(\d+)(-[0-9a-f]+)?$")
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_LONGEST_LIST = 20  # of names in a message


def read_entries(path: str | Path) -> tuple[list[tuple[str, Any]], str]:
    """All entries of a data file or directory, and the BLAKE3 hash of the files, one after another.

    path: as for ``data_files``. Each file is read once: it can be a pipe. Raises InputError, naming file and line.
    """
    if is_given(path):
        raise no_longer_there(path)
    entries: list[tuple[str, Any]] = []
    digest = blake3()
    for file in data_files(path):
        content = _read(file)
        digest.update(content)
        entries += _parse(content, file)
    if not entries:
        raise InputError(f"{path}: holds no samples")
    return entries, digest.hexdigest()


def hash_data(path: str | Path) -> str:
    """The hash that ``read_entries`` gives."""
    if is_given(path):
        raise no_longer_there(path)
    files = data_files(path)
    if len(files) == 1:
        return hash_file(files[0])
    digest = blake3()
    for file in files:
        digest.update(_read(file))
    return digest.hexdigest()


def data_files(path: str | Path | GivenRows) -> list[Path]:
    """The files of ``path``, in order: a file; or DIR or DIR:NAME, of a directory of data files.

    DIR is one that the library datasets has saved, where NAME is a split, or holds data files of any format. There NAME
    is the path of one below DIR, or the end of its path without ending and number of shard. Without NAME there must be
    one alone. Rows given in Python have none. Raises InputError if there is none in DIR, or several, or if a shard is
    missing.
    """
    if isinstance(path, GivenRows) or is_given(path):
        return []
    path = checked_path(path)
    if path.is_dir():
        return _files_in(path, None)
    directory, colon, name = str(path).rpartition(":")
    while colon and not exists(path):
        if Path(directory).is_dir():
            return _files_in(Path(directory), name)
        directory, colon, rest = directory.rpartition(":")
        name = f"{rest}:{name}"
    return [path]


def _files_in(directory: Path, name: str | None) -> list[Path]:
    if exists(directory / "dataset_dict.json"):
        content = read_json(directory / "dataset_dict.json")
        splits = content.get("splits") if isinstance(content, dict) else None
        names = {split: [directory / split] for split in splits or () if _is_plain(split)}
        (directory,), name = _chosen(names, name, directory, "splits"), None
    if exists(directory / "state.json"):
        if name is not None:
            raise InputError(f"{directory}: is one data set without splits; leave :{name} out")
        return _files_of_state(directory)
    files: dict[str, list[Path]] = {}
    for file in sorted(directory.rglob("*")):
        part = file.relative_to(directory)
        if _is_data(file) and not any(step.startswith(".") for step in part.parts):
            if str(part) == name:
                return [file]
            files.setdefault(_key(part), []).append(file)
    if not files:
        raise InputError(f"{directory}: cannot be read: Is a directory, and it holds no data file")
    chosen = _chosen(files, name, directory, "data files")
    if len({_ending(file) for file in chosen}) > 1:
        listed = ", ".join(str(file.relative_to(directory)) for file in chosen)
        raise InputError(f"{directory}: holds {listed}; name one of them, after {directory}:")
    _check_whole(chosen, directory)
    return chosen


def _check_whole(files: Sequence[Path], directory: Path) -> None:
    """Raise InputError if there is not every shard that the names of the others, as -00000-of-00002, tell of."""
    numbers: dict[str, set[int]] = {}  # by how many there are
    for file in files:
        if shard := _SHARD.search(file.name.removesuffix(_ending(file))):
            numbers.setdefault(shard[2], set()).add(int(shard[1]))
    for total, found in numbers.items():
        count = int(total)
        begin = int(0 not in found and count in found)  # some programs count from 1
        expected = range(begin, begin + count)
        first = next((number for number in expected if number not in found), None)
        if first is not None:
            key = _key(files[0].relative_to(directory))
            raise InputError(
                f"{directory}: {key} lacks {count - sum(map(expected.__contains__, found))} of {count} shards, first "
                f"{key}-{first:0{len(total)}}-of-{total}; {fetch_data_again(directory) or 'put back what is missing'}"
            )


def _chosen(files: Mapping[str, list[Path]], name: str | None, directory: Path, what: str) -> list[Path]:
    """The files of the one key that ``name`` is, or is the end of."""
    found = [key for key in files if name is None or key == name] or [k for k in files if k.endswith(f"/{name}")]
    if len(found) == 1:
        return files[found[0]]
    names = [*files][:_LONGEST_LIST]
    rest = f" and {len(files) - len(names)} more" if len(files) > len(names) else ""
    problem = "cannot be read: Is a directory" if name is None else f"has no {name}"
    example = f"{directory}:{names[0]}" if names else "another directory"
    raise InputError(f"{directory}: {problem}, with the {what} {', '.join(names)}{rest}; name one, as in {example}")


def _files_of_state(directory: Path) -> list[Path]:
    """The files of a data set that ``save_to_disk`` has written."""
    path = directory / "state.json"
    state = read_json(path)
    files = state.get("_data_files") if isinstance(state, dict) else None
    names: list[Any] = [file.get("filename") if isinstance(file, dict) else None for file in files or ()]
    if not names or not all(map(_is_plain, names)):
        raise InputError(f"{path}: names no files of data; save the data set again")
    if state.get("_indices_data_files"):
        raise InputError(f"{path}: is a selection of rows by an old version of datasets; load it and save it again")
    return [directory / name for name in names]


def _is_plain(name: Any) -> bool:
    """Whether this is the name of a file in the same directory."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _is_data(file: Path) -> bool:
    return file.name.lower().endswith(ENDINGS) and file.name not in _ABOUT and file.is_file()


def _ending(file: Path) -> str:
    return file.name[-max(len(ending) for ending in ENDINGS if file.name.lower().endswith(ending)) :]


def stem_of(path: str | Path) -> str:
    """The name of a data file, without its ending and the number of a shard; of DIR:NAME, NAME."""
    path = checked_path(path)
    name = path.name if exists(path) else path.name.rpartition(":")[2]
    return _SHARD.sub("", name.removesuffix(_ending(Path(name))) if name.lower().endswith(ENDINGS) else name)


def _key(part: Path) -> str:
    """The name of a data file, the same for all its shards: data/train for data/train-00000-of-00002.parquet."""
    stem = _SHARD.sub("", str(part).removesuffix(_ending(part)))
    return str(Path(stem).parent) if Path(stem).name.isdigit() and len(part.parts) > 1 else stem


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    check_fetched(path, content)
    return content


def _parse(content: bytes, path: Path) -> Entries:
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: cannot be decompressed: {error}") from error
        path_of_text = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    else:
        path_of_text = path
    for beginning, program in _OTHERS.items():
        if content.startswith(beginning):
            raise InputError(f"{path}: is compressed by {program}; decompress it first (gzip alone is read)")
    if content.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        return _arrow_entries(content, path)
    text = decode(content, path)
    ending = path_of_text.suffix.lower()
    if ending in (".csv", ".tsv"):
        return _csv_entries(text, path, "\t" if ending == ".tsv" else None)
    if text.lstrip().startswith("["):
        return _list_entries(text, path)
    return _single_entry(text, path) or _line_entries(text, path)


def _single_entry(text: str, path: Path) -> Entries:
    """The object of a file that holds one, printed over several lines; nothing if it holds anything else."""
    if text.lstrip().partition("\n")[0].rstrip().endswith("}"):
        return []
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return [(str(path), entry)] if isinstance(entry, dict) else []


def _line_entries(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: is not JSON; each line must be one object") from error


def _list_entries(text: str, path: Path) -> Entries:
    try:
        return [(f"{path}, object {number}", row) for number, row in enumerate(json.loads(text), start=1)]
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{path}{line}: is not JSON; a file that begins with [ must be one list of objects") from error


def _csv_entries(text: str, path: Path, separator: str | None) -> Iterator[tuple[str, Any]]:
    """Rows by the names in the header. A cell that is empty is none."""
    separator = separator or max(",;\t", key=text.partition("\n")[0].count)
    limit = csv.field_size_limit(sys.maxsize)  # of a cell; a whole book may be one
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            where, line = f"{path}, line {line}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = [name.strip() for name in cells]
                if len(set(header)) < len(header):
                    raise InputError(f"{where}: names a column twice")
            elif len(cells) != len(header):
                raise InputError(f"{where}: has {len(cells)} cells, and the header has {len(header)}")
            else:
                yield where, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: is not CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _arrow_entries(content: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow as pa
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise InputError(f"{path}: is a file of Arrow or parquet, for which: pip install 'perta-fast[data]'") from error
    source = pa.BufferReader(content)
    try:
        if content.startswith(b"PAR1"):
            table = parquet.read_table(source)
        else:
            opened = ipc.open_file if content.startswith(b"ARROW1") else ipc.open_stream
            table = opened(source).read_all()
        # Times have no use here, and some cannot be given as Python's.
        table = table.select([k for k, field in enumerate(table.schema) if not pa.types.is_temporal(field.type)])
        number, schema = 0, pa.struct(list(table.schema))
        for batch in table.to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", without_nulls(_with_json(row, schema))
    except (pa.ArrowException, ValueError, OSError) as error:
        raise InputError(f"{path}: is damaged, or not Arrow or parquet as pyarrow reads it: {error}") from error


def _with_json(value: Any, kind: Any) -> Any:
    """A value of an Arrow type, read where it is JSON: the library datasets keeps objects of different types so."""
    if getattr(kind, "extension_name", "") == "arrow.json":
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(value, dict):
        return {field.name: _with_json(value[field.name], field.type) for field in kind}
    if isinstance(value, list) and value and hasattr(kind, "value_type"):
        return [_with_json(inner, kind.value_type) for inner in value]
    return value


def without_nulls(value: Any) -> Any:
    """``value`` without the fields that are null, at any depth; a message keeps its ``content``.

    Arrow gives every object in a column the fields of all others, as null: a tool would have every tool's parameters.
    """
    if isinstance(value, Mapping):
        said = "role" in value
        kept = ((key, inner) for key, inner in value.items() if inner is not None or (said and key == "content"))
        return {key: without_nulls(inner) for key, inner in kept}
    if isinstance(value, list) and value and isinstance(value[0], Mapping | list):
        return [without_nulls(inner) for inner in value]
    return value
