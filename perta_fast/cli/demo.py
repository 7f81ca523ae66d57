"""``perta demo``."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser("demo", help="the whole job on a small model made on the spot")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep data and checkpoints here")
    parser.add_argument("--fast", action="store_true", help="a smaller model, seconds instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    from perta_fast.demo import run_demo

    run_demo(parsed.out, fast=parsed.fast, seed=parsed.seed)
    return 0
