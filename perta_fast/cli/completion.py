"""``perta completion``: a script by which a shell completes commands and options."""

import argparse

from perta_fast.cli.options import Command, Option
from perta_fast.errors import InputError


def run(parsed: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError as error:
        raise InputError("shtab is not installed: pip install 'perta-fast[completion]'") from error
    for action in parsed.parser.of_paths:
        action.complete = shtab.FILE
    print(shtab.complete(parsed.parser, shell=parsed.shell))
    return 0


COMMAND = Command(
    "completion",
    "a script that lets the shell complete commands and options",
    (Option("shell", "the shell", choices=("bash", "zsh", "fish"), positional=True),),
    run,
    prints=True,
)
