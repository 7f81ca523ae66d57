"""``perta merge``."""

import argparse
from pathlib import Path

from perta_fast.cli.command import Command, Option, Outcome, made
from perta_fast.cli.importing import importing
from perta_fast.cli.options import DOWNLOAD, OUTPUT, RESULT, keywords

_SHARED = ("link_unchanged", "drop_cache", "threads", "allow_zero")


def run(parsed: argparse.Namespace) -> Outcome:
    with importing():
        from perta_fast.runs.merge import merge

    report = merge(**keywords(parsed), group=parsed.group)
    return made(report.as_record(), report.summary(), parsed.out)


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
