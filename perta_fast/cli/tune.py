"""``perta tune``."""

import argparse
from pathlib import Path
from typing import Any

from perta_fast.cli.options import add_output, finish, output_settings

_OPTIONS = (
    *("full", "rank", "epochs", "lr", "batch_size", "max_length"),
    *("gradient_checkpointing", "seed", "device"),
)


def add(commands: Any) -> None:
    parser = commands.add_parser("tune", help="make θ_f: tune the base on the forget data alone")
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="the checkpoint to tune")
    parser.add_argument("--forget", type=Path, required=True, metavar="FILE", help="JSON lines to forget")
    parser.add_argument("--full", action="store_true", help="make a whole checkpoint instead of a LoRA adapter")
    parser.add_argument("--rank", type=int, default=16, metavar="R", help="rank of the adapter (16)")
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="passes over the data (10 for an adapter, 5 with --full)"
    )
    parser.add_argument("--lr", type=float, metavar="X", help="highest learning rate (1e-4, with --full 1e-5)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="samples a step (16)")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens a sample is cut to (the model's limit)"
    )
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory for activations, more time"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="order of the samples, start (0)")
    parser.add_argument("--device", metavar="D", help="cpu or cuda (cuda if there is one)")
    add_output(parser)
    parser.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    from perta_fast.tuning.run import tune

    options = {name: getattr(parsed, name) for name in _OPTIONS}
    record = tune(parsed.base, parsed.forget, **options, **output_settings(parsed))
    finish(record.summary(), parsed.out, parsed.quiet)
    return 0
