"""``perta merge``."""

import argparse
from pathlib import Path

from perta_fast.cli.importing import importing
from perta_fast.cli.options import DOWNLOAD, OUTPUT, RESULT, Command, Option, finish, keywords

_SHARED = ("link_unchanged", "drop_cache", "threads", "allow_zero")


def run(parsed: argparse.Namespace) -> int:
    with importing():
        from perta_fast.runs.merge import merge

    finish(merge(**keywords(parsed), group=parsed.group).summary(), parsed.out, parsed.quiet)
    return 0


COMMAND = Command(
    "merge",
    "an adapter and its base as one checkpoint",
    (
        Option("base", "the checkpoint that the adapter was tuned from", Path, "DIR", required=True, named=True),
        Option("tuned", "the adapter", Path, "DIR", required=True, named=True),
        DOWNLOAD,
        *(option for option in RESULT if option.name in _SHARED),
        *OUTPUT,
    ),
    run,
    over_ranks=True,
)
