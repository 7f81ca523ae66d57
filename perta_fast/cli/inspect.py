"""``perta inspect``."""

import argparse
from pathlib import Path

from perta_fast.cli.importing import importing
from perta_fast.cli.options import JSON, Command, Option, Outcome, flag


def run(parsed: argparse.Namespace) -> Outcome:
    with importing():
        from perta_fast.runs.inspect import describe
        from perta_fast.runs.inspect_record import inspection

    how = {"every_tensor": parsed.tensors, "base": parsed.base, "progress": True}
    if parsed.json:
        return Outcome("", inspection(parsed.path, **how))
    return Outcome(describe(parsed.path, **how), {})


COMMAND = Command(
    "inspect",
    "what a checkpoint, importance or run holds",
    (
        Option("path", "a directory with weights, or one of their files", Path, "PATH", positional=True),
        flag("tensors", "list every tensor"),
        Option("base", "say whether PATH, as tuned, differs from this checkpoint", Path, "DIR"),
        JSON,
    ),
    run,
    prints=True,
)
