"""The sections of a recipe, checked all together before the first one runs."""

import reprlib
from pathlib import Path

from perta_fast.checkpoints.adapters import is_adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.cli import eval, report, sweep, tune, unlearn
from perta_fast.cli.command import Command, nearest
from perta_fast.cli.recipe_checks import check_settings
from perta_fast.cli.recipe_options import MAKE_NOTHING, arguments_from, options_of, required, with_shared
from perta_fast.cli.recipe_section import Section
from perta_fast.data.rows import read_data
from perta_fast.errors import InputError
from perta_fast.files.hub import local_data
from perta_fast.files.identity import is_same, lies_in
from perta_fast.files.reading import exists
from perta_fast.records.recipe import Recipe, command_of
from perta_fast.resuming import is_unfinished

COMMANDS: dict[str, Command] = {module.COMMAND.name: module.COMMAND for module in (tune, sweep, unlearn, eval, report)}
# What sections make; the other paths are read.
OUTPUTS = {option.key for command in COMMANDS.values() for option in command.options if option.makes}
_CHECKPOINTS = ("model", "base", "tuned", "gold", "reference-model", "against")


def sections_of(recipe: Recipe, path: Path) -> list[Section]:
    """The sections of ``recipe``, in its order; one run is a section of its own. Every setting is checked.

    Raises InputError naming file, line and key.
    """
    if not recipe.sections:
        sections = [Section(unlearn.COMMAND.name, unlearn.COMMAND, recipe.settings, path)]
    else:
        _check_shared(recipe)
        sections = [
            Section(name, _command_of(name), with_shared(_command_of(name), recipe.settings, own), path)
            for name, own in recipe.sections.items()
        ]
    for section in sections:
        arguments_from(section.command, section.settings, path)
        missing = [" or ".join(keys) for keys in required(section.command) if not _says(section, keys)]
        if missing:
            whole = section.where if recipe.sections else path
            raise InputError(f"{whole}: is not a whole run; it does not say: {', '.join(missing)}")
        try:
            check_settings(section.parsed())
        except InputError as error:
            raise InputError(f"{section.where if recipe.sections else path}: {error}") from error
    return sections


def check_inputs(sections: list[Section]) -> None:
    """Raise InputError unless all that the sections read is there, in order, or is made by an earlier section."""
    data: dict[tuple[Path, str], None] = {}
    half_changed = [path for section in sections for path in section.changed if is_unfinished(path)]
    _check_apart(sections)
    for number, section in enumerate(sections):
        if key := next((key for key in MAKE_NOTHING if _says(section, [key])), None):
            raise InputError(f"{section.settings[key].where}: {key} makes nothing that a job could go on with")
        for earlier in sections[:number]:
            for path in section.made():
                if any(is_same(path, other) for other in earlier.made()):
                    advice = "a job changes a model once" if path in section.changed else "choose another out"
                    raise InputError(f"{section.where}: {path} is what {earlier.name} makes; {advice}")
        for key, path in section.read():
            where = f"{section.settings[key].where}: {key}"
            if path in half_changed or any(_made_by(path, earlier) for earlier in sections[:number]):
                continue
            later = next((other for other in sections[number:] if _made_by(path, other)), None)
            if later is not None and not exists(path):
                raise InputError(f"{where}: {path} is made by {later.name}, which does not come before {section.name}")
            _check_input(section, key, path, where, data)


def _check_apart(sections: list[Section]) -> None:
    """Raise InputError if a section would replace what it reads itself, or what an earlier one reads."""
    for number, section in enumerate(sections):
        for other in sections[: number + 1]:
            for key, path in other.read():
                if not section.changed and exists(path) and _made_by(path, section):
                    where = f"{other.settings[key].where}: {key}"
                    raise InputError(
                        f"{where}: {path} would be replaced by {section.name}; choose another out for that"
                    )


def _check_input(section: Section, key: str, path: Path, where: str, data: dict[tuple[Path, str], None]) -> None:
    """Raise InputError unless what is read is there, and is a checkpoint or data if it must be. data: read before."""
    try:
        if section.reads_rows(key):
            fields = section.parsed().fields
            if (path, str(fields)) not in data:
                read_data(local_data(path), fields)
                data[path, str(fields)] = None
        elif not exists(path):
            raise InputError(f"{path}: does not exist")
        elif key in _CHECKPOINTS and not (path.is_dir() and is_adapter(path)):
            Checkpoint.open(path)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _check_shared(recipe: Recipe) -> None:
    """Raise InputError for a setting above the sections that none of them takes, or that each must have of its own."""
    known = {key for name in recipe.sections for key in options_of(_command_of(name))}
    for key, setting in recipe.settings.items():
        if key in {*OUTPUTS, "in-place"}:
            raise InputError(f"{setting.where}: {key} belongs into a section, since each makes something else")
        if key not in known:
            near = nearest(key, [*known, *COMMANDS])
            hint = f"did you mean {near}?" if near else f"the sections are {', '.join(recipe.sections)}"
            raise InputError(f"{setting.where}: {reprlib.repr(key)} is no option of any section; {hint}")


def _command_of(section: str) -> Command:
    return COMMANDS[command_of(section) or section]


def _says(section: Section, keys: list[str]) -> bool:
    return any(key in section.settings and section.settings[key].value is not False for key in keys)


def _made_by(path: Path, section: Section) -> bool:
    return any(lies_in(path, made) for made in section.made())
