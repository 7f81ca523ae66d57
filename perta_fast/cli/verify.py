"""``perta verify``."""

import argparse
from dataclasses import asdict
from pathlib import Path

from perta_fast.cli.command import Command, Option, Outcome, flag
from perta_fast.cli.importing import importing
from perta_fast.cli.options import JSON


def run(parsed: argparse.Namespace) -> Outcome:
    with importing():
        from perta_fast.runs.verify import verify

    result = verify(parsed.path, full=parsed.full, progress=not parsed.quiet)
    return Outcome(result.summary(), asdict(result), status=1 if result.problems else 0)


COMMAND = Command(
    "verify",
    "recompute the hashes of a run, and its tensors by the reference",
    (
        Option("path", "output directory of a run", Path, "DIR", positional=True),
        flag("full", "recompute every tensor, not a sample"),
        flag("quiet", "no progress bar"),
        JSON,
    ),
    run,
    prints=True,
)
