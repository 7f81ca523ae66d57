"""``perta inspect``."""

import argparse
from pathlib import Path

from perta_fast.cli.importing import importing
from perta_fast.cli.options import Command, Option, flag


def run(parsed: argparse.Namespace) -> int:
    with importing():
        from perta_fast.runs.inspect import describe

    print(describe(parsed.path, every_tensor=parsed.tensors, base=parsed.base, progress=True))
    return 0


COMMAND = Command(
    "inspect",
    "what a checkpoint, importance or run holds",
    (
        Option("path", type=Path, metavar="PATH", positional=True),
        flag("tensors", "list every tensor"),
        Option("base", "say whether PATH, as tuned, differs from this checkpoint", Path, "DIR"),
    ),
    run,
    prints=True,
)
