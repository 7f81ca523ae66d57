"""``perta precondition``."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from perta_fast.cli.command import Command, Option, Outcome, made
from perta_fast.cli.importing import importing
from perta_fast.cli.options import (
    BATCH_SIZE,
    CHAT,
    DEVICE,
    DOWNLOAD,
    DTYPE,
    FIELDS,
    MAX_LENGTH,
    MU,
    OUTPUT,
    SHOW_LABELS,
    STREAM,
    check_streamed,
    conditions,
    forecast_shown,
    keywords,
)
from perta_fast.rules import DEFAULT_MU

if TYPE_CHECKING:
    from perta_fast.streaming.forecast.forecast import Forecast


def run(parsed: argparse.Namespace) -> Outcome:
    check_streamed(parsed)
    if parsed.dry_run:
        return forecast_shown(_preview(parsed))
    with importing():
        from perta_fast.runs.precondition import precondition

    record = precondition(**keywords(parsed, without=("dry_run",)))
    return made(asdict(record), record.summary(), parsed.out)


def _preview(parsed: argparse.Namespace) -> "Forecast":
    from perta_fast.checkpoints.adapters import is_adapter
    from perta_fast.files.hub import local_model
    from perta_fast.streaming.forecast.dry_run import preview

    return preview(
        parsed.model or parsed.base,
        {"retain": parsed.retain},
        None,
        parsed.out,
        conditions(parsed),
        subtract=False,
        low_rank=is_adapter(local_model(parsed.tuned, parsed.download)),
    )


COMMAND = Command(
    "precondition",
    "make a θ_f that hardly touches what the retain data uses",
    (
        Option("base", "the checkpoint that tuned was tuned from", Path, "DIR", required=True),
        Option("tuned", "θ_f, a checkpoint or a LoRA adapter", Path, "DIR", required=True),
        Option("retain", "data to retain", Path, "FILE", required=True),
        Option("model", "see the inputs at this model, θ_full best (the base)", Path, "DIR", named=True),
        replace(MU, default=DEFAULT_MU),
        FIELDS,
        SHOW_LABELS,
        DOWNLOAD,
        BATCH_SIZE,
        MAX_LENGTH,
        *CHAT,
        DEVICE,
        DTYPE,
        replace(STREAM[0], help="hold one decoder layer in memory at a time, for models larger than the memory"),
        *STREAM[1:],
        *OUTPUT,
    ),
    run,
)
