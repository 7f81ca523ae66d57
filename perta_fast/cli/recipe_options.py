"""``--recipe``: options from a file, with the keys, types and choices of the command's own options."""

import argparse
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.cli.command import Command, Option, nearest
from perta_fast.cli.options import JSON
from perta_fast.errors import InputError

if TYPE_CHECKING:
    from perta_fast.records.recipe import Setting

RECIPE = Option(
    "recipe", "take options from this YAML file, or from the report of a run; those given here come first", Path, "FILE"
)
MAKE_NOTHING = ("dry-run", "show-labels")  # with these a command only prints
# A shared setting that a section takes only beside another one: tune reads retained rows for this alone.
_ONLY_BESIDE = {("tune", "retain"): "retain-kl"}
_EXPECTED: dict[Any, str] = {int: "a whole number", float: "a number", Path: "a path", str: "a text"}


def options_of(command: Command) -> dict[str, Option]:
    """The options that a recipe can have, by key."""
    return {option.key: option for option in command.options if option not in (RECIPE, JSON)}


def alternatives(command: Command) -> list[list[str]]:
    """The keys of each set of options that exclude each other."""
    sets: dict[str, list[str]] = {}
    for option in command.options:
        if option.one_of:
            sets.setdefault(option.one_of, []).append(option.key)
    return list(sets.values())


def settings_for(command: Command, path: Path) -> dict[str, "Setting"]:
    """What the recipe ``path`` says of ``command``: of a job its section, with what the sections share.

    Raises InputError if it cannot be read, or is a job without such a section.
    """
    from perta_fast.records.recipe import read_recipe

    recipe = read_recipe(path)
    if not recipe.sections:
        return recipe.settings
    if command.name not in recipe.sections:
        raise InputError(f"{path}: has no section {command.name}; its sections are {', '.join(recipe.sections)}")
    return with_shared(command, recipe.settings, recipe.sections[command.name])


def with_shared(
    command: Command, shared: Mapping[str, "Setting"], own: Mapping[str, "Setting"]
) -> dict[str, "Setting"]:
    """The settings of one section: its own, and those of the shared ones that it knows and does not replace."""
    known = options_of(command)
    replaced = set(own).union(*(group for group in alternatives(command) if not own.keys().isdisjoint(group)))
    taken = {key: setting for key, setting in shared.items() if key in known and key not in replaced} | dict(own)
    alone = {key for key in taken if _ONLY_BESIDE.get((command.name, key), key) not in taken and key not in own}
    return {key: setting for key, setting in taken.items() if key not in alone}


def required(command: Command) -> list[list[str]]:
    """The keys that a whole run needs, one of each list."""
    needed = {key: option for key, option in options_of(command).items() if option.required}
    single = [[key] for key, option in needed.items() if not option.one_of]
    kept = [] if "out" in needed else [["out"]]  # without it there would be nothing to go on with
    return single + [keys for keys in alternatives(command) if keys[0] in needed] + kept


def arguments_from(
    command: Command, settings: Mapping[str, "Setting"], path: Path, given: Collection[str] = ()
) -> list[str]:
    """The settings of the recipe ``path`` as arguments of a command line, all of them checked.

    given: names that the command line itself sets; these and their alternatives are left out. Relative paths begin at
    the recipe's directory. Raises InputError naming file, line and key.
    """
    options = options_of(command)
    arguments: dict[str, list[str]] = {}
    for key, setting in settings.items():
        if key not in options:
            near = nearest(key, options)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(list(options)[:12])}, … (--help)"
            raise InputError(f"{setting.where}: {reprlib.repr(key)} is no option of perta {command.name}; {hint}")
        arguments[key] = _arguments(options[key], setting, path.parent)
    left_out = {key for key, option in options.items() if option.name in given}
    for group in alternatives(command):
        chosen = [key for key in group if arguments.get(key)]
        if len(chosen) > 1:
            raise InputError(f"{settings[chosen[-1]].where}: {chosen[-1]} cannot stand beside {chosen[0]}")
        if left_out.intersection(group):
            left_out.update(group)
    chosen = [key for key in arguments if key not in left_out]
    positional = [argument for key in chosen if options[key].positional for argument in arguments[key]]
    named = [argument for key in chosen if not options[key].positional for argument in arguments[key]]
    return [*named, "--", *positional] if positional else named


def _arguments(option: Option, setting: "Setting", folder: Path) -> list[str]:
    """The arguments of one option; none for a flag that is not set."""
    key, value, where = option.key, setting.value, setting.where
    if isinstance(value, tuple) and not option.several:
        raise InputError(f"{where}: {key!r} must be a single value, not a list")
    if option.type is bool:
        if not isinstance(value, bool):
            raise InputError(f"{where}: {key} is {reprlib.repr(value)}; it must be true or false")
        return [f"--{key}"] if value else [f"--no-{key}"] if option.negatable else []
    start = "" if option.positional else f"--{key}="
    several = value if isinstance(value, tuple) else (value,)
    return [f"{start}{argument_text(option, one, where, folder)}" for one in several]


def argument_text(option: Option, value: str | bool, where: str, folder: Path) -> str:
    """A value as on the command line; paths begin at ``folder``."""
    key = option.key
    expected = _EXPECTED.get(option.type, f"a value for --{key}")
    if option.choices is not None:
        expected = f"one of {', '.join(option.choices)}"
    refusal = f"{where}: {key} is {reprlib.repr(value)}; it must be {expected}"
    if isinstance(value, bool):
        raise InputError(f"{refusal}; write it in quotes if it is a name")
    if not value and not option.may_be_empty:
        raise InputError(refusal)
    if option.type is Path and _is_place(option, value, folder):
        value = str(folder / value)
    try:
        converted = option.type(value)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{where}: {key}: {error}") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(refusal) from error
    if option.choices is not None and converted not in option.choices:
        raise InputError(refusal)
    return value


def _is_place(option: Option, value: str, folder: Path) -> bool:
    """Whether ``value`` is a path, and neither a name of the hub nor what stands for rows of Python."""
    from perta_fast.data.given import is_given
    from perta_fast.files.hub import is_name

    return not is_given(value) and not (option.named and is_name(value, folder))
