"""The command line, ``perta``. Each command is a module beside this one; late imports keep help fast."""

import argparse
import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from types import FrameType
from typing import Any, TextIO

from perta_fast.cli import (
    apply,
    completion,
    demo,
    eval,
    help,
    importance,
    inspect,
    merge,
    precondition,
    ratio,
    recipe,
    report,
    resume,
    sweep,
    tune,
    unlearn,
    verify,
)
from perta_fast.cli.choosing import spellings as bounds_of_choice
from perta_fast.cli.command import Command, Outcome
from perta_fast.cli.importing import INTERRUPTED, INTERRUPTED_MESSAGE
from perta_fast.cli.libraries import bars_of_libraries
from perta_fast.cli.parser import whole_parser
from perta_fast.cli.show_labels import show_labels
from perta_fast.cli.streams import ShownStream, shown_streams
from perta_fast.cli.waiting_threads import sleep_while_waiting
from perta_fast.distributed.launch import Launch
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import (
    InputError,
    Interrupted,
    PertaError,
    device_failure,
    is_of_device,
    is_out_of_memory,
    printable,
)

# In the order of the help.
_MAKING = (demo, tune, merge, precondition, unlearn, recipe, importance, ratio, apply, sweep)
_MODULES = (*_MAKING, eval, report, inspect, verify, resume, completion, help)
COMMANDS = tuple(module.COMMAND for module in _MODULES)
# For messages on a run that another command began, as those of perta resume.
_OF_OTHERS = {option.name: option for command in COMMANDS for option in command.options if option.spellings}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0 done, 1 the run failed, 2 bad arguments or bad input,
    130 it was interrupted.

    Under torchrun every process calls this and does its part of the command.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    sleep_while_waiting()
    try:
        with shown_streams() as (output, _):
            return _run_explained(arguments, output)
    finally:
        atexit.unregister(_end_quietly)
        atexit.register(_end_quietly)  # last, so it comes before what libraries have registered


def _run_explained(arguments: Sequence[str] | None, output: ShownStream) -> int:
    launch = Launch()
    spellings: dict[str, str] = {}  # of the arguments of the command, once it is known
    try:
        with launch.joined() as ranks, _of_first(ranks, redirect_stdout, sys.stdout):
            return _run(arguments, ranks, output, spellings)
    except (PertaError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        text, status = _explain(error, spellings)
        if launch.should_print(error):
            print(f"perta: {printable(text)}", file=sys.stderr)
        return status


def _run(arguments: Sequence[str] | None, ranks: Ranks, output: ShownStream, spellings: dict[str, str]) -> int:
    with ranks.together("the arguments"), _of_first(ranks, redirect_stderr, sys.stderr):
        parser = whole_parser(COMMANDS)
        parsed = parser.parse_args(arguments)  # this may read a recipe
        if ranks.world > 1 and not parsed.command.over_ranks:
            raise InputError("this command is done by one process; start it without torchrun")
    parsed.parser, parsed.group = parser, ranks.group
    spellings.update(_spellings(parsed.command))
    if getattr(parsed, "choose", None) is not None:
        spellings.update(bounds_of_choice())
    silent = getattr(parsed, "quiet", False) or not ranks.first
    with bars_of_libraries(not silent), _log_shown(parsed.verbose and ranks.first), _kept_for_json(parsed):
        shows = getattr(parsed, "show_labels", None) is not None
        outcome: int | Outcome = show_labels(parsed) if shows else parsed.command.run(parsed)
    try:
        status = _shown(outcome, parsed) if isinstance(outcome, Outcome) else outcome
        output.flush()
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted as it printed{_rest(parsed)}") from None
    return status if output.lost is None else _told(output.lost, parsed, status)


def _spellings(command: Command) -> dict[str, str]:
    """What messages call arguments: those of other commands too, by its keys in a recipe."""
    in_recipe = command in recipe.COMMAND.parts
    others = {name: option.key if in_recipe else option.typed for name, option in _OF_OTHERS.items()}
    return others | command.spellings()


def _shown(outcome: Outcome, parsed: argparse.Namespace) -> int:
    """Print what a command has done; return its exit status."""
    if getattr(parsed, "json", False):
        from perta_fast.records.typed_json import readable_json, with_nulls

        print(readable_json(with_nulls(outcome.record)).decode(), end="")
    elif _only_prints(parsed) or not getattr(parsed, "quiet", False):
        print(outcome.text)
    return outcome.status


@contextmanager
def _kept_for_json(parsed: argparse.Namespace) -> Iterator[None]:
    """With ``--json``, what is printed meanwhile goes to standard error: standard output is for the record alone."""
    if not getattr(parsed, "json", False):
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def _told(lost: Exception, parsed: argparse.Namespace, status: int) -> int:
    """The exit status where standard output could not be written: 1 if that was all that the command had to give.

    A reader that has gone, such as head, needs no message.
    """
    if not isinstance(lost, BrokenPipeError):
        reason = getattr(lost, "strerror", None) or lost
        print(f"perta: standard output could not be written: {reason}{_rest(parsed)}", file=sys.stderr)
    return status or (0 if _rest(parsed) else PertaError.exit_status)


def _rest(parsed: argparse.Namespace) -> str:
    """What to say of the result where printing fails; "" if what is printed is all that there is."""
    writes = getattr(parsed, "out", "") is not None or getattr(parsed, "in_place", False)
    shows = getattr(parsed, "show_labels", None) is not None
    return "; what the command makes is complete" if writes and not (shows or _only_prints(parsed)) else ""


def _only_prints(parsed: argparse.Namespace) -> bool:
    return bool(parsed.command.prints or getattr(parsed, "dry_run", False))


def _explain(error: BaseException, spellings: Mapping[str, str]) -> tuple[str, int]:
    """The message and the exit status for an error. Raises it again if it is a defect of the program."""
    if isinstance(error, Interrupted | PertaError):
        text = error.spelled(lambda name: spellings.get(name, name))
        return (text, INTERRUPTED) if isinstance(error, Interrupted) else (f"error: {text}", error.exit_status)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED_MESSAGE, INTERRUPTED
    if isinstance(error, OSError):
        return f"error: {error}", PertaError.exit_status
    if is_of_device(error):
        return f"error: {device_failure(error)}. Run it again, or with --device cpu", PertaError.exit_status
    if not is_out_of_memory(error):
        raise error
    advice = "use a smaller --batch-size or --max-length, or --stream if the command has it"
    return f"error: out of memory; {advice}. Nothing was written", PertaError.exit_status


@contextmanager
def _of_first(
    ranks: Ranks, redirect: Callable[[TextIO], AbstractContextManager[Any]], stream: TextIO
) -> Iterator[None]:
    """Let only the first of many processes write to ``stream``."""
    with open(os.devnull, "w") as nowhere, redirect(stream if ranks.first else nowhere):
        yield


def _end_quietly() -> None:
    """While the interpreter ends, all is done: an interrupt would only show a traceback of some library."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _log_shown(shown: bool) -> Iterator[None]:
    """Show the package's log on standard error, above its progress bars."""
    if not shown:
        yield
        return
    import logging

    from tqdm.contrib.logging import logging_redirect_tqdm

    logger, handler = logging.getLogger("perta_fast"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with logging_redirect_tqdm([logger]):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
