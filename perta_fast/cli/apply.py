"""``perta apply``."""

import argparse
from pathlib import Path

from perta_fast.cli.command import Command, Option, Outcome, made
from perta_fast.cli.importing import importing
from perta_fast.cli.options import CHECKPOINTS, IMPORTANCE, RESULT, RULE_AND_STRENGTH, SCOPE, keywords


def run(parsed: argparse.Namespace) -> Outcome:
    with importing():
        from perta_fast.runs.apply import apply

    report = apply(**keywords(parsed), group=parsed.group)
    return made(report.as_record(), report.summary(), parsed.out or parsed.model)


COMMAND = Command(
    "apply",
    "the subtraction alone, with importances estimated before",
    (
        *CHECKPOINTS,
        Option("forget_importance", "importance on the data to forget, by perta importance", Path, "DIR"),
        Option("retain_importance", "the same on the data to keep", Path, "DIR"),
        IMPORTANCE,
        *RULE_AND_STRENGTH,
        *SCOPE,
        *RESULT,
    ),
    run,
    over_ranks=True,
)
