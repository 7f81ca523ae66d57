"""``perta importance``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from perta_fast.cli import options
from perta_fast.cli.command import Command, Option, Outcome, made
from perta_fast.cli.importing import importing
from perta_fast.cli.options import check_streamed, forecast_shown, keywords
from perta_fast.cli.parser import given_options
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError, printable_lines
from perta_fast.rules import ESTIMATORS

if TYPE_CHECKING:
    from perta_fast.importance.store import ImportanceMetadata

_COMBINING = ("merge", "whole", "remove")


def run(parsed: argparse.Namespace) -> int | Outcome:
    if any(getattr(parsed, name) is not None for name in _COMBINING):
        return _combine(parsed)
    if missing := [f"--{name}" for name in ("model", "data") if getattr(parsed, name) is None]:
        raise InputError(f"an importance is estimated at a model on data: give {' and '.join(missing)}")
    check_streamed(parsed)
    if parsed.dry_run:
        return _dry_run(parsed)
    with importing():
        from perta_fast.runs.estimate_importance import estimate_importance

    settings = keywords(parsed, without=("model", "dry_run", *_COMBINING))
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
    return _made(parsed, record, lines)


def _combine(parsed: argparse.Namespace) -> int | Outcome:
    """Add importances up, or take some out of a whole one."""
    _check_combining(parsed)
    with importing():
        from perta_fast.runs.combine_importances import merge_importances, remove_importances

    settings = keywords(parsed)
    how = {name: settings[name] for name in ("out", "overwrite", "progress")}
    if parsed.merge is not None:
        record = merge_importances(parsed.merge, **how).metadata
    else:
        record = remove_importances(parsed.whole, parsed.remove, **how).metadata
    line = f"{record.estimator} over {record.sample_count} samples, {record.label_count} labels"
    return _made(parsed, record, [line])


def _made(parsed: argparse.Namespace, metadata: "ImportanceMetadata", lines: list[str]) -> Outcome:
    from perta_fast.importance.store import as_strings
    from perta_fast.records.importance_record import importance_record

    record = {"path": str(parsed.out), **importance_record(as_strings(metadata))}
    return made(record, printable_lines(lines), parsed.out)


def _check_combining(parsed: argparse.Namespace) -> None:
    """Raise InputError for options that do not go together."""
    first, *others = (name for name in _COMBINING if getattr(parsed, name) is not None)
    if first == "merge" and others:
        raise InputError(f"--merge adds importances up, and --{others[0]} does not go with it; do one after the other")
    if parsed.merge is None and not others:
        raise InputError("--whole A --remove B go together: B is taken out of A")
    allowed = {*_COMBINING, *(option.name for option in options.OUTPUT)}
    given = given_options(parsed.command, parsed.arguments)
    for option in parsed.command.options:
        if option.name in given and option.name not in allowed:
            raise InputError(
                f"--{option.key} is for estimating; --{first} reads importances that were estimated before"
            )
    if Ranks.of(parsed.group).world > 1:
        raise InputError(f"--{first} is done by one process; start it without torchrun")


def _dry_run(parsed: argparse.Namespace) -> int | Outcome:
    from perta_fast.importance.store import WIDTH
    from perta_fast.streaming.forecast.dry_run import preview

    ranks = Ranks.of(parsed.group)
    with ranks.together("the estimate"):
        if ranks.first:
            forecast = preview(
                parsed.model,
                {"given": parsed.data},
                parsed.estimator,
                parsed.out,
                options.conditions(parsed),
                subtract=False,
                kept=WIDTH,
                ranks=ranks.world,
            )
            return forecast_shown(forecast)
    return 0


COMMAND = Command(
    "importance",
    "estimate the importance of every parameter on data, or combine what was estimated",
    (
        Option(
            "model", "where it is taken; needed, as is --data, unless importances are combined", Path, "DIR", named=True
        ),
        Option("data", "rows of text, questions or messages", Path, "FILE", named=True),
        Option("merge", "add these importances up: that of all their rows together", Path, "DIR", several=True),
        Option("whole", "take importances of some rows out of this one, see --remove", Path, "DIR"),
        Option("remove", "with --whole: what is taken out; that of the other rows remains", Path, "DIR", several=True),
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
