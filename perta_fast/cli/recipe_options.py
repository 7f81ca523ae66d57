"""``--recipe``: options from a file, whose keys, types and choices are those of the command's own parser."""

import argparse
import copy
import difflib
import reprlib
from argparse import Action, ArgumentParser
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.errors import InputError

if TYPE_CHECKING:
    from perta_fast.records.recipe import Setting

_EXPECTED: dict[Any, str] = {int: "a whole number", float: "a number", Path: "a path", None: "a text"}


def add_recipe(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="take options from this YAML file, or from the report of a run; those given here come first",
    )


class RecipeParser(ArgumentParser):
    """A parser that reads the file named by ``--recipe``, if it has that option, before it requires others."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's own; what the recipe says stands before ``args``. Raises InputError for the file."""
        if any(argument.startswith("--rec") for argument in args or ()):  # any shorter form is ambiguous
            given = self._given(args)
            path = given.pop("recipe", None)
            if path is not None:
                from perta_fast.records.recipe import read_recipe

                args = [*arguments_from(self, read_recipe(path), path, given), *args]
        return super().parse_known_args(args, namespace)

    def _given(self, args: Collection[str]) -> dict[str, Any]:
        """What ``args`` itself says, by destination: no defaults, and nothing is required."""
        lenient = copy.deepcopy(self)
        for action in lenient._actions:
            action.required, action.default = False, argparse.SUPPRESS
        for group in lenient._mutually_exclusive_groups:
            group.required = False
        found, _ = ArgumentParser.parse_known_args(lenient, list(args))
        return vars(found)


def options_of(parser: ArgumentParser) -> dict[str, Action]:
    """The options that a recipe can have, by key."""
    return {
        action.option_strings[0].removeprefix("--"): action
        for action in parser._actions
        if action.dest not in ("help", "recipe")
    }


def alternatives(parser: ArgumentParser) -> list[list[str]]:
    """The keys of each group of options of which a run can have only one."""
    options = options_of(parser)
    return [
        [key for key, action in options.items() if action in group._group_actions]
        for group in parser._mutually_exclusive_groups
    ]


def arguments_from(
    parser: ArgumentParser, settings: Mapping[str, "Setting"], path: Path, given: Collection[str] = ()
) -> list[str]:
    """The settings of the recipe ``path`` as arguments of a command line, all of them checked.

    given: destinations that the command line itself sets, which leaves out those and their alternatives.
    Relative paths begin at the recipe's directory. Raises InputError naming file, line and key.
    """
    options = options_of(parser)
    arguments = {}
    for key, setting in settings.items():
        if key not in options:
            near = difflib.get_close_matches(key, options, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(options)}"
            raise InputError(f"{setting.where}: {reprlib.repr(key)} is no option of {parser.prog}; {hint}")
        arguments[key] = _argument(key, options[key], setting, path.parent)
    left_out = {key for key, action in options.items() if action.dest in given}
    for group in alternatives(parser):
        chosen = [key for key in group if arguments.get(key)]
        if len(chosen) > 1:
            raise InputError(f"{settings[chosen[-1]].where}: {chosen[-1]} cannot stand beside {chosen[0]}")
        if left_out.intersection(group):
            left_out.update(group)
    return [argument for key, argument in arguments.items() if argument and key not in left_out]


def _argument(key: str, action: Action, setting: "Setting", folder: Path) -> str:
    """One argument; empty for a flag that is not set."""
    value, where = setting.value, setting.where
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"{where}: {key} is {reprlib.repr(value)}; it must be true or false")
        off = action.option_strings[1] if isinstance(action, argparse.BooleanOptionalAction) else ""
        return action.option_strings[0] if value else off
    expected = _EXPECTED.get(action.type, f"a value for --{key}")
    if action.choices is not None:
        expected = f"one of {', '.join(map(str, action.choices))}"
    refusal = f"{where}: {key} is {reprlib.repr(value)}; it must be {expected}"
    if isinstance(value, bool):
        raise InputError(f"{refusal}; write it in quotes if it is a name")
    if not value:
        raise InputError(refusal)
    if action.type is Path:
        value = str(folder / value)
    try:
        converted = action.type(value) if callable(action.type) else value
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{where}: {key}: {error}") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(refusal) from error
    if action.choices is not None and converted not in action.choices:
        raise InputError(refusal)
    return f"--{key}={value}"
