"""``perta unlearn``."""

import argparse
from pathlib import Path
from typing import Any

from perta_fast import compiled
from perta_fast.cli.options import (
    add_at,
    add_checkpoints,
    add_estimation,
    add_result,
    add_rule,
    add_stream,
    estimation_settings,
    finish,
    memory_settings,
    result_settings,
    rule_settings,
)
from perta_fast.cli.recipe_options import add_recipe
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError
from perta_fast.records.typed_json import printable
from perta_fast.rules import Rule


def add(commands: Any) -> None:
    parser = commands.add_parser("unlearn", help="importance on both data sets, then the subtraction")
    add_recipe(parser)
    add_checkpoints(parser)
    parser.add_argument("--forget", type=Path, metavar="FILE", help="JSON lines to forget")
    parser.add_argument("--retain", type=Path, metavar="FILE", help="JSON lines to keep")
    add_at(parser)
    parser.add_argument("--save-importance", type=Path, metavar="DIR", help="keep both importances here")
    add_stream(parser)
    add_rule(parser)
    add_estimation(parser)
    add_result(parser)
    parser.set_defaults(command=run, over_ranks=True)


def run(parsed: argparse.Namespace) -> int:
    limits = memory_settings(parsed)
    if parsed.dry_run:
        ranks = Ranks.of(parsed.group)
        with ranks.together("the estimate"):
            if ranks.first:
                print(printable(_preview(parsed, limits, ranks.world)))
        return 0
    from perta_fast.runs.unlearn import unlearn

    report = unlearn(
        parsed.model,
        parsed.base,
        parsed.tuned,
        parsed.forget,
        parsed.retain,
        at=parsed.at,
        save_importance=parsed.save_importance,
        stream=parsed.stream,
        **limits,
        **estimation_settings(parsed),
        **rule_settings(parsed),
        **result_settings(parsed),
        group=parsed.group,
    )
    finish(report.summary(), parsed.out or parsed.model, parsed.quiet)
    return 0


def _preview(parsed: argparse.Namespace, limits: dict[str, Any], ranks: int) -> str:
    from perta_fast.streaming.forecast.dry_run import preview

    estimator = Rule.of(parsed.rule, parsed.lam, parsed.p, parsed.alpha, parsed.threshold).estimator
    data = {role: getattr(parsed, role) for role in ("forget", "retain")}
    if estimator is None or None in data.values():
        raise InputError("--dry-run is of a walk over forget and retain data, by a rule that needs both")
    return preview(
        parsed.model if parsed.at == "model" else parsed.base,
        data,
        estimator,
        parsed.out or parsed.model,
        subtract=True,
        kept=parsed.save_importance is not None,
        threads=parsed.threads or compiled.kernels().available_threads(),
        ranks=ranks,
        **estimation_settings(parsed),
        **limits,
    )
