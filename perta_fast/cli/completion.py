"""``perta completion``: a script by which a shell completes commands and options."""

import argparse

from perta_fast.cli.command import Command, Option
from perta_fast.cli.parser import CommandParser
from perta_fast.errors import InputError


def run(parsed: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError as error:
        raise InputError("shtab is not installed: pip install 'perta-fast[completion]'") from error
    _complete_paths(parsed.parser, shtab.FILE)
    print(shtab.complete(parsed.parser, shell=parsed.shell))
    return 0


def _complete_paths(parser: CommandParser, completed: object) -> None:
    """Mark what takes a path, in the commands below ``parser`` too."""
    parser.declare()
    for action in parser.of_paths:
        action.complete = completed  # type: ignore[attr-defined]  # read by shtab
    for part in parser.parts:
        _complete_paths(part, completed)


COMMAND = Command(
    "completion",
    "a script that lets the shell complete commands and options",
    (Option("shell", "the shell", choices=("bash", "zsh", "fish"), positional=True),),
    run,
    prints=True,
)
