"""``perta tune``."""

import argparse
from dataclasses import asdict
from pathlib import Path

from perta_fast.cli.importing import importing
from perta_fast.cli.options import (
    CHAT,
    DEVICE,
    DOWNLOAD,
    FIELDS,
    MAX_LENGTH,
    OUTPUT,
    SHOW_LABELS,
    Command,
    Option,
    Outcome,
    flag,
    keywords,
    made,
)


def run(parsed: argparse.Namespace) -> Outcome:
    with importing():
        from perta_fast.tuning.run import tune

    record = tune(**keywords(parsed))
    return made(asdict(record), record.summary(), parsed.out)


COMMAND = Command(
    "tune",
    "make θ_f: tune the base on the forget data alone",
    (
        Option("base", "the checkpoint to tune", Path, "DIR", required=True),
        Option("forget", "data to forget", Path, "FILE", required=True),
        FIELDS,
        SHOW_LABELS,
        DOWNLOAD,
        flag("full", "make a whole checkpoint instead of a LoRA adapter"),
        Option("rank", "rank of the adapter (16)", int, "R", 16),
        Option("epochs", "passes over the data (10 for an adapter, 5 with --full)", int, "N"),
        Option("lr", "highest learning rate (1e-4, with --full 1e-5)", float, "X"),
        Option("batch_size", "samples a step (16)", int, "N", 16),
        MAX_LENGTH,
        *CHAT,
        flag("gradient_checkpointing", "less memory for activations, more time"),
        Option("seed", "order of the samples, start (0)", int, "N", 0),
        DEVICE,
        *OUTPUT,
    ),
    run,
)
