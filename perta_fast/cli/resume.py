"""``perta resume``."""

import argparse
from pathlib import Path

from perta_fast.cli.importing import importing
from perta_fast.cli.options import QUIET, Command, Option, finish


def run(parsed: argparse.Namespace) -> int:
    with importing():
        from perta_fast.resuming import resume

    report = resume(parsed.path, progress=not parsed.quiet, group=parsed.group)
    finish(report.summary(), parsed.path, parsed.quiet)
    return 0


COMMAND = Command(
    "resume",
    "finish an interrupted run",
    (Option("path", "its --out, or the model it changes in place", Path, "DIR", positional=True), QUIET),
    run,
    over_ranks=True,
)
