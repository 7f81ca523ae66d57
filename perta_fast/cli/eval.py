"""``perta eval``."""

import argparse
from pathlib import Path
from typing import Any

from perta_fast.cli.options import add_estimation, estimation_settings


def add(commands: Any) -> None:
    parser = commands.add_parser("eval", help="what a model has forgotten and kept: TOFU, MUSE or own data")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint to evaluate")
    parser.add_argument("--suite", choices=("tofu", "muse"), help="a benchmark; or own data, below")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the benchmark's files, under their own names")
    parser.add_argument("--split", default="forget10", metavar="NAME", help="TOFU's forget set (forget10)")
    parser.add_argument("--forget", type=Path, metavar="FILE", help="JSON lines that were to be forgotten")
    parser.add_argument("--retain", type=Path, metavar="FILE", help="JSON lines that were to be kept")
    parser.add_argument("--holdout", type=Path, metavar="FILE", help="JSON lines that were never trained on")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="what this command wrote for a model trained without the forget set",
    )
    parser.add_argument(
        "--lm-eval", type=_tasks, default=(), metavar="T,T,...", help="tasks of lm-evaluation-harness too"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (the benchmark's own)")
    parser.add_argument(
        "--system-prompt", metavar="TEXT", help="given with every question, by the chat template"
    )
    parser.add_argument("--date-string", metavar="DATE", help="today's date, for a chat template that tells it")
    parser.add_argument(
        "--show-text", action="store_true", help="write answers, which may be private, to --out"
    )
    add_estimation(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write, ending in .json")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no table")
    parser.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    from perta_fast.evaluation.run import evaluate

    names = ("suite", "data", "split", "forget", "retain", "holdout", "reference", "lm_eval", "max_new_tokens")
    result = evaluate(
        parsed.model,
        **{name: getattr(parsed, name) for name in (*names, "system_prompt", "date_string")},
        **{name: getattr(parsed, name) for name in ("show_text", "out", "overwrite")},
        **estimation_settings(parsed),
        progress=not parsed.quiet,
    )
    if not parsed.quiet:
        print(result.summary())
        if parsed.out is not None:
            print(f"written to {parsed.out}")
    return 0


def _tasks(text: str) -> list[str]:
    return [task for task in text.split(",") if task]
