"""``perta apply``."""

import argparse
from pathlib import Path
from typing import Any

from perta_fast.cli.options import (
    add_checkpoints,
    add_result,
    add_rule,
    finish,
    result_settings,
    rule_settings,
)


def add(commands: Any) -> None:
    parser = commands.add_parser("apply", help="the subtraction, with importances estimated before")
    add_checkpoints(parser)
    parser.add_argument("--forget-importance", type=Path, metavar="DIR")
    parser.add_argument("--retain-importance", type=Path, metavar="DIR")
    add_rule(parser)
    add_result(parser)
    parser.set_defaults(command=run, over_ranks=True)


def run(parsed: argparse.Namespace) -> int:
    from perta_fast.runs.apply import apply

    report = apply(
        parsed.model,
        parsed.base,
        parsed.tuned,
        parsed.forget_importance,
        parsed.retain_importance,
        **rule_settings(parsed),
        **result_settings(parsed),
        group=parsed.group,
    )
    finish(report.summary(), parsed.out or parsed.model, parsed.quiet)
    return 0
