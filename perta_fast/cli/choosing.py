"""``--choose`` of ``perta unlearn``: many settings are scored, and the one that forgets most within a bound is made."""

import argparse
import math
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.cli.command import Option, Outcome, made
from perta_fast.cli.importing import importing
from perta_fast.cli.options import conditions, keywords, name_list, number_list
from perta_fast.cli.parser import given_options
from perta_fast.errors import InputError, printable
from perta_fast.rules import DEFAULT_RETAIN_RISE
from perta_fast.scoring.criteria import LOSS, METRICS

if TYPE_CHECKING:
    from perta_fast.streaming.forecast.forecast import Forecast

_UP_TO_BASE = "up-to-base"
_PERCENT = "max-retain-increase"
# The bounds, with the values that they have if none is given.
_BOUNDS: dict[str, float | None] = {
    _UP_TO_BASE: DEFAULT_RETAIN_RISE,
    _PERCENT: 5.0,
    "max-retain-rise": DEFAULT_RETAIN_RISE,
    "target-retain-loss": None,
    "retain-floor": None,
}
# Options of a run with one setting, which keeps or reads other things than a sweep does.
_OF_ONE_SETTING = ("whole_importance", "link_unchanged", "drop_cache", "allow_zero")
_SINGLE = {"rule": "rules", "mu": "mus", "alpha": "alphas"}  # options that give one, by those that give several


def _bound(text: str) -> dict[str, float | bool]:
    """A bound by the name of its argument, as in max-retain-increase=5, or that of base with one on the retain loss."""
    name, equals, value = text.partition("=")
    if name not in _BOUNDS:
        raise argparse.ArgumentTypeError(f"{name!r} is not a bound; there are {', '.join(_BOUNDS)}")
    number = _BOUNDS[name]
    if equals or number is None:
        try:
            number = float(value.removesuffix("%") if name == _PERCENT else value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} needs a number, as in {name}=0.5") from error
    if name == _UP_TO_BASE:
        if not 0 <= number < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} needs a number of nats that is at least 0, as in {name}=0.05")
        return {"up_to_base": True, "max_retain_rise": number}
    return {name.replace("-", "_"): number}


CHOOSE = Option(
    "choose",
    "take the setting that forgets most within a bound, scored as by perta sweep: up-to-base (a forget loss of at most "
    f"that of the base, and a retain loss that rises by at most {DEFAULT_RETAIN_RISE:g} nats); or, whatever is "
    f"forgotten, max-retain-rise ({DEFAULT_RETAIN_RISE:g} nats), max-retain-increase (5 percent), target-retain-loss "
    "or retain-floor",
    _bound,
    "BOUND[=X]",
    one_of="strength",
)
RULES = Option("rules", "with --choose: several of these", name_list, "R,R,...", one_of="rules")
MUS = Option("mus", "with --choose: several of these", number_list, "X,X,...", one_of="mus")
ALPHAS = Option("alphas", "with --choose: several weights (1,16)", number_list, "A,A,...", one_of="alphas")
LAMS = Option("lams", "with --choose: strengths to try (a search; with --stream, in walks)", number_list, "L,L,...")
METRIC = Option(
    "metric", "with --choose: what is chosen by, as perta eval names it (loss)", default=LOSS, choices=METRICS
)
ALSO = Option("also", "with --choose: further data to score", Path, "FILE", [], several=True, named=True)
HOLDOUT = Option(
    "holdout", "with --choose: data never trained on; streamed, for membership scores", Path, "FILE", named=True
)
OPTIONS = (CHOOSE, RULES, MUS, ALPHAS, LAMS, METRIC, ALSO, HOLDOUT)


def spellings() -> dict[str, str]:
    """What messages call the bounds, by the names of their arguments."""
    return {name.replace("-", "_"): f"--choose {name}" for name in _BOUNDS}


def check_choice(parsed: argparse.Namespace) -> None:
    """Raise InputError for options that go with ``--choose`` alone, or not with it."""
    # A default that is written out changes nothing: a recipe's template has them all.
    given = {option.name for option in parsed.command.options if getattr(parsed, option.name) != option.default}
    if parsed.choose is None:
        if name := next((option.key for option in OPTIONS if option.name in given), None):
            raise InputError(f"--{name} is for a choice among settings; add --choose BOUND, or leave it out")
        return
    keys = {option.name: option.key for option in parsed.command.options}
    if name := next((name for name in _OF_ONE_SETTING if name in given), None):
        raise InputError(f"--{keys[name]} is for a run with one setting; leave it out, or --choose")
    if parsed.forget is None or parsed.retain is None:
        raise InputError("--choose scores settings on both data sets: give --forget and --retain")


def choose(parsed: argparse.Namespace) -> Outcome:
    """Score, choose, make the result."""
    with importing():
        from perta_fast.sweeping.choose import choose
        from perta_fast.sweeping.results import record_beside

    result = parsed.out or parsed.model
    report = choose(**settings_of(parsed), group=parsed.group)
    shown = made(report.as_record(), report.summary(), result)
    scored = printable(f"every setting that was scored: {record_beside(result)}")
    return replace(shown, text=f"{shown.text}\n{scored}")


def preview(parsed: argparse.Namespace, ranks: int) -> "Forecast":
    """What the sweep takes; the result then takes what ``perta apply`` does."""
    from perta_fast.sweeping.dry_run import preview_sweep

    costs = preview_sweep(sweep_of(parsed), conditions(parsed), ranks)
    return costs.followed_by("\n\nthen the result is computed from files, chunk by chunk, as by perta apply")


def sweep_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """All arguments of the sweep that the choice is made from."""
    from perta_fast.sweeping.choose import as_sweep
    from perta_fast.sweeping.run import sweep

    defaults = {name: parameter.default for name, parameter in signature(sweep).parameters.items()}
    return defaults | as_sweep(settings_of(parsed))


def settings_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the Python function ``choose``."""
    settings = keywords(parsed, without=("recipe", "dry_run", "lam", "choose", *_OF_ONE_SETTING))
    given = given_options(parsed.command, parsed.arguments)
    for one, several in _SINGLE.items():
        single = settings.pop(one)
        if settings[several] is None and (one == "rule" or one in given):
            settings[several] = single
    settings.update(parsed.choose)
    return settings
