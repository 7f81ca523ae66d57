"""Recipes: the settings of one run or of a whole job in one file, written in YAML or kept in the report of a run."""

import os
import re
import reprlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from perta_fast.errors import InputError
from perta_fast.files.reading import decode, regular_file
from perta_fast.records.report import Report

# A second run must not replace the first, and may find other files beside its model.
_NOT_REPEATED = (
    *("out", "in-place", "overwrite", "leave-others"),
    *("save-importance", "as", "importance-dtype", "save-tuned"),
)
SECTIONS = ("tune", "sweep", "unlearn", "eval", "report")  # the commands that a job can have
# A section's name: its command, and a word of its own if there are several of that command.
_SECTION = re.compile(rf"({'|'.join(SECTIONS)})(?: [\w.-]+)?")
LISTS = ("also", "forget-importance", "retain-importance", "importance", "sweep", "eval")  # keys with several values
_LONGEST = 1 << 16  # bytes of YAML
_TAG = "tag:yaml.org,2002:"
_SCALARS = [_TAG + kind for kind in ("str", "int", "float", "bool", "null", "timestamp")]


@dataclass(frozen=True)
class Setting:
    """The value of one option: True or False, or a text as on the command line, or several of these.

    where: the file and the line.
    """

    value: str | bool | tuple[str, ...]
    where: str


@dataclass(frozen=True)
class Recipe:
    """What a recipe says. settings: of the one run; or, of a job, those that its sections share.

    sections: of a job, by name, in the order of the file; none for one run. See ``command_of``.
    """

    settings: dict[str, Setting]
    sections: dict[str, dict[str, Setting]]


def command_of(section: str) -> str | None:
    """The command of the section of this name, ``eval`` of ``eval gold``; None for what names no section."""
    found = _SECTION.fullmatch(section)
    return None if found is None else found[1]


def read_recipe(path: Path) -> Recipe:
    """A recipe; keys without a value are left out.

    path: a YAML file of keys and values, in sections or not, or the report of a run (``.json``). From a report, the
    destinations of the run are left out, and after a run in place also the model, which has changed. Raises InputError,
    naming the line, for anything else. ``cli.recipe_options`` checks the keys.
    """
    return Recipe(_from_report(path), {}) if path.suffix == ".json" else _from_yaml(path)


def _from_report(path: Path) -> dict[str, Setting]:
    report = Report.read(path)
    if not report.recipe:
        raise InputError(f"{path}: holds no recipe; only reports of perta unlearn do")
    changed = report.recipe.get("model") if report.in_place else None
    where = f"{path}, recipe"
    return {
        key: Setting(value if isinstance(value, bool) else _possible(str(value), f"{where}: {key}"), where)
        for key, value in report.recipe.items()
        if key not in _NOT_REPEATED and value != changed
    }


def _from_yaml(path: Path) -> Recipe:
    root = _compose(path)
    inside = {}
    for name, where, node in _entries(root, path):
        command = command_of(name)
        if command is None:
            continue
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"{where}: {name} must hold the options of perta {command}, each on a line of its own")
        inside[name] = node
    return Recipe(_settings(root, path, set(inside)), {name: _settings(node, path) for name, node in inside.items()})


def _compose(path: Path) -> yaml.MappingNode:
    text = _read_text(path)
    try:
        root = yaml.compose(text, yaml.SafeLoader)  # nodes with line numbers; no Python object is made
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else path
        reason = ": ".join(filter(None, (error.context, error.problem)))
        if "alias" in reason:  # for YAML, * at the beginning of a value is a reference
            reason += "; write a value that begins with * in quotes"
        raise InputError(f"{where}: is not YAML: {reason}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{path}, line {line}: holds a character that YAML has no place for") from error
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path}: is not YAML: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: is nested too deeply to be a recipe") from error
    if root is None:
        raise InputError(f"{path}: is empty; perta recipe init writes a template")
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{path}, line {_line(root)}: must hold lines such as lam: 1.0")
    return root


def _settings(root: yaml.MappingNode, path: Path, without: Container[str] = ()) -> dict[str, Setting]:
    """The settings below one node."""
    settings: dict[str, Setting] = {}
    for key, where, node in _entries(root, path):
        if key in without:
            continue
        name = f"{where}: {reprlib.repr(key)}"
        if key in LISTS and isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            settings[key] = Setting(tuple(_scalar(entry, f"{name}: an entry") for entry in node.value), where)
            continue
        value = _scalar(node, name)
        if node.tag == _TAG + "bool":
            settings[key] = Setting(yaml.SafeLoader.bool_values.get(value.lower(), value), where)
        elif node.tag != _TAG + "null":
            settings[key] = Setting(value, where)
    return settings


def _entries(root: yaml.MappingNode, path: Path) -> Iterator[tuple[str, str, yaml.Node]]:
    """Each key with its file and line, and what it stands for. Raises InputError for a key that comes again."""
    seen: dict[str, int] = {}
    for key_node, node in root.value:
        where = f"{path}, line {_line(key_node)}"
        key = _scalar(key_node, f"{where}: a key")
        if key in seen:
            raise InputError(f"{where}: {reprlib.repr(key)} stands in line {seen[key]} already")
        seen[key] = _line(key_node)
        yield key, where, node


def _read_text(path: Path) -> str:
    try:
        with open(path, "rb", opener=regular_file) as file:
            content = file.read(_LONGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error
    if len(content) > _LONGEST:
        raise InputError(f"{path}: is longer than 64 KiB; is this a recipe?")
    return decode(content, path)


def _scalar(node: yaml.Node, name: str) -> str:
    """The text of a single value, without quotes and escapes."""
    if not isinstance(node, yaml.ScalarNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a table"
        raise InputError(f"{name} must be a single value, not {kind}")
    if node.tag not in _SCALARS:
        raise InputError(f"{name} must be a plain value, not one of type {node.tag.removeprefix(_TAG)!r}")
    return _possible(node.value, name)


def _possible(text: str, name: str) -> str:
    """``text``, if it can be an argument of a command."""
    try:
        if b"\0" not in os.fsencode(text):
            return text
    except UnicodeEncodeError:
        pass
    raise InputError(f"{name} holds a character that no name or number can have")


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line + 1
    return line
