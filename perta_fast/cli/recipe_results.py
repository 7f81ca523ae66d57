"""What lies where a section of a recipe puts its result, before it is run."""

import os
from pathlib import Path

from perta_fast.cli import sweep
from perta_fast.cli.recipe_section import Section
from perta_fast.files.new_directory import SWEEP_STATE, has_record, has_walk
from perta_fast.files.reading import exists
from perta_fast.records.recipe_record import settings_of_result, state_of_result
from perta_fast.resuming import is_unfinished
from perta_fast.subtraction.journal_directory import is_untouched
from perta_fast.sweeping.results import FILE_NAME, Sweep, record_beside

_RESOLVED = frozenset({"batch-size", "max-length", "threads"})  # a record may have the value that was used instead


def is_there(section: Section) -> bool:
    """Whether there is something under the name of the result."""
    return _is_occupied(section.result)


def is_begun(section: Section) -> bool:
    """Whether it was stopped with work done that can go on: of the result, or of what comes before it."""
    choosing = section.chooses and has_record(record_beside(section.result), SWEEP_STATE)
    walks = [has_walk(Path(os.path.realpath(place))) for place in (section.result, *section.beside)]
    return choosing or any(walks) or is_half_made(section)


def is_half_made(section: Section) -> bool:
    """Whether the result itself is half made or half changed."""
    return is_unfinished(section.result) and not (section.in_place and is_untouched(section.result))


def state_of(section: Section) -> str | None:
    """By what the result is known, as it is; None if it is not there."""
    return state_of_result(section.result)


def has_no_choice(section: Section) -> bool:
    """Whether it is a sweep that was to make something of its choice, and ended without one."""
    takes = section.command is sweep.COMMAND and (section.changed or "checkpoint" in section.settings)
    return bool(takes) and not Sweep.read(section.result / FILE_NAME).has_choice


def differs_in(section: Section) -> str | None:
    """The key of a setting of which the record of the result says another value; None if it says none."""
    noted, parsed = settings_of_result(section.result), vars(section.parsed())
    for key in section.told().keys() - _RESOLVED:
        value, found = parsed.get(key.replace("-", "_")), noted.get(key.replace("-", "_"))
        if isinstance(value, Path) and isinstance(found, str) and exists(value):
            value, found = os.path.realpath(value), os.path.realpath(found)
        elif not isinstance(value, int | float) or not isinstance(found, int | float):
            continue
        if value != found:
            return key
    return None


def leftover(section: Section) -> Path | None:
    """A directory that it would make beside the result, and that is there already."""
    return next(filter(_is_occupied, section.beside), None)


def _is_occupied(path: Path) -> bool:
    return exists(path) and not (path.is_dir() and not any(path.iterdir()))
