"""``perta report``."""

import argparse
from pathlib import Path

from perta_fast.cli.command import Command, Option, flag
from perta_fast.cli.importing import importing
from perta_fast.cli.options import FIELDS, QUIET, keywords
from perta_fast.errors import printable


def run(parsed: argparse.Namespace) -> int:
    with importing():
        from perta_fast.reporting import write_report

    settings = keywords(parsed, without=("sweep", "eval"))
    write_report(sweeps=parsed.sweep, evaluations=parsed.eval, **settings)
    if not parsed.quiet:
        print(printable(f"written to {parsed.out}"))
    return 0


COMMAND = Command(
    "report",
    "one HTML page that shows what a run did",
    (
        Option("run", "output directory of perta unlearn, apply or merge", Path, "RUN", positional=True),
        Option("sweep", "sweeps, for the trade-off curves", Path, "DIR", [], several=True),
        Option("eval", "evaluations, a gold model's too", Path, "FILE", [], several=True),
        Option("prompts", "questions to ask before and after", Path, "FILE"),
        FIELDS,
        flag("show_text", "put answers, which may be private, on the page; without --prompts, to rows of the run"),
        Option("out", "file to write", Path, "PAGE.html", required=True, makes=True),
        Option("png", "the plots as files too", Path, "DIR", makes=True),
        Option("verify", "hash all files again, compute a few tensors again (on)", bool, default=True, negatable=True),
        flag("overwrite", "replace the page and the plots"),
        QUIET,
    ),
    run,
)
