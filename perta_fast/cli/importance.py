"""``perta importance``."""

import argparse
from pathlib import Path
from typing import Any

from perta_fast.cli.options import (
    add_estimation,
    add_output,
    add_stream,
    estimation_settings,
    finish,
    memory_settings,
    output_settings,
)
from perta_fast.distributed.ranks import Ranks
from perta_fast.records.typed_json import printable
from perta_fast.rules import ESTIMATORS


def add(commands: Any) -> None:
    parser = commands.add_parser("importance", help="estimate the importance of every parameter on data")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="where it is taken")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument(
        "--estimator",
        choices=ESTIMATORS,
        default="grad",
        help="grad serves the rules grad and fisher (default)",
    )
    add_stream(parser)
    add_estimation(parser)
    add_output(parser)
    parser.set_defaults(command=run, over_ranks=True)


def run(parsed: argparse.Namespace) -> int:
    limits = memory_settings(parsed)
    if parsed.dry_run:
        from perta_fast.streaming.forecast.dry_run import preview

        ranks = Ranks.of(parsed.group)
        settings = {**estimation_settings(parsed), **limits, "ranks": ranks.world}
        data = {"given": parsed.data}
        with ranks.together("the estimate"):
            if ranks.first:
                text = preview(parsed.model, data, parsed.estimator, parsed.out, subtract=False, **settings)
                print(printable(text))
        return 0
    from perta_fast.runs.estimate import estimate_importance

    found = estimate_importance(
        parsed.model,
        parsed.data,
        parsed.estimator,
        **estimation_settings(parsed),
        stream=parsed.stream,
        **limits,
        **output_settings(parsed),
        group=parsed.group,
    ).metadata
    lines = [f"{found.estimator} over {found.sample_count} samples, {found.label_count} labels"]
    if found.truncated_count:
        lines.append(f"warning: {found.truncated_count} samples were cut to the length limit")
    if found.one_by_one:
        lines.append(
            f"no batched rule fits these parameters, which took a pass for each sample: {found.one_by_one}"
        )
    finish("\n".join(lines), parsed.out, parsed.quiet)
    return 0
