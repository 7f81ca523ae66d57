"""The parser of the command line: options in full, errors of one line that say what was meant."""

import argparse
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence, Set
from typing import Any, NoReturn

from perta_fast.cli.command import Command, add_options, nearest
from perta_fast.cli.recipe_options import RECIPE, arguments_from, settings_for

_DESCRIPTION = "Make a language model forget what it was tuned on, by arithmetic on its weights."
_FIRST_STEPS = "New here? perta demo shows the whole job; tune, unlearn, verify and report are its steps."
_REQUIRED = "the following arguments are required: "  # as argparse begins its messages
_ONE_REQUIRED = "one of the arguments "
# What other commands or programs call an option, and ours: the first that the command has.
_ELSEWHERE = {
    "--model": ("--base",),
    "--adapter": ("--tuned",),
    "--dataset": ("--data", "--forget"),
    "--output-dir": ("--out",),
    "--learning-rate": ("--lr",),
    "--lambda": ("--lam", "--lams"),
}
_EVERYWHERE = ("-h", "--help", "-v", "--verbose")


class _OneLine(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """End with that line, and status 2."""
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help)\n")


class CommandParser(_OneLine):
    """A parser of one command, which reads the file named by ``--recipe`` before it requires other options.

    Its options are declared when it parses: the help of all commands needs those of none.
    parts: the parsers of the commands below it. of_paths: what takes a path, once the options are declared.
    """

    def __init__(self, *, command: Command, verbose: Any = argparse.SUPPRESS, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self.command = command
        self.known = {*_EVERYWHERE, *(spelling for option in command.options for spelling in option.spellings)}
        self.add_argument(
            "-v", "--verbose", action="store_true", default=verbose, help="log each phase on standard error"
        )
        self.parts: list[CommandParser] = []
        self.of_paths: list[argparse.Action] = []
        self.words: set[str] = set()
        self._is_declared = False

    def declare(self) -> None:
        """Declare the options, if that has not been done."""
        if not self._is_declared:
            self.of_paths = add_options(self, self.command.options)
            self._is_declared = True

    def error(self, message: str) -> NoReturn:
        """End with one line; all that is missing is named in it, also where one of several options would do."""
        if message.startswith(_ONE_REQUIRED):
            message = f"{_REQUIRED}{', '.join(self._missing_choices())}"
        elif message.startswith(_REQUIRED):
            message = ", ".join([message, *self._missing_choices()])
        super().error(message)

    def _missing_choices(self) -> list[str]:
        options = self.command.options
        needed = dict.fromkeys(option.one_of for option in options if option.required and option.one_of)
        choices = [[option.typed for option in options if option.one_of == word] for word in needed]
        return [" or ".join(typed) for typed in choices if self.words.isdisjoint(typed)]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Like argparse's own, with the arguments of a recipe before ``args``. Raises InputError for a bad recipe."""
        self.declare()
        args = sys.argv[1:] if args is None else list(args)
        self._check_words(args)
        if RECIPE in self.command.options:
            given = given_options(self.command, args)
            path = given.pop("recipe", None)
            if path is not None and "help" not in given:
                args = [*arguments_from(self.command, settings_for(self.command, path), path, given), *args]
        self.words = {argument.partition("=")[0] for argument in args}
        parsed, others = super().parse_known_args(args, namespace)
        if others:
            self.error(f"there is no place for {' '.join(others)}")
        if "arguments" not in parsed:  # those of a command below are there already, with its recipe's
            parsed.arguments = args
        return parsed, others

    def _check_words(self, args: Sequence[str]) -> None:
        """End with an error for an option or a command that there is not."""
        commands = [part.name for part in self.command.parts]
        for argument in args:
            name = argument.partition("=")[0]
            if argument == "--" or (commands and not argument.startswith("-")):
                break
            if name.startswith("--") and name not in self.known and " " not in argument:
                self.error(f"there is no option {name}{_meant_option(name, self.known)}")
        word = next((argument for argument in args if not argument.startswith("-")), None)
        if commands and word is not None and word not in commands:
            near = nearest(word, commands)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(commands)}"
            self.error(f"there is no command {word!r}; {hint}")


class _Version(argparse.Action):
    """Shows the version, which is looked up only then: that takes a third of the time of the help."""

    def __call__(self, parser: ArgumentParser, *_: Any) -> NoReturn:
        from perta_fast.records.versions import this_version

        print(f"perta {this_version() or '(not installed)'}")
        parser.exit()


def _meant_option(name: str, options: Set[str]) -> str:
    """What may have been meant by an option that there is not."""
    longer = sorted(option for option in options if option.startswith(name))
    if longer:
        return f"; options are written in full: {' or '.join(longer)}"
    ours = [option for option in _ELSEWHERE.get(name.replace("_", "-"), ()) if option in options]
    near = ours[0] if ours else nearest(name, sorted(options))
    return f"; did you mean {near}?" if near else ""


def given_options(command: Command, arguments: Iterable[str]) -> dict[str, Any]:
    """The options of ``arguments`` alone, by name: those that are left out have no default here."""
    bare = _OneLine(f"perta {command.name}", add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    bare.add_argument("-h", "--help", action="store_true")
    add_options(bare, command.options, bare=True)
    return vars(bare.parse_known_args(list(arguments))[0])


def parser_of(command: Command) -> CommandParser:
    """The parser of one command alone."""
    return CommandParser(prog=f"perta {command.name}", command=command)


def whole_parser(commands: Sequence[Command]) -> CommandParser:
    """The parser of ``perta`` with all its commands; what it parses has the one that was given, as ``command``."""
    top = Command("perta", _DESCRIPTION, parts=tuple(commands))
    parser = CommandParser(prog=top.name, description=top.help, epilog=_FIRST_STEPS, command=top, verbose=False)
    parser.known.add("--version")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    _add_commands(parser, commands, "COMMAND")
    return parser


def _add_commands(parser: CommandParser, commands: Iterable[Command], metavar: str) -> None:
    subparsers = parser.add_subparsers(required=True, metavar=metavar)
    for command in commands:
        described = f"{command.help[0].upper()}{command.help[1:]}."
        subparser = subparsers.add_parser(command.name, help=command.help, description=described, command=command)
        subparser.set_defaults(command=command)
        if command.parts:
            _add_commands(subparser, command.parts, "|".join(part.name for part in command.parts))
        parser.parts.append(subparser)
