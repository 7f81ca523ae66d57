"""Names of the Hugging Face hub in place of paths: ORG/NAME is looked for in the local cache.

What exists under a path comes first. Nothing is downloaded unless that was asked for.
"""

import os
import re
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from perta_fast.errors import InputError, RunError, shell_command
from perta_fast.files.reading import checked_path, exists

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(:.+)?", re.ASCII)
_CACHED = re.compile(r"(model|dataset)s--(?:([\w.-]+?)--)?([\w.-]+)", re.ASCII)  # in the hub's cache: ORG, NAME
_MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.md"]  # no weights of other kinds
_DATA_FILES = ["*.json", "*.jsonl", "*.parquet", "*.csv", "*.tsv", "*.gz", "*.arrow"]
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_Kind = Literal["model", "dataset"]


def is_name(text: str, folder: Path) -> bool:
    """Whether ``text`` can only be a name: neither from ``folder`` nor from here does it lead towards a path."""
    name = _NAME.fullmatch(text)
    return name is not None and not any(exists(start / text.partition("/")[0]) for start in (folder, Path()))


def hub_name(path: str | Path, kind: _Kind = "model") -> str | None:
    """The name on the hub of a model, or data set, that lies in the hub's cache; None of any other."""
    parts = Path(path).parts
    cached = (_CACHED.fullmatch(part) for part, below in pairwise(parts) if below == "snapshots")
    found = next((match for match in cached if match is not None and match[1] == kind), None)
    return None if found is None else "/".join(filter(None, found.groups()[1:]))


def fetch_data_again(path: Path) -> str | None:
    """Advice for a data set in the hub's cache that lacks a file; None for any other."""
    name = hub_name(path, "dataset")
    if name is None:
        return None
    given = f"give {name} with ‹download›, or " if _NAME.fullmatch(name) else ""
    return f"{given}fetch it with: {_fetch(name, 'dataset')}"


def local_model(path: str | Path, download: bool = False, *, in_place: bool = False) -> Path:
    """``path``, or the directory of the cache with the model of this name.

    Raises InputError if it is neither, or would be changed ``in_place`` in the cache; RunError if a download fails.
    """
    name = None if exists(checked_path(path)) else _NAME.fullmatch(os.fspath(path))
    snapshot = None if name is None or name[2] else _snapshot(path, name[1], "model", download)
    if snapshot is None:
        return Path(path)
    if not any(file.suffix in _WEIGHTS for file in snapshot.iterdir()):
        raise InputError(
            f"{path}: the Hugging Face cache has no weights of it; fetch them with: {_fetch(path, 'model')}"
        )
    if in_place:
        copy = shell_command("cp", "-rL", snapshot, Path("DIR"))
        raise InputError(f"{path}: lies in the Hugging Face cache, where nothing may change; copy it first: {copy}")
    return snapshot


def path_text(path: Any, name: str = "data") -> str:
    """The text of a path, or of a name of the hub. Raises InputError if it is neither; name: of the argument."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(
            f"‹{name}› is {type(path).__name__}, and here it must be a file; write one, with to_json of a data set, or "
            'to_json(file, orient="records", lines=True) of a DataFrame'
        )
    return os.fspath(path)


def local_data(path: str | Path, download: bool = False) -> Path:
    """``path``, or the directory of the cache with the data set of this name, and what follows the name's colon.

    Raises InputError if it is neither, or no path at all; RunError if a download fails.
    """
    text = path_text(path)
    there = exists(checked_path(path)) or exists(Path(text.partition(":")[0]))
    name = None if there else _NAME.fullmatch(text)
    snapshot = None if name is None else _snapshot(path, name[1], "dataset", download)
    if name is None or snapshot is None:
        return Path(path)
    if not any(fnmatch(file.name, pattern) for file in snapshot.rglob("*") for pattern in _DATA_FILES):
        fetch = _fetch(name[1], "dataset")
        raise InputError(f"{path}: the Hugging Face cache has no file of this data set's rows; fetch it with: {fetch}")
    return Path(f"{snapshot}{name[2] or ''}")


def _snapshot(path: str | Path, name: str, kind: _Kind, download: bool) -> Path | None:
    """The directory of the cache; None if it has none, and ``path`` is rather a file that is missing here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = _MODEL_FILES if kind == "model" else _DATA_FILES
    try:
        return Path(snapshot_download(name, repo_type=kind, local_files_only=not download, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        if download:
            raise RunError(f"{path}: cannot be downloaded: {_first_line(error)}") from error
        if exists(Path(path).parent):
            return None
        what = "model" if kind == "model" else "data set"
        raise InputError(
            f"{path}: is no path here, and no {what} in the Hugging Face cache; if the hub has it, pass ‹download›, or "
            f"fetch it with: {_fetch(name, kind)}"
        ) from error
    except Exception as error:  # the libraries below raise errors of many kinds
        if not download:
            raise
        raise RunError(f"{path}: cannot be downloaded: {_first_line(error)}") from error


def _fetch(name: str | Path, kind: _Kind) -> str:
    return shell_command("hf", "download", *(["--repo-type", "dataset"] if kind == "dataset" else []), str(name))


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
