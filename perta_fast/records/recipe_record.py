"""What the sections of a recipe have made, kept beside it: a job that is run again goes on where it was stopped."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perta_fast.errors import InputError, shell_command
from perta_fast.files.durable import read_record, write_record
from perta_fast.files.hashing import hash_file
from perta_fast.files.own import check_own
from perta_fast.files.reading import exists, read_json
from perta_fast.records.typed_json import typed

_FORMAT, _FORMAT_VERSION = "perta-recipe", 2
# The record of a run, by which the directory that it has made is known.
_RECORDS = ("perta_report.json", "perta_tune.json", "sweep.json")


@dataclass(frozen=True)
class Made:
    """One section, begun or done.

    settings: what it was told. inputs: by key, what shows whether one has changed. before: ``state_of_result`` when it
    began. result: that when it was done; None if it is not.
    """

    settings: dict[str, Any]
    inputs: dict[str, Any]
    before: str | None
    result: str | None = None


class RecipeRecord:
    """The record of the recipe ``path``. made: its sections, by name."""

    def __init__(self, path: Path) -> None:
        """Raises InputError if there is a record that cannot be read."""
        self._path = path.with_name(f".{path.name}.perta-recipe")
        self.made: dict[str, Made] = {}
        check_own(self._path, directory=False)
        if exists(self._path):
            self.made = self._read()

    def _read(self) -> dict[str, Made]:
        content = read_record(self._path)
        advice = f"remove it to go on without it: {shell_command('rm', self._path)}"
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise InputError(f"{self._path}: is not the record of a recipe; {advice}")
        if content.pop("format_version", None) != _FORMAT_VERSION:
            raise InputError(f"{self._path}: was written by another version of perta_fast; {advice}")
        try:
            made: dict[str, Made] = typed(content.get("made"), dict[str, Made])
        except InputError as error:
            raise InputError(f"{self._path}: is damaged ({error}); {advice}") from error
        return made

    def keep(self, name: str, made: Made) -> None:
        """Write down how far a section has come."""
        self.made[name] = made
        content = {key: asdict(section) for key, section in self.made.items()}
        write_record(self._path, {"format": _FORMAT, "format_version": _FORMAT_VERSION, "made": content})


def state_of_result(result: Path) -> str | None:
    """The hash of a file, or of the record of the run that made a directory; None if there is neither."""
    path = _recorded(result)
    return None if path is None else hash_file(path)


def settings_of_result(result: Path) -> dict[str, Any]:
    """What the record of a result says of the run that made it, by the names of arguments; paths of data by role.

    Empty for a result whose record says nothing of it. Raises InputError if there is a record that cannot be read.
    """
    path = _recorded(result)
    content = None if path is None or path.suffix != ".json" else read_json(path)
    if not isinstance(content, dict):
        return {}
    found = {key: content[key] for key in ("model", "base") if key in content}
    for part in (content.get("settings"), content.get("recipe")):
        found |= {key.replace("-", "_"): value for key, value in part.items()} if isinstance(part, dict) else {}
    data = content.get("data")
    records = data if isinstance(data, dict) else {}
    if "path" in records:  # of a tuning
        records = {str(content.get("role")): records, "retain": content.get("retain")}
    return found | {
        role: record["path"] for role, record in records.items() if isinstance(record, dict) and "path" in record
    }


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key whose values differ."""
    return next((key for key in [*now, *before] if before.get(key) != now.get(key)), None)


def _recorded(result: Path) -> Path | None:
    """The file by which a result is known."""
    paths = [result / name for name in _RECORDS] if result.is_dir() else [result]
    return next((path for path in paths if exists(path) and not path.is_dir()), None)
