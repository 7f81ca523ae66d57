"""``perta help``, which is ``--help`` in other words."""

import argparse

from perta_fast.cli.command import Command, Option


def run(parsed: argparse.Namespace) -> int:
    parsed.parser.parse_args([*parsed.topic, "--help"])  # this ends the process
    return 0


COMMAND = Command(
    "help",
    "what a command does, and its options",
    (Option("topic", "a command, such as unlearn, or recipe init", metavar="COMMAND", positional=True, several=True),),
    run,
    prints=True,
)
