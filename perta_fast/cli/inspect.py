"""``perta inspect``."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="what a checkpoint, importance or run holds")
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    from perta_fast.runs.inspect import describe

    print(describe(parsed.path, every_tensor=parsed.tensors))
    return 0
