"""``perta inspect``."""

import argparse
from pathlib import Path

from perta_fast.cli.command import Command, Option, Outcome, flag
from perta_fast.cli.importing import importing
from perta_fast.cli.options import JSON


def run(parsed: argparse.Namespace) -> Outcome:
    with importing():
        from perta_fast.runs.inspect import inspect

    found = inspect(parsed.path, every_tensor=parsed.tensors, base=parsed.base, progress=True)
    return Outcome("" if parsed.json else found.text(), found.record)


COMMAND = Command(
    "inspect",
    "what a checkpoint, importance or run holds",
    (
        Option("path", "a directory with weights", Path, "PATH", positional=True),
        flag("tensors", "list every tensor"),
        Option("base", "say whether PATH, as tuned, differs from this checkpoint", Path, "DIR"),
        JSON,
    ),
    run,
    prints=True,
)
