"""One file that a command writes: checked before the work, written whole or not at all."""

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

from perta_fast.errors import InputError, RunError, shell_command
from perta_fast.files.apart import check_inputs_stay, check_name
from perta_fast.files.durable import write_file
from perta_fast.files.identity import is_same
from perta_fast.files.journal import check_finished
from perta_fast.files.mounts import mounts_in
from perta_fast.files.new_directory import (
    check_unfinished,
    check_writable,
    discard_unfinished,
    has_unfinished,
    partial_path,
    was_killed_early,
)
from perta_fast.files.own import check_own, remove_own_file
from perta_fast.files.reading import checked_path

# Of a checkpoint, an adapter or a tokenizer; their weights end otherwise than what a command writes.
_OF_A_MODEL = re.compile(
    r"(\w+_)?(config|tokenizer|vocab|tokens|tokens_map|index)\.json|.*\.index\.json|perta_(report|tune)\.json"
)


def check_output_file(
    path: Path, endings: tuple[str, ...], *, overwrite: bool, inputs: Iterable[Path] = (), again: str = ""
) -> None:
    """Raise InputError if a command must not write ``path``.

    Its name must have one of the ``endings``: nobody replaces weights by mistake. inputs: files that it reads.
    again: the state of an unfinished run to ``path`` that the command can go on with.
    """
    checked_path(path)
    advice = f"name a file that ends in {' or '.join(endings)}"
    if path.suffix not in endings:
        raise InputError(f"{path}: {advice}")
    if path.is_dir():
        raise InputError(f"{path}: is a directory; {advice}")
    check_name(path)
    sources = list(map(checked_path, inputs))
    check_inputs_stay(path, [partial_path(path)], sources)
    for source in sources:
        if is_same(path, source):
            raise InputError(f"{path}: is the input {source}; choose another file")
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"{path}: exists; choose another file or pass ‹overwrite›")
    if os.path.lexists(path) and _is_of_a_model(path.name):
        raise InputError(f"{path}: is a file of a model, which is not replaced; choose another file")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: is not a directory")
    check_finished(path.parent)
    if mounts_in(path):
        raise InputError(f"{path}: is a mount point, which cannot be replaced; {advice} in a directory")
    beside = partial_path(path)
    check_own(beside, directory=has_unfinished(path) or was_killed_early(beside))
    check_unfinished(path, overwrite=overwrite, again=again)
    check_writable(path)


def _is_of_a_model(name: str) -> bool:
    return _OF_A_MODEL.fullmatch(name) is not None


def write_output_file(path: Path, content: bytes, *, overwrite: bool = False) -> None:
    """Write or replace ``path``. Raises RunError, and keeps the old file, if that fails.

    overwrite: give up a run to ``path`` that was stopped; otherwise there must be none (InputError).
    """
    beside = partial_path(path)
    check_unfinished(path, overwrite=overwrite)
    discard_unfinished(path)
    check_own(beside, directory=False)
    try:
        write_file(path, content, beside)
    except OSError as error:
        problem = f"{path}: cannot be written: {error.strerror}"
        if error.errno in (errno.EBUSY, errno.EXDEV) and beside.exists():  # all is written: only the name is missing
            problem += f"; the result is in {beside}. Give it a name: {shell_command('mv', beside, 'NAME')}"
        else:
            remove_own_file(beside)
        raise RunError(problem) from error
    except BaseException:
        remove_own_file(beside)
        raise
