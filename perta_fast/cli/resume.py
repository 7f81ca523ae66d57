"""``perta resume``."""

import argparse
from pathlib import Path
from typing import Any

from perta_fast.cli.options import finish


def add(commands: Any) -> None:
    parser = commands.add_parser("resume", help="finish an interrupted run")
    parser.add_argument("path", type=Path, metavar="DIR", help="its --out, or the model it changes in place")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    parser.set_defaults(command=run, over_ranks=True)


def run(parsed: argparse.Namespace) -> int:
    from perta_fast.resuming import resume

    report = resume(parsed.path, progress=not parsed.quiet, group=parsed.group)
    finish(report.summary(), parsed.path, parsed.quiet)
    return 0
