"""``perta resume``."""

import argparse
from pathlib import Path

from perta_fast.cli.command import Command, Option, Outcome, made
from perta_fast.cli.importing import importing
from perta_fast.cli.options import JSON, QUIET


def run(parsed: argparse.Namespace) -> Outcome:
    with importing():
        from perta_fast.resuming import resume

    result = resume(parsed.path, progress=not parsed.quiet, group=parsed.group)
    return made(result.as_record(), result.summary(), parsed.path)


COMMAND = Command(
    "resume",
    "finish an interrupted run",
    (Option("path", "its --out, or the model it changes in place", Path, "DIR", positional=True), QUIET, JSON),
    run,
    over_ranks=True,
)
