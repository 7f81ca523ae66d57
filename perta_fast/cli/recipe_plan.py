"""What is to be done of each section of a recipe that is run, perhaps for the second time."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from perta_fast.checkpoints.companions import TEMPLATES
from perta_fast.checkpoints.fingerprint import state_of_input
from perta_fast.cli.recipe_sections import Section
from perta_fast.data.formats import data_files
from perta_fast.errors import InputError
from perta_fast.files.identity import is_same, lies_in
from perta_fast.importance.ratio import SIDES
from perta_fast.records.recipe_record import Made, first_difference

# Where more of an input lies: chat templates of a model, a pair of importances, the files of MUSE.
_FOLDERS = (TEMPLATES, *SIDES, "knowmem", "verbmem")
_ADVICE = "choose another out, or replace it with --overwrite"


class Way(Enum):
    """How a section is done, in the words of its line of progress."""

    NOT_AT_ALL = "is done already"
    ANEW = "is made"
    FURTHER = "was begun, and goes on"
    OVER = "is made again"


@dataclass(frozen=True)
class Plan:
    """How a section is done. refusal: why it may not be, unless that was asked for. known: of an earlier run.

    inputs: gives what shows whether an input has changed, as it is then.
    """

    way: Way
    refusal: str
    known: Made | None
    inputs: Callable[[], dict[str, Any]]


def plan(sections: Sequence[Section], made: Mapping[str, Made], *, overwrite: bool) -> list[Plan]:
    """How each section is done; ``made`` has what earlier runs did.

    Raises InputError for a section that would replace what was made in another way, unless ``overwrite``.
    """
    plans: list[Plan] = []
    for number, section in enumerate(sections):
        changing = [model for other in sections[number:] for model in other.changed]

        def inputs(section: Section = section, changing: list[Path] = changing) -> dict[str, Any]:
            return states(section, changing)

        known = made.get(section.name)
        changed = None if known is None else first_difference(known.inputs, inputs())
        for other, before in zip(sections, plans, strict=False):
            if before.way is not Way.NOT_AT_ALL:
                changed = next((key for key, path in section.read() if _lies_in(path, other)), changed)
        way, refusal = _way(section, known, changed)
        if refusal and not (overwrite or section.overwrites):
            raise InputError(f"{section.where}: {section.result}: {refusal}; {_ADVICE}")
        plans.append(Plan(way, refusal, known, inputs))
    return plans


def _way(section: Section, known: Made | None, changed: str | None) -> tuple[Way, str]:
    """How a section is done, and what speaks against it. changed: the key of an input that is another one now."""
    there, unfinished, state = section.is_there(), section.is_unfinished(), section.state()
    begun = unfinished or (there and not (section.in_place and (known is None or state == known.before)))
    if not begun:
        return Way.ANEW, ""
    if known is None or (state is None and not unfinished):
        return Way.OVER, "is there, and not made by this recipe" if there else "was begun by another command"
    other = first_difference(known.settings, section.told())
    if other is not None:
        return Way.OVER, f"was made with another value of {other}"
    if changed is not None:
        return Way.OVER, f"was made before {changed} changed"
    if unfinished:
        return Way.FURTHER, ""
    if known.result is None and state == known.before:  # it was to be replaced, and has not been
        return Way.OVER, ""
    if known.result not in (None, state):
        return Way.OVER, "is no longer what this recipe has made"
    return Way.NOT_AT_ALL, ""


def states(section: Section, changing: Sequence[Path] = ()) -> dict[str, Any]:
    """What shows whether an input has changed, by key. changing: what is changed in place meanwhile."""
    found: dict[str, Any] = {}
    for key, path in section.read():
        if not any(is_same(path, other) for other in changing):
            found.setdefault(key, []).append(_state(section, key, path))
    return found


def _state(section: Section, key: str, path: Path) -> Any:
    files = data_files(path) if section.reads_rows(key) else [path]
    if files == [path]:
        return state_of_input(path, _FOLDERS)
    return {os.path.relpath(file, path.parent): state_of_input(file) for file in files}


def _lies_in(path: Path, section: Section) -> bool:
    return any(lies_in(path, made) for made in section.made())
