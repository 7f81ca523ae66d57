"""The command line, ``perta``. Each command imports what it needs when it runs."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from perta_fast.errors import Interrupted, PertaError
from perta_fast.rules import ESTIMATORS, RULES

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0 done, 1 the run failed, 2 bad arguments or bad input."""
    parsed = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    if getattr(parsed, "quiet", False):
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of transformers too
    signal.signal(signal.SIGTERM, _interrupt)
    try:
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
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        print(
            "perta: error: out of memory; use a smaller --batch-size or --max-length. Nothing was written",
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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_unlearn(commands)
    _add_importance(commands)
    _add_apply(commands)
    _add_sweep(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_resume(commands)
    return parser


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser("demo", help="the whole job on a small model made on the spot")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep data and checkpoints here")
    parser.add_argument("--fast", action="store_true", help="a smaller model, seconds instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(command=_demo)


def _demo(parsed: argparse.Namespace) -> int:
    from perta_fast.demo import run_demo

    run_demo(parsed.out, fast=parsed.fast, seed=parsed.seed)
    return 0


def _add_unlearn(commands: Any) -> None:
    parser = commands.add_parser("unlearn", help="importance on both data sets, then the subtraction")
    _add_checkpoints(parser)
    parser.add_argument("--forget", type=Path, metavar="FILE", help="JSON lines to forget")
    parser.add_argument("--retain", type=Path, metavar="FILE", help="JSON lines to keep")
    _add_at(parser)
    parser.add_argument("--save-importance", type=Path, metavar="DIR", help="keep both importances here")
    _add_stream(parser)
    _add_rule(parser)
    _add_estimation(parser)
    _add_result(parser)
    parser.set_defaults(command=_unlearn)


def _unlearn(parsed: argparse.Namespace) -> int:
    from perta_fast.unlearning import unlearn

    report = unlearn(
        parsed.model,
        parsed.base,
        parsed.tuned,
        parsed.forget,
        parsed.retain,
        at=parsed.at,
        save_importance=parsed.save_importance,
        stream=parsed.stream,
        **_estimation_settings(parsed),
        **_rule_settings(parsed),
        **_result_settings(parsed),
    )
    _finish(report.summary(), parsed.out or parsed.model, parsed.quiet)
    return 0


def _add_importance(commands: Any) -> None:
    parser = commands.add_parser("importance", help="estimate the importance of every parameter on data")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="where it is taken")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument(
        "--estimator",
        choices=ESTIMATORS,
        default="grad",
        help="grad serves the rules grad and fisher (default)",
    )
    _add_stream(parser)
    _add_estimation(parser)
    _add_output(parser)
    parser.set_defaults(command=_importance)


def _importance(parsed: argparse.Namespace) -> int:
    from perta_fast.importance.estimate import estimate_importance

    found = estimate_importance(
        parsed.model,
        parsed.data,
        parsed.estimator,
        **_estimation_settings(parsed),
        stream=parsed.stream,
        **_output_settings(parsed),
    ).metadata
    lines = [f"{found.estimator} over {found.sample_count} samples, {found.label_count} labels"]
    if found.truncated_count:
        lines.append(f"warning: {found.truncated_count} samples were cut to the length limit")
    if found.one_by_one:
        lines.append(
            f"no batched rule fits these parameters, which took a pass for each sample: {found.one_by_one}"
        )
    _finish("\n".join(lines), parsed.out, parsed.quiet)
    return 0


def _add_apply(commands: Any) -> None:
    parser = commands.add_parser("apply", help="the subtraction, with importances estimated before")
    _add_checkpoints(parser)
    parser.add_argument("--forget-importance", type=Path, metavar="DIR")
    parser.add_argument("--retain-importance", type=Path, metavar="DIR")
    _add_rule(parser)
    _add_result(parser)
    parser.set_defaults(command=_apply)


def _apply(parsed: argparse.Namespace) -> int:
    from perta_fast.application import apply

    report = apply(
        parsed.model,
        parsed.base,
        parsed.tuned,
        parsed.forget_importance,
        parsed.retain_importance,
        **_rule_settings(parsed),
        **_result_settings(parsed),
    )
    _finish(report.summary(), parsed.out or parsed.model, parsed.quiet)
    return 0


def _add_sweep(commands: Any) -> None:
    parser = commands.add_parser("sweep", help="many strengths from one importance pass, scored")
    _add_checkpoints(parser)
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
    _add_at(parser)
    _add_rule(parser, with_lam=False)
    _add_estimation(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory to make, for figures and plot")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is not empty")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(command=_sweep)


def _sweep(parsed: argparse.Namespace) -> int:
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
        **_estimation_settings(parsed),
        **_output_settings(parsed),
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


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="what a checkpoint, importance or run holds")
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.set_defaults(command=_inspect)


def _inspect(parsed: argparse.Namespace) -> int:
    from perta_fast.inspection import describe

    print(describe(parsed.path, every_tensor=parsed.tensors))
    return 0


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify", help="recompute the hashes of a run, and its tensors by the reference"
    )
    parser.add_argument("path", type=Path, metavar="DIR")
    parser.add_argument("--full", action="store_true", help="recompute every tensor, not a sample")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(command=_verify)


def _verify(parsed: argparse.Namespace) -> int:
    from perta_fast.verification import verify

    result = verify(parsed.path, full=parsed.full, progress=not parsed.quiet)
    print(result.summary())
    return 1 if result.problems else 0


def _add_resume(commands: Any) -> None:
    parser = commands.add_parser("resume", help="finish an interrupted run")
    parser.add_argument("path", type=Path, metavar="DIR", help="its --out, or the model it changes in place")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    parser.set_defaults(command=_resume)


def _resume(parsed: argparse.Namespace) -> int:
    from perta_fast.resuming import resume

    report = resume(parsed.path, progress=not parsed.quiet)
    _finish(report.summary(), parsed.path, parsed.quiet)
    return 0


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint to unlearn")
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="what it was tuned from")
    parser.add_argument(
        "--tuned", type=Path, required=True, metavar="DIR", help="the base, tuned on the forget data alone"
    )


def _add_rule(parser: argparse.ArgumentParser, *, with_lam: bool = True) -> None:
    parser.add_argument("--rule", choices=RULES, default="fisher", help="how w is found (fisher)")
    if with_lam:
        parser.add_argument("--lam", type=float, required=True, metavar="L", help="strength lambda")
    parser.add_argument("--p", type=float, metavar="P", help="exponent of the importances (the rule's own)")
    parser.add_argument("--alpha", type=float, default=1.0, metavar="A", help="weight of retaining (1)")
    parser.add_argument(
        "--threshold", type=float, metavar="T", help="hard mask: w becomes 1 where w > T, else 0"
    )


def _rule_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(parsed, name) for name in ("rule", "lam", "p", "alpha", "threshold")}


def _add_stream(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stream",
        action="store_true",
        help="estimate with one decoder layer in memory at a time, for models larger than the memory",
    )


def _add_estimation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples a backward (8)")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens a sample is cut to (the model's limit)"
    )
    parser.add_argument("--device", metavar="D", help="cpu or cuda (cuda if there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="type to run in (the checkpoint's)"
    )


def _estimation_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    names = ("batch_size", "max_length", "device")
    return {**{name: getattr(parsed, name) for name in names}, "dtype": _torch_dtype(parsed.dtype)}


def _add_at(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--at", choices=("base", "model"), default="base", help="where the gradients are taken (base)"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is not empty")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def _output_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    return {"out": parsed.out, "overwrite": parsed.overwrite, "progress": not parsed.quiet}


def _add_result(parser: argparse.ArgumentParser) -> None:
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=Path, metavar="DIR", help="directory to make")
    place.add_argument("--in-place", action="store_true", help="change the model where it lies")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is not empty")
    parser.add_argument(
        "--link-unchanged", action="store_true", help="link shards that nothing changes instead of copying them"
    )
    parser.add_argument(
        "--drop-cache",
        action=argparse.BooleanOptionalAction,
        help="keep what is read and written out of the page cache (for runs larger than half of the memory)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads to apply with (all processors)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def _result_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    names = ("out", "in_place", "overwrite", "link_unchanged", "drop_cache", "threads")
    return {**{name: getattr(parsed, name) for name in names}, "progress": not parsed.quiet}


def _torch_dtype(name: str | None) -> Any:
    if name is None:
        return None
    import torch

    return getattr(torch, name)


def _finish(summary: str, out: Path, quiet: bool) -> None:
    from perta_fast.report import printable

    if not quiet:
        print(printable(f"{summary}\nwritten to {out}"))


def _version() -> str:
    try:
        return metadata.version("perta-fast")
    except metadata.PackageNotFoundError:
        return "(not installed)"
