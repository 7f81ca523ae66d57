"""The tables of options, against the Python functions that they are passed to."""

import argparse
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from perta_fast import apply, choose, estimate_importance, evaluate, precondition, sweep, tune, unlearn
from perta_fast.cli import choosing
from perta_fast.cli.command import Option
from perta_fast.cli.main import COMMANDS
from perta_fast.cli.parser import parser_of

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "unlearn": unlearn,
    "apply": apply,
    "importance": estimate_importance,
    "tune": tune,
    "precondition": precondition,
    "sweep": sweep,
    "eval": evaluate,
}
# Options that are given to the function in another form, or not at all.
OTHERWISE = {
    "unlearn": {"recipe", "dry_run", "quiet", "json", "show_labels", *(option.name for option in choosing.OPTIONS)},
    "apply": {"quiet", "json"},
    "importance": {"model", "dry_run", "quiet", "json", "show_labels", "merge", "whole", "remove"},
    "tune": {"quiet", "json", "show_labels"},
    "precondition": {"dry_run", "quiet", "json", "show_labels"},
    "sweep": {"dry_run", "rules", "mus", "ps", "alphas", "quiet", "json", "show_labels"},
    "eval": {"dry_run", "model", "quiet", "json", "show_labels"},
}
# 8 on the command line as for all commands, 16 in Python; and an importance may be combined of others, without data
OTHER_DEFAULTS = {"eval": {"batch_size"}, "importance": {"data"}}


def same_default(option: Option, parameter: inspect.Parameter) -> bool:
    if option.required and not option.one_of:
        return True
    return bool(option.default == parameter.default or not (option.default or parameter.default))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_option_is_an_argument_with_the_same_default(name: str) -> None:
    (command,) = (command for command in COMMANDS if command.name == name)
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    options = {option.name: option for option in command.options}
    assert options.keys() - parameters.keys() == OTHERWISE[name]
    shared = options.keys() & parameters.keys()
    assert {key for key in shared if not same_default(options[key], parameters[key])} == OTHER_DEFAULTS.get(name, set())


def parsed_choice(*given: str) -> argparse.Namespace:
    """The options of ``unlearn`` with ``--choose``, and those ``given``."""
    (command,) = (command for command in COMMANDS if command.name == "unlearn")
    needed = [f"--{name}={name}" for name in ("model", "base", "tuned", "forget", "retain", "out")]
    parsed = parser_of(command).parse_args([*needed, "--choose=max-retain-rise=0.25", *given])
    parsed.command = command
    return parsed


def test_what_chooses_takes_every_option_of_unlearn_but_those_of_one_setting() -> None:
    parsed = parsed_choice()
    found, parameters = choosing.settings_of(parsed), inspect.signature(choose).parameters
    bounds = {"target_retain_loss", "max_retain_increase", "retain_floor", "up_to_base"}
    assert parameters.keys() - found.keys() == bounds | {"group"}
    assert found.keys() <= parameters.keys()
    given = {"model", "base", "tuned", "forget", "retain", "out", "max_retain_rise", "rules"}
    differing = {key for key in found if (found[key] or None) != (parameters[key].default or None)}
    assert differing == given - {"rules"}
    assert (found["rules"], found["max_retain_rise"]) == (parameters["rules"].default, 0.25)


@pytest.mark.parametrize("alpha", [1, 2])
def test_a_choice_tries_the_alpha_that_was_given_alone(alpha: float) -> None:
    assert choosing.settings_of(parsed_choice("--rule=fisher", f"--alpha={alpha}"))["alphas"] == alpha
    assert choosing.settings_of(parsed_choice("--rule=fisher"))["alphas"] is None
