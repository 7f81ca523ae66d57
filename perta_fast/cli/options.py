"""Commands and their options, and the options that several commands share.

The parser, the keys of a recipe, the arguments of the Python functions and the page docs/command-line.md are made from
these tables.
"""

import argparse
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.arguments import AUTO, DEVICES, check_device
from perta_fast.cli.option_groups import GROUP_OF, LONG, TITLES
from perta_fast.dtypes import FLOATING, STORED_TYPES, torch_dtype
from perta_fast.errors import InputError, printable
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


@dataclass(frozen=True)
class Option:
    """One option, or positional argument, of a command.

    name: of the argument of the Python function, ``batch_size`` for ``--batch-size``. type: makes the value from a
    text; bool makes a flag. negatable: a flag that also has a form ``--no-``. several: takes one or more values; if
    positional, any number.
    joined: given again, its lists are joined. spelled: on the command line, if not as the argument. one_of: at most one
    of the options with the same word can be given, and exactly one if they are required. named: a path, or a name of
    the Hugging Face hub. makes: a path, of what the command makes. may_be_empty: whether an empty text is a value in a
    recipe.
    """

    name: str
    help: str | None = None
    type: Callable[[str], Any] = str
    metavar: str | None = None
    default: Any = None
    choices: tuple[str, ...] | None = None
    required: bool = False
    positional: bool = False
    negatable: bool = False
    several: bool = False
    joined: bool = False
    one_of: str = ""
    may_be_empty: bool = False
    named: bool = False
    makes: bool = False
    spelled: str = ""

    @property
    def key(self) -> str:
        """The name on the command line and in a recipe."""
        return self.spelled or self.name.replace("_", "-")

    @property
    def typed(self) -> str:
        """What a message calls it."""
        return self.metavar or self.name if self.positional else f"--{self.key}"

    @property
    def spellings(self) -> tuple[str, ...]:
        """All ways to write the option; none for a positional argument."""
        if self.positional:
            return ()
        return (f"--{self.key}", f"--no-{self.key}") if self.negatable else (f"--{self.key}",)

    def add_to(self, target: Any, *, bare: bool = False) -> argparse.Action:
        """Declare the option to a parser or a group; return what this makes. bare: not required, without default."""
        name = self.name if self.positional else f"--{self.key}"
        settings: dict[str, Any] = {"help": self.help, "default": argparse.SUPPRESS if bare else self.default}
        settings |= {} if self.positional else {"dest": self.name}
        if self.type is bool:
            settings["action"] = argparse.BooleanOptionalAction if self.negatable else "store_true"
        else:
            made_by = _path if self.type is Path else self.type
            settings |= {"type": made_by, "metavar": self.metavar, "choices": self.choices}
        if self.several and self.positional:
            settings["nargs"] = "*"
        elif self.several:
            settings |= {"nargs": "+", "action": "extend"}
        elif self.joined:
            settings["action"] = "extend"
        if self.required and not self.one_of and not bare:
            settings["required"] = True
        action: argparse.Action = target.add_argument(name, **settings)
        return action


def flag(name: str, help: str, one_of: str = "", required: bool = False) -> Option:
    """An option without a value."""
    return Option(name, help, bool, default=False, one_of=one_of, required=required)


@dataclass(frozen=True)
class Outcome:
    """What a command has done.

    text: for a person. record: for a program, as it is written to disk where it is written. status: exit status.
    """

    text: str
    record: Mapping[str, Any]
    status: int = 0


@dataclass(frozen=True)
class Command:
    """A command: one line of help, its options, and the function that runs it, or the commands below it.

    run: returns the exit status, or an ``Outcome``, which is printed as text or, with JSON among the options and given,
    as JSON. over_ranks: whether torchrun may start it as several processes. prints: whether what it prints is its
    result.
    """

    name: str
    help: str
    options: tuple[Option, ...] = ()
    run: Callable[[argparse.Namespace], int | Outcome] | None = None
    over_ranks: bool = False
    prints: bool = False
    parts: tuple["Command", ...] = ()

    def spellings(self) -> dict[str, str]:
        """What messages call the arguments of its Python function."""
        return {option.name: option.typed for option in self.options}


def add_options(
    parser: argparse.ArgumentParser, options: Iterable[Option], *, bare: bool = False
) -> list[argparse.Action]:
    """Declare ``options`` to ``parser``; see ``Option.add_to``. Returns what takes a path."""
    options = tuple(options)
    grouped = len(options) >= LONG and not bare
    shown = {title: parser.add_argument_group(title) for title in TITLES} if grouped else {}
    groups: dict[str, Any] = {}
    of_paths = []
    for option in options:
        place = shown.get(GROUP_OF.get(option.name, ""), parser)
        if option.one_of and option.one_of not in groups:
            groups[option.one_of] = place.add_mutually_exclusive_group(required=option.required and not bare)
        action = option.add_to(groups.get(option.one_of, place), bare=bare)
        if option.type is Path:
            of_paths.append(action)
    return of_paths


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


def made(record: Mapping[str, Any], summary: str, out: Path | None) -> Outcome:
    """The outcome of a command that has made ``out``. summary: lines that are printable."""
    return Outcome(summary if out is None else f"{summary}\n{printable(f'written to {out}')}", record)


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


def nearest(word: str, words: Iterable[str]) -> str:
    """The one of ``words`` that was probably meant by ``word``; "" if none is near."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, list(words), n=1)), "")


def _path(text: str) -> Path:
    if not text:  # of a variable that is not set; to Python it would be the working directory
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


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
