"""One section of a recipe: the command that it stands for, its settings, and what they make and read."""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from perta_fast.cli import report, tune, unlearn
from perta_fast.cli.command import Command, Option
from perta_fast.cli.parser import parser_of
from perta_fast.cli.recipe_options import arguments_from, options_of
from perta_fast.files.hub import is_name
from perta_fast.records.recipe import Setting
from perta_fast.sweeping.results import record_beside

_DATA = ("forget", "retain", "holdout", "also", "prompts")
_NO_DIFFERENCE = ("out", "overwrite", "quiet", "download")  # to what a section makes
_BESIDE = ("save-importance", "save-tuned", "checkpoint")  # directories that are made as a whole

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

    @property
    def beside(self) -> list[Path]:
        """The directories that it makes as a whole beside the result."""
        return [path for key in _BESIDE for path in self._paths(key)] + self._record

    def made(self) -> list[Path]:
        """Everything that it writes."""
        keys = [key for key, option in options_of(self.command).items() if option.makes]
        return [path for key in keys for path in self._paths(key)] + self._record + self.changed

    def read(self) -> Iterator[tuple[str, Path]]:
        """Every file and directory that it reads, with the key. Names of the hub are not among them."""
        for key, option in options_of(self.command).items():
            if option.type is Path and not option.makes:
                yield from ((key, path) for path in self._paths(key, option))

    def reads_rows(self, key: str) -> bool:
        """Whether what it reads there are rows of data."""
        is_data = key in _DATA or (key, self.command) == ("data", tune.COMMAND)
        return is_data and self.command is not report.COMMAND

    @property
    def _record(self) -> list[Path]:
        """The record of the sweep that comes first."""
        return [record_beside(self.result)] if self.chooses else []

    def _paths(self, key: str, option: Option | None = None) -> list[Path]:
        setting = self.settings.get(key)
        if setting is None or isinstance(setting.value, bool):
            return []
        values = setting.value if isinstance(setting.value, tuple) else (setting.value,)
        folder = self.path.parent
        return [folder / value for value in values if not (option and option.named and is_name(value, folder))]
