"""``perta importance``."""

import argparse
from pathlib import Path

from perta_fast.cli import options
from perta_fast.cli.importing import importing
from perta_fast.cli.options import Command, Option, check_streamed, finish, keywords
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import printable_lines
from perta_fast.rules import ESTIMATORS


def run(parsed: argparse.Namespace) -> int:
    check_streamed(parsed)
    if parsed.dry_run:
        return _dry_run(parsed)
    with importing():
        from perta_fast.runs.estimate import estimate_importance

    settings = keywords(parsed, without=("model", "dry_run"))
    record = estimate_importance(parsed.model, **settings, group=parsed.group).metadata
    lines = [f"{record.estimator} over {record.sample_count} samples, {record.label_count} labels"]
    if record.read_as:
        lines.append(f"data: {record.read_as}")
    if words := record.told.in_words():
        lines.append(words)
    if record.truncated_count:
        lines.append(f"warning: {record.truncated_count} samples were cut to the length limit")
    if record.one_by_one:
        lines.append(
            f"these parameters could not be computed in a batch, which took a pass for each sample: {record.one_by_one}"
        )
    finish(printable_lines(lines), parsed.out, parsed.quiet)
    return 0


def _dry_run(parsed: argparse.Namespace) -> int:
    from perta_fast.streaming.forecast.dry_run import preview

    ranks = Ranks.of(parsed.group)
    with ranks.together("the estimate"):
        if ranks.first:
            text = preview(
                parsed.model,
                {"given": parsed.data},
                parsed.estimator,
                parsed.out,
                options.conditions(parsed),
                subtract=False,
                ranks=ranks.world,
            )
            print(text)
    return 0


COMMAND = Command(
    "importance",
    "estimate the importance of every parameter on data",
    (
        Option("model", "where it is taken", Path, "DIR", required=True),
        Option("data", "rows of text, questions or messages", Path, "FILE", required=True),
        options.FIELDS,
        options.SHOW_LABELS,
        options.DOWNLOAD,
        Option("estimator", "grad serves the rules grad and fisher (default)", default="grad", choices=ESTIMATORS),
        *options.STREAM,
        *options.CHAT,
        *options.ESTIMATION,
        *options.OUTPUT,
    ),
    run,
    over_ranks=True,
)
