"""What can be wrong with the settings of a command by themselves, before anything is read or made."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import fields

from perta_fast.cli import options
from perta_fast.cli.choosing import check_choice
from perta_fast.cli.sweep import settings_of
from perta_fast.data.chat import ChatSettings
from perta_fast.rules import Rule, check_strength
from perta_fast.subtraction.scope import Scope


def check_settings(parsed: argparse.Namespace) -> None:
    """Raise InputError for settings that no run of the command takes."""
    if hasattr(parsed, "system_prompt"):
        ChatSettings.of(parsed.system_prompt, parsed.date_string)
    if hasattr(parsed, "stream"):
        options.check_streamed(parsed)
    if hasattr(parsed, "only"):
        Scope.of(parsed.only, parsed.leave)
    if parsed.command.name in _OWN:
        _OWN[parsed.command.name](parsed)


def _unlearn(parsed: argparse.Namespace) -> None:
    check_choice(parsed)
    if parsed.choose is None:
        check_strength(parsed.lam, parsed.max_retain_rise, parsed.stream, parsed.allow_zero)
        Rule.of_unlearn(parsed.rule, parsed.lam or 0.0, parsed.p, parsed.alpha, parsed.threshold)


def _sweep(parsed: argparse.Namespace) -> None:
    from perta_fast.sweeping.grid import curves_of
    from perta_fast.sweeping.request import Request

    request = Request.of(settings_of(parsed))
    request.check()
    curves_of(request.rules, request.ps, request.alphas, request.threshold, request.mus)


def _eval(parsed: argparse.Namespace) -> None:
    from perta_fast.evaluation.checks import check_arguments
    from perta_fast.evaluation.request import Request

    check_arguments(Request.of(options.keywords(parsed) | {"model_or_path": parsed.model}))


def _tune(parsed: argparse.Namespace) -> None:
    from perta_fast.tuning.request import DATA, FORGET, RETAIN, Request

    named = {role: getattr(parsed, role) for role in (FORGET, DATA, RETAIN)}
    settings = {field.name: getattr(parsed, field.name) for field in fields(Request) if field.name != "sources"}
    settings |= {"base": str(parsed.base), "report_to": list(parsed.report_to or ())}
    Request(**settings, sources={role: str(path) for role, path in named.items() if path is not None}).check()


_OWN: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "unlearn": _unlearn,
    "sweep": _sweep,
    "eval": _eval,
    "tune": _tune,
}
