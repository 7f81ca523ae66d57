"""Finish a run that was stopped: by a signal, a crash, a full disk, a power cut."""

import os
from pathlib import Path

from perta_fast.checkpoint import JOB
from perta_fast.errors import InputError
from perta_fast.in_place import is_open, resume_in_place
from perta_fast.output import partial_path
from perta_fast.report import Report
from perta_fast.to_directory import STATE, finish_leftover, resume_directory


def resume(directory: str | Path, *, progress: bool = True) -> Report:
    """Take an unfinished run up again; the result is, bit for bit, that of an uninterrupted one.

    directory: what was given as ``out``, or the model of an in-place run. Returns the report. Raises InputError
    if there is nothing to finish, or an input is no longer what it was (nothing is written then), RunError if
    the run fails again.
    """
    place = Path(os.path.realpath(directory))
    # os.path: Path.exists would raise for a name that no file can have.
    if is_open(place):
        return resume_in_place(place, progress)
    if place.name and os.path.exists(partial_path(place) / STATE / JOB):  # noqa: PTH110
        return resume_directory(place, progress)
    if os.path.exists(place / STATE):  # noqa: PTH110
        return finish_leftover(place)
    raise InputError(f"{directory}: there is no unfinished run to resume")
