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
    Command,
    Option,
    finish,
    flag,
    keywords,
)
from perta_fast.rules import DEFAULT_MU


def run(parsed: argparse.Namespace) -> int:
    with importing():
        from perta_fast.runs.precondition import precondition

    finish(precondition(**keywords(parsed)).summary(), parsed.out, parsed.quiet)
    return 0


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
        flag("stream", "hold one decoder layer in memory at a time, for models larger than the memory"),
        *OUTPUT,
    ),
    run,
)
