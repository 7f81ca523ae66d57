"""The directory of a run in place, in its model: locked while the run lasts, and cleared of what a killed one has left.

A run marks it at once. It saves its job there before the first byte of the model is changed, and seals it when only
small files are still to be moved. So of a run that was killed and has no job there, the mark alone says that it had
changed nothing, and the seal that it was complete. The seal also stays while the result is checked: no run begins
beside it, since the same command would change the model twice.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from perta_fast.errors import InputError, RunError, shell_command
from perta_fast.files.durable import remove, sync, write_file
from perta_fast.files.journal import JOB, JOURNAL
from perta_fast.files.locking import lock
from perta_fast.files.own import make_own_directory, own_file
from perta_fast.files.reading import exists

SEALED = "sealed"
_MARK = "begun"
_AWAITS_CHECK = b"the result is to be checked\n"  # in the seal

Leftover = Literal["nothing was changed", "complete", "unknown"]


def is_open(model: Path) -> bool:
    """Whether ``model`` holds an unfinished in-place run."""
    return exists(model / JOURNAL / JOB)


def is_untouched(model: Path) -> bool:
    """Whether a run on ``model`` was killed before it changed anything there. What it has left, another run clears."""
    journal = model / JOURNAL
    return exists(journal / _MARK) and not exists(journal / JOB) and not exists(journal / SEALED)


def check_not_complete(model: Path) -> None:
    """Raise InputError if a run on ``model`` was complete when it was killed, or its result is still to be checked."""
    if exists(model / JOURNAL / SEALED) and not is_open(model):
        finishing = shell_command("perta", "resume", model)
        raise InputError(
            f"{model}: a run in place has changed it, and was stopped at its last steps; the same command would change "
            f"it a second time. Do these steps with: {finishing}"
        )


@contextmanager
def locked_journal(model: Path) -> Iterator[Path]:
    """The journal's directory, for one process at a time; removed at the end unless it holds a job, or awaits a check.

    Raises RunError if another run has it, or it cannot be made, InputError as ``check_not_complete``.
    """
    with _locked(model) as journal:
        check_not_complete(model)
        try:
            if not is_open(model):
                _empty(journal)
                os.close(own_file(journal / _MARK, os.O_WRONLY | os.O_CREAT))
            yield journal
        finally:
            sealed = journal / SEALED
            _clear(model, keep_seal=sealed.exists() and sealed.stat().st_size > 0)


def seal(journal: Path, awaits_check: bool) -> None:
    """Note down that only small files are still to be moved, and whether the result is to be checked then."""
    write_file(journal / SEALED, _AWAITS_CHECK if awaits_check else b"")


def clear_leftover(model: Path, checked: bool = False) -> Leftover:
    """Remove the directory of a run that has no job there; returns what that run had done.

    The seal of one that was complete stays until the call that says that its result is ``checked``, or is not to be.
    """
    with _locked(model) as journal:
        try:
            if (journal / SEALED).exists():
                return "complete"
            return "nothing was changed" if (journal / _MARK).exists() else "unknown"
        finally:
            _clear(model, keep_seal=not checked and (journal / SEALED).exists())


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
        os.close(descriptor)


def _clear(model: Path, keep_seal: bool) -> None:
    """Remove the directory, or all in it but the seal; nothing if it holds a job."""
    if not is_open(model):
        _empty(model / JOURNAL, keep_seal)
        if not keep_seal:
            remove(model / JOURNAL)


def _empty(journal: Path, keep_seal: bool = False) -> None:
    """Remove all that is in it, the seal last: without it, a complete run would look like one that never began."""
    others = [path for path in journal.iterdir() if path.name != SEALED]
    for path in others:
        remove(path)
    if others:
        sync(journal)
    if not keep_seal:
        remove(journal / SEALED)
