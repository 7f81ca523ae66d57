"""A recipe of a whole job: its sections, checked all together before the first one runs."""

import argparse
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from perta_fast.checkpoints.adapters import is_adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.cli import eval, report, sweep, tune, unlearn
from perta_fast.cli.options import Command, Option, nearest
from perta_fast.cli.parser import parser_of
from perta_fast.cli.recipe_checks import check_settings
from perta_fast.cli.recipe_options import MAKE_NOTHING, arguments_from, options_of, required, with_shared
from perta_fast.data.rows import read_data
from perta_fast.errors import InputError
from perta_fast.files.hub import is_name, local_data
from perta_fast.files.identity import is_same, lies_in
from perta_fast.files.new_directory import SWEEP_STATE, has_record
from perta_fast.files.reading import exists
from perta_fast.records.recipe import Recipe, Setting, command_of
from perta_fast.records.recipe_record import settings_of_result, state_of_result
from perta_fast.resuming import is_unfinished
from perta_fast.subtraction.journal_directory import is_untouched
from perta_fast.sweeping.results import FILE_NAME, Sweep, record_beside

COMMANDS: dict[str, Command] = {module.COMMAND.name: module.COMMAND for module in (tune, sweep, unlearn, eval, report)}
# What sections make; the other paths are read.
OUTPUTS = {option.key for command in COMMANDS.values() for option in command.options if option.makes}
_DATA = ("forget", "retain", "holdout", "also", "prompts")
_CHECKPOINTS = ("model", "base", "tuned", "gold", "reference-model", "against")
_NO_DIFFERENCE = ("out", "overwrite", "quiet", "download")  # to what a section makes
_BESIDE = ("save-importance", "save-tuned", "checkpoint")  # directories that are made as a whole
_RESOLVED = frozenset({"batch-size", "max-length", "threads"})  # a record may have the value that was used instead

Value = str | bool | list[str]


@dataclass(frozen=True)
class Section:
    """One command of a job. name: the section's own. settings: as written, those that it shares among them."""

    name: str
    command: Command
    settings: Mapping[str, Setting]
    path: Path

    @property
    def where(self) -> str:
        """The file and the section, for messages."""
        return f"{self.path}, {self.name}"

    def parsed(self, *more: str) -> argparse.Namespace:
        """The options of the command. more: arguments beside the settings, of which ``overwrite`` is left out.

        Raises InputError for a bad setting.
        """
        settings = {key: setting for key, setting in self.settings.items() if key != "overwrite"}
        arguments = [*more, *arguments_from(self.command, settings, self.path)]
        parsed: argparse.Namespace = parser_of(self.command).parse_args(arguments)
        parsed.command, parsed.group = self.command, None
        return parsed

    def told(self) -> dict[str, Value]:
        """What decides on the result, by key."""
        return {
            key: list(setting.value) if isinstance(setting.value, tuple) else setting.value
            for key, setting in self.settings.items()
            if key not in _NO_DIFFERENCE and setting.value is not False
        }

    @property
    def overwrites(self) -> bool:
        """Whether it may replace what is there."""
        setting = self.settings.get("overwrite")
        return setting is not None and setting.value is True

    @property
    def changed(self) -> list[Path]:
        """The model, if it is changed where it lies."""
        setting = self.settings.get("in-place")
        return self._paths("model") if setting is not None and setting.value is True else []

    @property
    def in_place(self) -> bool:
        """Whether the model itself becomes the result; that of a sweep is its record."""
        return bool(self.changed) and self.command is unlearn.COMMAND

    @property
    def chooses(self) -> bool:
        """Whether a sweep comes first, whose record lies beside the result."""
        return self.command is unlearn.COMMAND and "choose" in self.settings

    @property
    def result(self) -> Path:
        """What the section is for: a file or a directory."""
        return self._paths("model" if self.in_place else "out")[0]

    def is_there(self) -> bool:
        """Whether there is something under the name of the result."""
        return _is_occupied(self.result)

    def is_unfinished(self) -> bool:
        """Whether it was stopped with work done that can go on."""
        return self._is_choosing() or self.result_is_unfinished()

    def result_is_unfinished(self) -> bool:
        """Whether the result itself is half made or half changed."""
        return is_unfinished(self.result) and not (self.in_place and is_untouched(self.result))

    def _is_choosing(self) -> bool:
        """Whether the sweep that comes first was stopped."""
        return self.chooses and has_record(record_beside(self.result), SWEEP_STATE)

    def state(self) -> str | None:
        """By what the result is known, as it is; None if it is not there."""
        return state_of_result(self.result)

    def has_no_choice(self) -> bool:
        """Whether it is a sweep that was to make something of its choice, and ended without one."""
        takes = self.command is sweep.COMMAND and (self.changed or "checkpoint" in self.settings)
        return bool(takes) and not Sweep.read(self.result / FILE_NAME).has_choice

    def differs_in(self) -> str | None:
        """The key of a setting of which the record of the result says another value; None if it says none."""
        noted, parsed = settings_of_result(self.result), vars(self.parsed())
        for key in self.told().keys() - _RESOLVED:
            value, found = parsed.get(key.replace("-", "_")), noted.get(key.replace("-", "_"))
            if isinstance(value, Path) and isinstance(found, str) and exists(value):
                value, found = os.path.realpath(value), os.path.realpath(found)
            elif not isinstance(value, int | float) or not isinstance(found, int | float):
                continue
            if value != found:
                return key
        return None

    def leftover(self) -> Path | None:
        """A directory that it would make beside the result, and that is there already."""
        beside = [path for key in _BESIDE for path in self._paths(key)]
        beside += [record_beside(self.result)] if self.chooses else []
        return next((path for path in beside if _is_occupied(path)), None)

    def made(self) -> list[Path]:
        """Everything that it writes."""
        keys = [key for key, option in options_of(self.command).items() if option.makes]
        beside = [record_beside(self.result)] if self.chooses else []
        return [path for key in keys for path in self._paths(key)] + beside + self.changed

    def read(self) -> Iterator[tuple[str, Path]]:
        """Every file and directory that it reads, with the key. Names of the hub are not among them."""
        for key, option in options_of(self.command).items():
            if option.type is Path and not option.makes:
                yield from ((key, path) for path in self._paths(key, option))

    def reads_rows(self, key: str) -> bool:
        """Whether what it reads there are rows of data."""
        is_data = key in _DATA or (key, self.command) == ("data", tune.COMMAND)
        return is_data and self.command is not report.COMMAND

    def _paths(self, key: str, option: Option | None = None) -> list[Path]:
        setting = self.settings.get(key)
        if setting is None or isinstance(setting.value, bool):
            return []
        values = setting.value if isinstance(setting.value, tuple) else (setting.value,)
        folder = self.path.parent
        return [folder / value for value in values if not (option and option.named and is_name(value, folder))]


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


def _is_occupied(path: Path) -> bool:
    return exists(path) and not (path.is_dir() and not any(path.iterdir()))


def _made_by(path: Path, section: Section) -> bool:
    return any(lies_in(path, made) for made in section.made())
