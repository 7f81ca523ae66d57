"""``perta unlearn``."""

import argparse
from pathlib import Path
from typing import Any

from perta_fast.commands.settings import (
    add_at,
    add_checkpoints,
    add_estimation,
    add_result,
    add_rule,
    add_stream,
    estimation_settings,
    finish,
    result_settings,
    rule_settings,
)


def add(commands: Any) -> None:
    parser = commands.add_parser("unlearn", help="importance on both data sets, then the subtraction")
    add_checkpoints(parser)
    parser.add_argument("--forget", type=Path, metavar="FILE", help="JSON lines to forget")
    parser.add_argument("--retain", type=Path, metavar="FILE", help="JSON lines to keep")
    add_at(parser)
    parser.add_argument("--save-importance", type=Path, metavar="DIR", help="keep both importances here")
    add_stream(parser)
    add_rule(parser)
    add_estimation(parser)
    add_result(parser)
    parser.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    from perta_fast.unlearning import unlearn

    report = unlearn(
        parsed.model,
        parsed.base,
        parsed.tuned,
        parsed.forget,
        parsed.retain,
        at=parsed.at,
        save_importance=parsed.save_importance,
        stream=parsed.stream,
        **estimation_settings(parsed),
        **rule_settings(parsed),
        **result_settings(parsed),
    )
    finish(report.summary(), parsed.out or parsed.model, parsed.quiet)
    return 0
