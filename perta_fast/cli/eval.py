"""``perta eval``."""

import argparse
import sys
from pathlib import Path

from perta_fast.cli.command import Command, Option, Outcome, flag, made
from perta_fast.cli.importing import importing
from perta_fast.cli.options import (
    CHAT,
    DOWNLOAD,
    DRY_RUN,
    ESTIMATION,
    FIELDS,
    JSON,
    LIMITS,
    SHOW_LABELS,
    check_streamed,
    forecast_shown,
    keywords,
)
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import printable


def run(parsed: argparse.Namespace) -> int | Outcome:
    check_streamed(parsed)
    if parsed.dry_run:
        return _dry_run(parsed)
    with importing():
        from perta_fast.runs.evaluate import evaluate

    result = evaluate(parsed.model, **keywords(parsed, without=("model", "dry_run")), group=parsed.group)
    if not Ranks.of(parsed.group).first:
        return 0
    if parsed.quiet or parsed.json or not sys.stdout.isatty():  # else the summary has just shown them
        for note in result.notes:
            if note.startswith("warning"):
                print(f"perta: {printable(note)}", file=sys.stderr)
    return made(result.as_record(), result.summary(), parsed.out)


def _dry_run(parsed: argparse.Namespace) -> int | Outcome:
    with importing():
        from perta_fast.evaluation.request import Request
        from perta_fast.runs.evaluate import preview

    ranks = Ranks.of(parsed.group)
    with ranks.together("the estimate"):
        if ranks.first:
            request = Request.of(keywords(parsed) | {"model_or_path": parsed.model})
            request.check()
            return forecast_shown(preview(request.located(parsed.download), ranks.world))
    return 0


def _names(text: str) -> list[str]:
    return [name for name in map(str.strip, text.split(",")) if name]


COMMAND = Command(
    "eval",
    "what a model has forgotten and kept: TOFU, MUSE or own data",
    (
        Option("model", "the checkpoint to evaluate", Path, "DIR", required=True, named=True),
        Option("suite", "a benchmark; or own data, below", choices=("tofu", "muse")),
        Option("data", "the benchmark's files, under their own names", Path, "DIR", named=True),
        Option("split", "TOFU's forget set (forget10)", metavar="NAME", default="forget10"),
        Option("forget", "data that was to be forgotten", Path, "FILE", named=True),
        Option("retain", "data that was to be kept", Path, "FILE", named=True),
        Option("holdout", "data that was never trained on", Path, "FILE", named=True),
        FIELDS,
        SHOW_LABELS,
        DOWNLOAD,
        Option("reference", "what this command wrote for a model trained without the forget set", Path, "FILE"),
        Option("reference_model", "a model for the membership score mia_reference", Path, "DIR", named=True),
        Option("min_k", "share of the tokens for Min-K (0.4)", float, "K", 0.4),
        Option(
            "metrics",
            "names, patterns as forget_*, or groups (default; all has more, such as mia_gradnorm)",
            _names,
            "M,M,...",
        ),
        Option("lm_eval", "tasks of lm-evaluation-harness too", _names, "T,T,...", ()),
        Option("max_new_tokens", "longest answer (the benchmark's own)", int, "N"),
        *CHAT,
        Option("compatible", "measure as it does where it differs", choices=("open-unlearning",)),
        Option("stress", "measure it rounded or retrained too: int8, int4, relearn=STEPS", _names, "S,S,..."),
        Option(
            "against",
            "the model before unlearning, to count changed codes (that of its report)",
            Path,
            "DIR",
            named=True,
        ),
        Option(
            "open_unlearning_dir",
            "write TOFU_EVAL.json and TOFU_SUMMARY.json (MUSE_...) here too, laid out as open-unlearning does",
            Path,
            "DIR",
            makes=True,
        ),
        flag("show_text", "write answers, which may be private, to --out"),
        flag("stream", "hold one decoder layer in memory at a time; no metrics of generated text"),
        *LIMITS,
        DRY_RUN,
        *ESTIMATION,
        Option("out", "file to write, ending in .json", Path, "FILE", makes=True),
        flag("overwrite", "replace FILE"),
        flag("quiet", "no progress bar, no table"),
        JSON,
    ),
    run,
    over_ranks=True,
)
