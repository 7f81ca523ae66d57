"""``perta sweep``."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from perta_fast.commands.settings import (
    add_at,
    add_checkpoints,
    add_estimation,
    add_rule,
    estimation_settings,
    output_settings,
)


def add(commands: Any) -> None:
    parser = commands.add_parser("sweep", help="many strengths from one importance pass, scored")
    add_checkpoints(parser)
    parser.add_argument("--forget", type=Path, required=True, metavar="FILE", help="JSON lines to forget")
    parser.add_argument("--retain", type=Path, required=True, metavar="FILE", help="JSON lines to keep")
    strengths = parser.add_mutually_exclusive_group(required=True)
    strengths.add_argument("--lams", type=_numbers, metavar="L,L,...", help="these strengths")
    strengths.add_argument(
        "--target-retain-loss", type=float, metavar="X", help="the largest whose retain loss is at most X"
    )
    strengths.add_argument(
        "--max-retain-increase",
        type=_percent,
        metavar="P",
        help="the largest that raises the retain loss by at most P percent",
    )
    parser.add_argument("--forget-importance", type=Path, metavar="DIR", help="instead of estimating it")
    parser.add_argument("--retain-importance", type=Path, metavar="DIR", help="instead of estimating it")
    add_at(parser)
    add_rule(parser, with_lam=False)
    add_estimation(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory to make, for figures and plot")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is not empty")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    from perta_fast.sweeping import sweep

    result = sweep(
        parsed.model,
        parsed.base,
        parsed.tuned,
        parsed.forget,
        parsed.retain,
        parsed.forget_importance,
        parsed.retain_importance,
        lams=parsed.lams,
        target_retain_loss=parsed.target_retain_loss,
        max_retain_increase=parsed.max_retain_increase,
        rule=parsed.rule,
        p=parsed.p,
        alpha=parsed.alpha,
        threshold=parsed.threshold,
        at=parsed.at,
        **estimation_settings(parsed),
        **output_settings(parsed),
    )
    print(result.summary())
    if result.best is None:
        print(f"Write the one you choose, L, with:\n{_making(parsed, 'L')}")
    elif result.best.lam > 0:
        print(f"Write it with:\n{_making(parsed, repr(result.best.lam))}")
    if parsed.out is not None:
        print(f"written to {parsed.out}")
    return 0


def _making(parsed: argparse.Namespace, lam: str) -> str:
    """The command that writes the checkpoint that a sweep has scored at ``lam``."""
    names = ["model", "base", "tuned", "rule", "p", "alpha", "threshold"]
    estimates = parsed.rule != "tv" and parsed.forget_importance is None
    if estimates:
        names += ["forget", "retain", "at", "batch_size", "max_length", "device", "dtype"]
    else:
        names += ["forget_importance", "retain_importance"]
    given = {name: getattr(parsed, name) for name in names if getattr(parsed, name) is not None}
    settings = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return shlex.join(["perta", "unlearn" if estimates else "apply", *settings, "--lam", lam, "--out", "DIR"])


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0.5,1,2") from error


def _percent(text: str) -> float:
    try:
        return float(text.removesuffix("%"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of percent") from error
