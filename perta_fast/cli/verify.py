"""``perta verify``."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "verify", help="recompute the hashes of a run, and its tensors by the reference"
    )
    parser.add_argument("path", type=Path, metavar="DIR")
    parser.add_argument("--full", action="store_true", help="recompute every tensor, not a sample")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    from perta_fast.runs.verify import verify

    result = verify(parsed.path, full=parsed.full, progress=not parsed.quiet)
    print(result.summary())
    return 1 if result.problems else 0
