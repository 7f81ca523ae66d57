"""The directory of a run in place, in its model: locked while the run lasts, and cleared of what a killed one has left.

A run marks it at once. It saves its job there before the first byte of the model is changed, and seals it when only
small files are still to be moved. So of a run that was killed and has no job there, the mark alone says that it had
changed nothing, and the seal that it was complete.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from perta_fast.errors import RunError
from perta_fast.files.durable import remove, sync
from perta_fast.files.journal import JOB, JOURNAL
from perta_fast.files.locking import lock
from perta_fast.files.own import make_own_directory, own_file
from perta_fast.files.reading import exists

SEALED = "sealed"
_MARK = "begun"

Leftover = Literal["nothing was changed", "complete", "unknown"]


def is_open(model: Path) -> bool:
    """Whether ``model`` holds an unfinished in-place run."""
    return exists(model / JOURNAL / JOB)


def is_untouched(model: Path) -> bool:
    """Whether a run on ``model`` was killed before it changed anything there. What it has left, another run clears."""
    journal = model / JOURNAL
    return exists(journal / _MARK) and not exists(journal / JOB) and not exists(journal / SEALED)


@contextmanager
def locked_journal(model: Path) -> Iterator[Path]:
    """The journal's directory, for one process at a time; removed at the end unless it holds a job.

    Raises RunError if another run has it, or it cannot be made.
    """
    with _locked(model) as journal:
        if not is_open(model):
            _empty(journal)
            os.close(own_file(journal / _MARK, os.O_WRONLY | os.O_CREAT))
        yield journal


def clear_leftover(model: Path) -> Leftover:
    """Remove the directory of a run that was killed and has no job; returns what that run had done."""
    with _locked(model) as journal:
        if (journal / SEALED).exists():
            return "complete"
        return "nothing was changed" if (journal / _MARK).exists() else "unknown"


@contextmanager
def _locked(model: Path) -> Iterator[Path]:
    journal = model / JOURNAL
    try:
        make_own_directory(journal)
        descriptor = lock(journal)
    except BlockingIOError:
        raise RunError(f"{model}: another run is changing it now") from None
    except OSError as error:
        raise RunError(f"{model}: cannot be written: {error.strerror}") from error
    try:
        yield journal
    finally:
        try:
            if not is_open(model):
                _empty(journal)
                remove(journal)
        finally:
            os.close(descriptor)


def _empty(journal: Path) -> None:
    """Remove all that is in it, the seal last: without it, a complete run would look like one that never began."""
    others = [path for path in journal.iterdir() if path.name != SEALED]
    for path in others:
        remove(path)
    if others:
        sync(journal)
    remove(journal / SEALED)
