"""Options that several commands share, and what they come to."""

import argparse
from pathlib import Path
from typing import Any

from perta_fast.errors import InputError
from perta_fast.memory import parse_size
from perta_fast.rules import RULES


def add_checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint to unlearn")
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="what it was tuned from")
    parser.add_argument(
        "--tuned", type=Path, required=True, metavar="DIR", help="the base, tuned on the forget data alone"
    )


def add_rule(parser: argparse.ArgumentParser, *, with_lam: bool = True) -> None:
    parser.add_argument("--rule", choices=RULES, default="fisher", help="how w is found (fisher)")
    if with_lam:
        parser.add_argument("--lam", type=float, required=True, metavar="L", help="strength lambda")
    parser.add_argument("--p", type=float, metavar="P", help="exponent of the importances (the rule's own)")
    parser.add_argument("--alpha", type=float, default=1.0, metavar="A", help="weight of retaining (1)")
    parser.add_argument(
        "--threshold", type=float, metavar="T", help="hard mask: w becomes 1 where w > T, else 0"
    )


def rule_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(parsed, name) for name in ("rule", "lam", "p", "alpha", "threshold")}


def add_stream(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stream",
        action="store_true",
        help="estimate with one decoder layer in memory at a time, for models larger than the memory",
    )
    parser.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="what --stream may take of the memory, as in 12GiB; chooses batches and overlap (no limit)",
    )
    parser.add_argument(
        "--device-memory", type=_size, metavar="SIZE", help="what --stream may take of the GPU's (no limit)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what --stream will take, from config.json, and stop"
    )


def memory_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """Limits that were given. Raises InputError for an option that means nothing without ``--stream``."""
    limits = {name: getattr(parsed, name) for name in ("memory", "device_memory")}
    given = {name: size for name, size in limits.items() if size is not None}
    if not parsed.stream and (given or parsed.dry_run):
        option = "dry_run" if parsed.dry_run else next(iter(given))
        raise InputError(f"--{option.replace('_', '-')} is for streamed runs; add --stream")
    return given


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_estimation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples at a time (8)")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens a sample is cut to (the model's limit)"
    )
    parser.add_argument("--device", metavar="D", help="cpu or cuda (cuda if there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="type to run in (the checkpoint's)"
    )


def estimation_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    names = ("batch_size", "max_length", "device")
    return {**{name: getattr(parsed, name) for name in names}, "dtype": _torch_dtype(parsed.dtype)}


def add_at(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--at", choices=("base", "model"), default="base", help="where the gradients are taken (base)"
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is not empty")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def output_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    return {"out": parsed.out, "overwrite": parsed.overwrite, "progress": not parsed.quiet}


def add_result(parser: argparse.ArgumentParser) -> None:
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


def result_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    names = ("out", "in_place", "overwrite", "link_unchanged", "drop_cache", "threads")
    return {**{name: getattr(parsed, name) for name in names}, "progress": not parsed.quiet}


def _torch_dtype(name: str | None) -> Any:
    if name is None:
        return None
    import torch

    return getattr(torch, name)


def finish(summary: str, out: Path, quiet: bool) -> None:
    from perta_fast.records.typed_json import printable

    if not quiet:
        print(printable(f"{summary}\nwritten to {out}"))
