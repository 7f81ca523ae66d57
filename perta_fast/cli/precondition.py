"""``perta precondition``."""

import argparse
from pathlib import Path

from perta_fast.cli.importing import importing
from perta_fast.cli.options import (
    BATCH_SIZE,
    CHAT,
    DEVICE,
    DOWNLOAD,
    FIELDS,
    MAX_LENGTH,
    OUTPUT,
    SHOW_LABELS,
    Command,
    Option,
    finish,
    keywords,
)
from perta_fast.rules import DEFAULT_MU


def run(parsed: argparse.Namespace) -> int:
    with importing():
        from perta_fast.preconditioning.run import precondition

    finish(precondition(**keywords(parsed)).summary(), parsed.out, parsed.quiet)
    return 0


COMMAND = Command(
    "precondition",
    "make a θ_f that hardly touches what the retain data uses",
    (
        Option("base", "the checkpoint that tuned was tuned from", Path, "DIR", required=True),
        Option("tuned", "θ_f, a checkpoint or a LoRA adapter", Path, "DIR", required=True),
        Option("retain", "data to retain", Path, "FILE", required=True),
        Option("mu", f"how much less of it along their inputs ({DEFAULT_MU:g})", float, "X", DEFAULT_MU),
        FIELDS,
        SHOW_LABELS,
        DOWNLOAD,
        BATCH_SIZE,
        MAX_LENGTH,
        *CHAT,
        DEVICE,
        *OUTPUT,
    ),
    run,
)
