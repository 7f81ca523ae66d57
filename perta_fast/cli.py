"""The command line, ``perta``: its commands are in ``commands``, and import what they need when they run."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from types import FrameType

from perta_fast.commands import (
    apply,
    demo,
    eval,
    importance,
    inspect,
    recipe,
    report,
    resume,
    sweep,
    unlearn,
    verify,
)
from perta_fast.commands.recipe_options import RecipeParser
from perta_fast.errors import Interrupted, PertaError, is_out_of_memory

_INTERRUPTED = 130
# As the help lists them.
_COMMANDS = (demo, unlearn, recipe, importance, apply, sweep, eval, report, inspect, verify, resume)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0 done, 1 the run failed, 2 bad arguments or bad input."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        parsed = _parser().parse_args(arguments)  # which may read a recipe
        command: Callable[[argparse.Namespace], int] = parsed.command
        if getattr(parsed, "quiet", False):
            os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of transformers too
        status = command(parsed)
        sys.stdout.flush()
        return status
    except PertaError as error:
        print(f"perta: error: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # the reader has left, as head does; what is buffered must not be tried again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PertaError.exit_status
    except OSError as error:
        print(f"perta: error: {error}", file=sys.stderr)
        return PertaError.exit_status
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "perta: error: out of memory; use a smaller --batch-size or --max-length, or --stream if the "
            "command has it. Nothing was written",
            file=sys.stderr,
        )
        return PertaError.exit_status
    except KeyboardInterrupt as error:
        untouched = (
            "interrupted; the inputs are untouched and no partial output is left. "
            "Run the same command again to start over"
        )
        print(f"perta: {error if isinstance(error, Interrupted) else untouched}", file=sys.stderr)
        return _INTERRUPTED


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perta",
        description="Unlearn by per-parameter task arithmetic: theta - lambda * w * (theta_f - theta_0).",
    )
    parser.add_argument("--version", action="version", version=f"perta {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=RecipeParser)
    for each in _COMMANDS:
        each.add(commands)
    return parser


def _version() -> str:
    try:
        return metadata.version("perta-fast")
    except metadata.PackageNotFoundError:
        return "(not installed)"
