"""The options that several commands share, and what is made of them."""

import argparse
from collections.abc import Container
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.arguments import AUTO, DEVICES, check_device
from perta_fast.cli.command import Option, Outcome, flag
from perta_fast.dtypes import FLOATING, STORED_TYPES, torch_dtype
from perta_fast.errors import InputError
from perta_fast.rules import (
    ANY_RULES,
    DEFAULT_ALPHA,
    DEFAULT_LAM,
    DEFAULT_MU,
    DEFAULT_RULE,
    LARGEST_MU,
    PLACES,
    PRECONDITIONED,
    RULES,
)

if TYPE_CHECKING:
    from perta_fast.streaming.forecast.dry_run import Conditions
    from perta_fast.streaming.forecast.forecast import Forecast


def keywords(parsed: argparse.Namespace, without: Container[str] = ()) -> dict[str, Any]:
    """The options of a command as arguments of the Python function of the same name."""
    arguments = {option.name: getattr(parsed, option.name) for option in parsed.command.options}
    if "quiet" in arguments:
        arguments["progress"] = not arguments.pop("quiet")
    if arguments.get("dtype") is not None:
        arguments["dtype"] = torch_dtype(arguments["dtype"])
    arguments.pop(SHOW_LABELS.name, None)
    arguments.pop(JSON.name, None)
    return {name: value for name, value in arguments.items() if name not in without}


def conditions(parsed: argparse.Namespace) -> "Conditions":
    """How the model of a dry run would be run, by the options of the same names."""
    from perta_fast.streaming.forecast.dry_run import Conditions

    settings = keywords(parsed)
    return Conditions(**{field.name: settings[field.name] for field in fields(Conditions)})


def check_streamed(parsed: argparse.Namespace) -> None:
    """Raise InputError if an option was given that needs ``--stream``."""
    given = [key for key in ("dry_run", "memory", "device_memory") if getattr(parsed, key)]
    if given and not parsed.stream:
        raise InputError(f"--{given[0].replace('_', '-')} is for streamed runs; add --stream")


def forecast_shown(forecast: "Forecast") -> Outcome:
    """The outcome of a dry run."""
    return Outcome(forecast.text, {"walks": forecast.walks})


def name_list(text: str) -> list[str]:
    """Names that are separated by commas."""
    return text.split(",")


def number_list(text: str) -> list[float]:
    """Numbers that are separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0.5,1,2") from error


def _size(text: str) -> int:
    from perta_fast.memory import parse_size

    try:
        return parse_size(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _device(text: str) -> str | None:
    try:
        check_device(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; there are {DEVICES}") from error
    return None if text == AUTO else text


def _fields(text: str) -> dict[str, str]:
    from perta_fast.data.forms import fields_from

    try:
        return fields_from(text)
    except InputError as error:  # argparse names the option
        raise argparse.ArgumentTypeError(str(error).removeprefix("fields ")) from error


def _patterns(text: str) -> list[str]:
    return text.split(",")


FIELDS = Option(
    "fields", "names of the data's fields, as in question=prompt,answer=completion (the usual ones)", _fields, "A=B,..."
)
SHOW_LABELS = Option("show_labels", "print N rows of each data file with what carries loss marked, and stop", int, "N")
DOWNLOAD = flag("download", "fetch models and data that are named ORG/NAME from the Hugging Face hub into its cache")
CHECKPOINTS = (
    Option("model", "the checkpoint to unlearn", Path, "DIR", required=True, named=True),
    Option("base", "what it was tuned from", Path, "DIR", required=True, named=True),
    Option("tuned", "the base, tuned on the forget data alone", Path, "DIR", required=True, named=True),
    flag("common_rows", "if a vocabulary was resized, compute the rows that all have, and keep the model's others"),
    DOWNLOAD,
)
AT = Option("at", "where the gradients are taken (base)", default="base", choices=PLACES)
AT_BY_RULE = replace(
    AT, help=f"where gradients are taken, or inputs seen (base; model for rule {PRECONDITIONED})", default=None
)
RULE = Option("rule", f"how w is found ({DEFAULT_RULE})", default=DEFAULT_RULE, choices=RULES)
ANY_RULE = replace(
    RULE,
    help=f"{PRECONDITIONED} (default): less of the task vector along retained inputs; tv: the plain one; grad, fisher, "
    "empirical-fisher: rescaled by importances",
    default=PRECONDITIONED,
    choices=ANY_RULES,
)
IMPORTANCE = Option("importance", "what --save-importance wrote, instead of the two: both, or their ratio", Path, "DIR")
LAM = Option("lam", f"strength lambda ({DEFAULT_LAM:g})", float, "L", DEFAULT_LAM)
MU = Option(
    "mu", f"how much less of the task vector along retained inputs, 0 to {LARGEST_MU:,.0f} ({DEFAULT_MU:g})", float, "X"
)
P = Option("p", "exponent of the importances (the rule's own)", float, "P")
ALPHA = Option("alpha", f"weight of retaining ({DEFAULT_ALPHA:g})", float, "A", DEFAULT_ALPHA)
THRESHOLD = Option("threshold", "hard mask: w becomes 1 where w > T, else 0; T from 0 to below 1", float, "T")
RULE_AND_STRENGTH = (RULE, LAM, P, ALPHA, THRESHOLD)
SCOPE = (
    Option(
        "only", "change only parameters with such names, as in '*.mlp.*' (all)", _patterns, "PATTERN,...", joined=True
    ),
    Option(
        "leave",
        "leave these as they are: patterns of names, or embeddings, norms (none)",
        _patterns,
        "PATTERN,...",
        joined=True,
    ),
)
LIMITS = (
    Option(
        "memory",
        "what --stream may take of the memory, as in 12GiB; chooses batches and overlap (no limit)",
        _size,
        "SIZE",
    ),
    Option("device_memory", "what --stream may take of the GPU's (no limit)", _size, "SIZE"),
)
STREAM = (
    flag("stream", "estimate with one decoder layer in memory at a time, for models larger than the memory"),
    *LIMITS,
    flag("dry_run", "with --stream: print what it will take, from config.json, and stop"),
)
DRY_RUN = flag("dry_run", "with --stream: print what it will take, and stop")
CHAT = (
    Option("system_prompt", "given with every question, by the chat template", metavar="TEXT", may_be_empty=True),
    Option("date_string", "the date, for a chat template that tells it, as in 2025-04-10 (today's)", metavar="DATE"),
)
KEPT = (
    Option("save_importance", "keep both importances here", Path, "DIR", makes=True),
    Option("save_as", "keep the two (pair, the default), or their ratio", choices=("pair", "ratio"), spelled="as"),
    Option("importance_dtype", "type to keep them in (float32; bfloat16 of a ratio)", choices=tuple(STORED_TYPES)),
    Option("save_tuned", "keep the preconditioned θ_f here", Path, "DIR", makes=True),
)
BATCH_SIZE = Option("batch_size", "samples at a time (8)", int, "N", 8)
MAX_LENGTH = Option("max_length", "tokens a sample is cut to (the model's limit)", int, "N")
DEVICE = Option("device", f"{DEVICES} (auto: cuda if there is one)", _device, "D")
DTYPE = Option("dtype", "type to run in (the checkpoint's; float32 where that is far faster)", choices=FLOATING)
ESTIMATION = (BATCH_SIZE, MAX_LENGTH, DEVICE, DTYPE)
OVERWRITE = flag("overwrite", "replace what is there, and start a stopped run over")
QUIET = flag("quiet", "no progress bar, no summary")
JSON = flag("json", "print the record of what was done as JSON, instead of text")
OUTPUT = (Option("out", "directory to make", Path, "DIR", required=True, makes=True), OVERWRITE, QUIET, JSON)
RESULT = (
    Option("out", "directory to make", Path, "DIR", required=True, one_of="result", makes=True),
    flag("in_place", "change the model where it lies", required=True, one_of="result"),
    OVERWRITE,
    flag("link_unchanged", "link shards that nothing changes instead of copying them"),
    Option(
        "drop_cache",
        "keep what is read and written out of the page cache (for runs larger than half of the memory)",
        bool,
        negatable=True,
    ),
    Option("threads", "threads to subtract with (all processors)", int, "N"),
    flag("allow_zero", "go on if the task vector is zero, which makes a copy"),
    flag("leave_others", "change in place though other weight files lie beside the shards"),
    QUIET,
    JSON,
)
