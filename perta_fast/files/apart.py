"""Whether what a run reads lies apart from what it replaces and removes, whatever paths lead there."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import combinations
from pathlib import Path

from perta_fast.errors import InputError
from perta_fast.files.identity import Identity, identity, lies_in
from perta_fast.files.own import is_own_name
from perta_fast.files.reading import checked_path


def check_name(final: str | Path) -> None:
    """Raise InputError if ``final`` is, or lies in, what runs use for unfinished work: the next one would remove it."""
    resolved = Path(os.path.realpath(checked_path(final)))
    hidden = next((path for path in (resolved, *resolved.parents) if is_own_name(path.name)), None)
    if hidden is not None:
        raise InputError(f"{final}: runs keep unfinished work under the name {hidden}; choose another place")


def check_apart(places: Mapping[str, Path]) -> None:
    """Raise InputError, naming both, if one of these directories lies in another. places: by argument."""
    for (one, first), (other, second) in combinations(places.items(), 2):
        if lies_in(first, second) or lies_in(second, first):
            raise InputError(f"‹{one}› {first} and ‹{other}› {second} must lie apart, neither within the other")


def check_inputs_stay(final: Path, places: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise InputError if an input lies in one of ``places``, which a run to, or on, ``final`` empties."""
    inputs = list(inputs)
    for place in places:
        path = input_in(place, inputs)
        if path is not None:
            raise InputError(
                f"{path}: a run to {final} would remove this input with its unfinished work in {place}; move it away"
            )


def check_outside(final: Path, inputs: Iterable[Path]) -> None:
    """Raise InputError if ``final`` lies in a directory that is read: it would become part of that input."""
    for path in inputs:
        if lies_in(final, path):
            raise InputError(f"{final}: lies in the input {path}; choose another output directory")


def input_in(directory: Path, inputs: Iterable[Path]) -> Path | None:
    """An input, or a file of one, that would go with ``directory`` (or a file); None if there is none.

    A link may lead there, and so may a mount of a directory or of one file. A file that has a second name (a hard link)
    does not go with the first.
    """
    itself = identity(directory)
    if itself is None:
        return None
    known = {itself, *_identities(directory)}
    identities: dict[Path, Identity | None] = {}  # of inputs, and of the directories above them
    for path in inputs:
        for part in (path, *_files_in(path)):
            source = Path(os.path.realpath(part))
            for above in (source, *source.parents):
                if above not in identities:
                    identities[above] = identity(above)
                if identities[above] in known:
                    return part
    return None


def _identities(directory: Path) -> Iterator[Identity]:
    """Those of ``directory``, of all directories below it, and of all files there that have no second name."""
    for folder, _, names in os.walk(directory):
        with suppress(FileNotFoundError):  # another process may be removing it
            status = Path(folder).stat()
            yield status.st_dev, status.st_ino
        for name in names:
            with suppress(FileNotFoundError):
                status = Path(folder, name).lstat()
                if status.st_nlink == 1:
                    yield status.st_dev, status.st_ino


def _files_in(path: Path) -> list[Path]:
    try:
        return [entry for entry in path.iterdir() if entry.is_file()]
    except (OSError, ValueError):  # a file, or a name that no file can have
        return []
