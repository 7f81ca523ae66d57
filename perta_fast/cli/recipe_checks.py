"""What can be wrong with the settings of a command by themselves, before anything is read or made."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from perta_fast.cli import choosing, options, sweep, unlearn
from perta_fast.cli.choosing import check_choice


def check_settings(parsed: argparse.Namespace) -> None:
    """Raise InputError for settings that no run of the command takes."""
    if hasattr(parsed, "stream"):
        options.check_streamed(parsed)
    if parsed.command.name in _OWN:
        _OWN[parsed.command.name](parsed)


def _unlearn(parsed: argparse.Namespace) -> None:
    check_choice(parsed)
    if parsed.choose is not None:
        _check_sweep(choosing.sweep_of(parsed))
        return
    from perta_fast.runs.unlearn_options import Options

    Options(**unlearn.arguments_of(parsed), group=None).check_arguments()


def _sweep(parsed: argparse.Namespace) -> None:
    _check_sweep(sweep.settings_of(parsed))


def _check_sweep(arguments: Mapping[str, Any]) -> None:
    from perta_fast.sweeping.request import Request

    Request.of(arguments).check_arguments()


def _eval(parsed: argparse.Namespace) -> None:
    from perta_fast.evaluation.request import Request

    Request.of(options.keywords(parsed) | {"model_or_path": parsed.model}).check()


def _tune(parsed: argparse.Namespace) -> None:
    from perta_fast.tuning.request import DATA, FORGET, RETAIN, Request

    named = {role: getattr(parsed, role) for role in (FORGET, DATA, RETAIN)}
    Request.of(vars(parsed), {role: str(path) for role, path in named.items() if path is not None}).check()


_OWN: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "unlearn": _unlearn,
    "sweep": _sweep,
    "eval": _eval,
    "tune": _tune,
}
