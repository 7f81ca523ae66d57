"""``perta precondition``."""

import argparse
from dataclasses import replace
from pathlib import Path

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
    Command,
    Option,
    check_streamed,
    conditions,
    finish,
    keywords,
)
from perta_fast.rules import DEFAULT_MU


def run(parsed: argparse.Namespace) -> int:
    check_streamed(parsed)
    if parsed.dry_run:
        print(_preview(parsed))
        return 0
    with importing():
        from perta_fast.runs.precondition import precondition

    finish(precondition(**keywords(parsed, without=("dry_run",))).summary(), parsed.out, parsed.quiet)
    return 0


def _preview(parsed: argparse.Namespace) -> str:
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
