"""A command and its options: declared once, as tables.

The parser, the keys of a recipe, the arguments of the Python functions and the page docs/command-line.md are made from
these.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perta_fast.cli.option_groups import GROUP_OF, LONG, TITLES
from perta_fast.errors import printable


@dataclass(frozen=True)
class Option:
    """One option, or positional argument, of a command.

    name: of the argument of the Python function, ``batch_size`` for ``--batch-size``. type: makes the value from a
    text; bool makes a flag. negatable: a flag that also has a form ``--no-``. several: takes one or more values; if
    positional, any number.
    joined: given again, its lists are joined. spelled: on the command line, if not as the argument. one_of: at most one
    of the options with the same word can be given, and exactly one if they are required. named: a path, or a name of
    the Hugging Face hub. makes: a path, of what the command makes. may_be_empty: whether an empty text is a value in a
    recipe.
    """

    name: str
    help: str | None = None
    type: Callable[[str], Any] = str
    metavar: str | None = None
    default: Any = None
    choices: tuple[str, ...] | None = None
    required: bool = False
    positional: bool = False
    negatable: bool = False
    several: bool = False
    joined: bool = False
    one_of: str = ""
    may_be_empty: bool = False
    named: bool = False
    makes: bool = False
    spelled: str = ""

    @property
    def key(self) -> str:
        """The name on the command line and in a recipe."""
        return self.spelled or self.name.replace("_", "-")

    @property
    def typed(self) -> str:
        """What a message calls it."""
        return self.metavar or self.name if self.positional else f"--{self.key}"

    @property
    def spellings(self) -> tuple[str, ...]:
        """All ways to write the option; none for a positional argument."""
        if self.positional:
            return ()
        return (f"--{self.key}", f"--no-{self.key}") if self.negatable else (f"--{self.key}",)

    def add_to(self, target: Any, *, bare: bool = False) -> argparse.Action:
        """Declare the option to a parser or a group; return what this makes. bare: not required, without default."""
        name = self.name if self.positional else f"--{self.key}"
        settings: dict[str, Any] = {"help": self.help, "default": argparse.SUPPRESS if bare else self.default}
        settings |= {} if self.positional else {"dest": self.name}
        if self.type is bool:
            settings["action"] = argparse.BooleanOptionalAction if self.negatable else "store_true"
        else:
            made_by = _path if self.type is Path else self.type
            settings |= {"type": made_by, "metavar": self.metavar, "choices": self.choices}
        if self.several and self.positional:
            settings["nargs"] = "*"
        elif self.several:
            settings |= {"nargs": "+", "action": "extend"}
        elif self.joined:
            settings["action"] = "extend"
        if self.required and not self.one_of and not bare:
            settings["required"] = True
        action: argparse.Action = target.add_argument(name, **settings)
        return action


def flag(name: str, help: str, one_of: str = "", required: bool = False) -> Option:
    """An option without a value."""
    return Option(name, help, bool, default=False, one_of=one_of, required=required)


@dataclass(frozen=True)
class Outcome:
    """What a command has done.

    text: for a person. record: for a program, as it is written to disk where it is written. status: exit status.
    """

    text: str
    record: Mapping[str, Any]
    status: int = 0


@dataclass(frozen=True)
class Command:
    """A command: one line of help, its options, and the function that runs it, or the commands below it.

    run: returns the exit status, or an ``Outcome``, which is printed as text or, with JSON among the options and given,
    as JSON. over_ranks: whether torchrun may start it as several processes. prints: whether what it prints is its
    result.
    """

    name: str
    help: str
    options: tuple[Option, ...] = ()
    run: Callable[[argparse.Namespace], int | Outcome] | None = None
    over_ranks: bool = False
    prints: bool = False
    parts: tuple["Command", ...] = ()

    def spellings(self) -> dict[str, str]:
        """What messages call the arguments of its Python function."""
        return {option.name: option.typed for option in self.options}


def add_options(
    parser: argparse.ArgumentParser, options: Iterable[Option], *, bare: bool = False
) -> list[argparse.Action]:
    """Declare ``options`` to ``parser``; see ``Option.add_to``. Returns what takes a path."""
    options = tuple(options)
    grouped = len(options) >= LONG and not bare
    shown = {title: parser.add_argument_group(title) for title in TITLES} if grouped else {}
    groups: dict[str, Any] = {}
    of_paths = []
    for option in options:
        place = shown.get(GROUP_OF.get(option.name, ""), parser)
        if option.one_of and option.one_of not in groups:
            groups[option.one_of] = place.add_mutually_exclusive_group(required=option.required and not bare)
        action = option.add_to(groups.get(option.one_of, place), bare=bare)
        if option.type is Path:
            of_paths.append(action)
    return of_paths


def made(record: Mapping[str, Any], summary: str, out: Path | None) -> Outcome:
    """The outcome of a command that has made ``out``. summary: lines that are printable."""
    return Outcome(summary if out is None else f"{summary}\n{printable(f'written to {out}')}", record)


def nearest(word: str, words: Iterable[str]) -> str:
    """The one of ``words`` that was probably meant by ``word``; "" if none is near."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, list(words), n=1)), "")


def _path(text: str) -> Path:
    if not text:  # of a variable that is not set; to Python it would be the working directory
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)
