"""What is to be done of each section of a recipe that is run, perhaps for the second time."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from perta_fast.checkpoints.companions import TEMPLATES
from perta_fast.checkpoints.fingerprint import state_of_input
from perta_fast.cli.recipe_results import (
    differs_in,
    has_no_choice,
    is_begun,
    is_half_made,
    is_there,
    leftover,
    state_of,
)
from perta_fast.cli.recipe_section import Section
from perta_fast.data.formats import data_files
from perta_fast.errors import InputError, shell_command
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
    """How a section is done. known: of an earlier run.

    inputs: gives what shows whether an input has changed, as it is then.
    """

    way: Way
    known: Made | None
    inputs: Callable[[], dict[str, Any]]


def plan(sections: Sequence[Section], made: Mapping[str, Made], *, overwrite: bool) -> list[Plan]:
    """How each section is done; ``made`` has what earlier runs did.

    Raises InputError for a section that would replace what was made in another way, unless ``overwrite``.
    """
    plans: list[Plan] = []
    results = [path for section in sections for path in section.made()]
    for number, section in enumerate(sections):
        changing = [model for other in sections[number:] for model in other.changed]

        def inputs(section: Section = section, changing: list[Path] = changing) -> dict[str, Any]:
            return states(section, changing, results)

        known = made.get(section.name)
        changed = None if known is None else first_difference(known.inputs, inputs())
        for other, before in zip(sections, plans, strict=False):
            if before.way is not Way.NOT_AT_ALL:
                changed = next((key for key, path in section.read() if _lies_in(path, other)), changed)
        way, refusal = _way(section, known, changed)
        if refusal:
            _check_replaceable(section, known, refusal, overwrite)
        plans.append(Plan(way, known, inputs))
    return plans


def _check_replaceable(section: Section, known: Made | None, refusal: str, overwrite: bool) -> None:
    """Raise InputError unless what is there may be made again. A model that was changed where it lies never may."""
    begun = is_half_made(section)
    if section.in_place and (begun or (known is not None and state_of(section) != known.before)):
        finishing = f"finish that with: {shell_command('perta', 'resume', section.result)}, or " if begun else ""
        raise InputError(
            f"{section.where}: {refusal}; it would be changed a second time: {finishing}put a copy of the model as it "
            "was in its place"
        )
    if not (overwrite or section.overwrites):
        raise InputError(f"{section.where}: {refusal}; {_ADVICE}")


def _way(section: Section, known: Made | None, changed: str | None) -> tuple[Way, str]:
    """How a section is done, and what speaks against it. changed: the key of an input that is another one now."""
    result, there, unfinished, state = section.result, is_there(section), is_begun(section), state_of(section)
    begun = unfinished or (there and not (section.in_place and (known is None or state == known.before)))
    if not begun:
        left = leftover(section)
        return (Way.ANEW, "") if left is None else (Way.OVER, f"{left}: is there already")
    if known is None or (state is None and not unfinished):
        how = "is there, and not made by this recipe" if there and not unfinished else "was begun by another command"
        return Way.OVER, f"{result}: {how}"
    other = first_difference(known.settings, section.told())
    if other is not None:
        return Way.OVER, f"{result}: was made with another value of {other}"
    if changed is not None:
        return Way.OVER, f"{result}: was made before {changed} changed"
    if unfinished:
        return Way.FURTHER, ""
    if known.result is None and state == known.before:  # it was to be replaced, and has not been
        return Way.OVER, ""
    if known.result == state:
        return Way.NOT_AT_ALL, ""
    if known.result is not None:
        return Way.OVER, f"{result}: is no longer what this recipe has made"
    # A run may have ended just before this was written down, or failed, or another command was here.
    if (other := differs_in(section)) is not None:
        return Way.OVER, f"{result}: is there, made by another command with another value of {other}"
    if has_no_choice(section):
        return Way.OVER, f"{result}: is there, and has no setting that could be taken"
    return Way.NOT_AT_ALL, ""


def states(section: Section, changing: Sequence[Path] = (), results: Sequence[Path] = ()) -> dict[str, Any]:
    """What shows whether an input has changed, by key.

    changing: what is changed in place meanwhile. results: what the job makes, perhaps in the directory of an input.
    """
    found: dict[str, Any] = {}
    for key, path in section.read():
        if not any(is_same(path, other) for other in changing):
            found.setdefault(key, []).append(_state(section, key, path, results))
    return found


def _state(section: Section, key: str, path: Path, results: Sequence[Path]) -> Any:
    files = data_files(path) if section.reads_rows(key) else [path]
    if files != [path]:
        return {os.path.relpath(file, path.parent): state_of_input(file) for file in files}
    state = state_of_input(path, _FOLDERS)
    if state is None or not path.is_dir():
        return state
    inside = [other for other in results if lies_in(other, path)]
    return {name: each for name, each in state.items() if not any(is_same(path / name, other) for other in inside)}


def _lies_in(path: Path, section: Section) -> bool:
    return any(lies_in(path, made) for made in section.made())
