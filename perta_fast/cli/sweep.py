"""``perta sweep``."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.cli.options import (
    add_at,
    add_checkpoints,
    add_estimation,
    estimation_settings,
    output_settings,
)
from perta_fast.rules import RULES, Rule
from perta_fast.sweeping.criteria import LOSS, METRICS, SELECTIONS

if TYPE_CHECKING:
    from perta_fast.sweeping.results import ScoredSetting


def add(commands: Any) -> None:
    parser = commands.add_parser("sweep", help="many settings from one importance pass, scored and chosen from")
    add_checkpoints(parser)
    parser.add_argument("--forget", type=Path, required=True, metavar="FILE", help="JSON lines to forget")
    parser.add_argument("--retain", type=Path, required=True, metavar="FILE", help="JSON lines to keep")
    _add_grid(parser)
    bound = parser.add_mutually_exclusive_group()
    bound.add_argument(
        "--target-retain-loss", type=float, metavar="X", help="bound: a retain loss of at most X nats"
    )
    bound.add_argument(
        "--max-retain-increase",
        type=_percent,
        metavar="P",
        help="bound: a retain loss of at most P percent above the model's own",
    )
    bound.add_argument(
        "--retain-floor", type=float, metavar="X", help="bound: a retain metric of at least X (not for loss)"
    )
    parser.add_argument(
        "--metric", choices=METRICS, default=LOSS, help="what is chosen by, as perta eval names it (loss)"
    )
    parser.add_argument(
        "--select",
        choices=SELECTIONS,
        help="choose what has forgotten most within the bound, or what is closest to the gold model",
    )
    parser.add_argument("--gold", type=Path, metavar="DIR", help="a model trained without the forget data")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="directory to make, of what was chosen")
    parser.add_argument(
        "--forget-importance",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="instead of estimating it; one an estimator",
    )
    parser.add_argument("--retain-importance", type=Path, nargs="+", default=[], metavar="DIR", help="the same")
    add_at(parser)
    add_estimation(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory to make, for figures and plot")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there, and start over")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(command=run)


def _add_grid(parser: argparse.ArgumentParser) -> None:
    rules, ps, alphas = (parser.add_mutually_exclusive_group() for _ in range(3))
    rules.add_argument("--rule", choices=RULES, default="fisher", help="how w is found (fisher)")
    rules.add_argument("--rules", type=_names, metavar="R,R,...", help="several rules")
    parser.add_argument(
        "--lams", type=_numbers, metavar="L,L,...", help="strengths; without them, the largest within the bound"
    )
    alphas.add_argument("--alpha", type=float, default=1.0, metavar="A", help="weight of retaining (1)")
    alphas.add_argument("--alphas", type=_numbers, metavar="A,A,...", help="several weights")
    ps.add_argument("--p", type=float, metavar="P", help="exponent of the importances (the rule's own)")
    ps.add_argument("--ps", type=_numbers, metavar="P,P,...", help="several exponents")
    parser.add_argument(
        "--threshold", type=float, metavar="T", help="hard mask: w becomes 1 where w > T, else 0"
    )


def run(parsed: argparse.Namespace) -> int:
    from perta_fast.records.typed_json import printable
    from perta_fast.sweeping.run import sweep

    names = ("target_retain_loss", "max_retain_increase", "retain_floor", "lams", "threshold", "at")
    result = sweep(
        parsed.model,
        parsed.base,
        parsed.tuned,
        parsed.forget,
        parsed.retain,
        parsed.forget_importance,
        parsed.retain_importance,
        **{name: getattr(parsed, name) for name in (*names, "metric", "select", "gold", "checkpoint")},
        rule=parsed.rules or parsed.rule,
        p=parsed.ps or parsed.p,
        alpha=parsed.alphas or parsed.alpha,
        **estimation_settings(parsed),
        **output_settings(parsed),
    )
    print(printable(result.summary()))
    best, curves = result.best, result.curves()
    if parsed.checkpoint is not None:
        print(printable(f"chosen checkpoint written to {parsed.checkpoint}"))
    elif best is not None and best.rule:
        print(printable(f"Write it with:\n{_making(parsed, best, repr(best.lam))}"))
    elif best is None and len(curves) == 1:
        (rows,) = curves.values()
        print(printable(f"Write the one you choose, L, with:\n{_making(parsed, rows[0], 'L')}"))
    if parsed.out is not None:
        print(printable(f"written to {parsed.out}"))
    return 0


def _making(parsed: argparse.Namespace, row: "ScoredSetting", lam: str) -> str:
    """The command that writes the checkpoint that a sweep has scored in ``row``, at ``lam``."""
    rule = Rule.of(row.rule, 0.0)
    given: dict[str, Any] = {name: getattr(parsed, name) for name in ("model", "base", "tuned")}
    given["rule"] = row.rule
    if rule.estimator is not None:
        given |= {"p": row.p, "alpha": row.alpha, "threshold": parsed.threshold}
    importances = _importances(parsed, rule)
    estimates = rule.estimator is not None and not importances
    if estimates:
        names = ("forget", "retain", "at", "batch_size", "max_length", "device", "dtype")
        given |= {name: getattr(parsed, name) for name in names}
    options = [
        part
        for name, value in (given | importances).items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    return shlex.join(["perta", "unlearn" if estimates else "apply", *options, "--lam", lam, "--out", "DIR"])


def _importances(parsed: argparse.Namespace, rule: Rule) -> dict[str, Path]:
    """The importances that were given for ``rule``."""
    from perta_fast.importance.store import Importance

    pairs = zip(parsed.forget_importance, parsed.retain_importance, strict=True)
    for forget, retain in pairs:
        if Importance.load(forget).metadata.estimator == rule.estimator:
            return {"forget_importance": forget, "retain_importance": retain}
    return {}


def _names(text: str) -> list[str]:
    return text.split(",")


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
