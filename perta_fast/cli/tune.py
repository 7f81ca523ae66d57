"""``perta tune``."""

import argparse
from dataclasses import replace
from pathlib import Path

from perta_fast.cli.command import Command, Option, Outcome, flag, made
from perta_fast.cli.importing import importing
from perta_fast.cli.options import CHAT, DEVICE, DOWNLOAD, FIELDS, MAX_LENGTH, OUTPUT, SHOW_LABELS, keywords, name_list


def run(parsed: argparse.Namespace) -> Outcome:
    with importing():
        from perta_fast.tuning.run import tune

    record = tune(**keywords(parsed))
    return made(record.as_record(), record.summary(), parsed.out)


COMMAND = Command(
    "tune",
    "make θ_f: tune the base on the forget data alone, or on other data",
    (
        Option("base", "the checkpoint to tune", Path, "DIR", required=True, named=True),
        Option("forget", "data to forget", Path, "FILE", required=True, one_of="data", named=True),
        Option(
            "data", "any other data in its place, such as all of it for θ_full", Path, "FILE", one_of="data", named=True
        ),
        Option("retain", "data on which --retain-kl holds the model", Path, "FILE", named=True),
        Option("retain_kl", "add X times the divergence from the base on the data to retain (none)", float, "X"),
        FIELDS,
        SHOW_LABELS,
        DOWNLOAD,
        flag("full", "make a whole checkpoint instead of a LoRA adapter"),
        Option("rank", "rank of the adapter (16)", int, "R", 16),
        Option("epochs", "passes over the data (from the number of rows)", int, "N"),
        Option("lr", "highest learning rate (5e-4, with --full 1e-4)", float, "X"),
        Option("batch_size", "samples a step (4 to 16, from the number of rows)", int, "N"),
        MAX_LENGTH,
        *CHAT,
        flag("gradient_checkpointing", "less memory for activations, more time"),
        Option("seed", "order of the samples, and the adapter's first values (0)", int, "N", 0),
        replace(DEVICE, help="auto, cpu or cuda (auto: cuda if there is one); CUDA_VISIBLE_DEVICES says which"),
        Option("report_to", "report loss and rate to wandb, tensorboard, … (none)", name_list, "NAME,..."),
        *OUTPUT,
    ),
    run,
)
