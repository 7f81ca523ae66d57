"""``perta report``."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser("report", help="one HTML page that shows what a run did")
    parser.add_argument("run", type=Path, metavar="RUN", help="output directory of perta unlearn or apply")
    parser.add_argument(
        "--sweep",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="sweeps, for the trade-off curves",
    )
    parser.add_argument(
        "--eval",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="evaluations, a gold model's too",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="JSON lines to ask before and after")
    parser.add_argument(
        "--show-text", action="store_true", help="put answers, which may be private, on the page"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE.html", help="file to write")
    parser.add_argument("--png", type=Path, metavar="DIR", help="the plots as files too")
    parser.add_argument("--overwrite", action="store_true", help="replace the page and the plots")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    parser.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    from perta_fast.records.typed_json import printable
    from perta_fast.reporting import write_page

    write_page(
        parsed.run,
        parsed.out,
        sweeps=parsed.sweep,
        evaluations=parsed.eval,
        prompts=parsed.prompts,
        show_text=parsed.show_text,
        png=parsed.png,
        overwrite=parsed.overwrite,
        progress=not parsed.quiet,
    )
    if not parsed.quiet:
        print(printable(f"written to {parsed.out}"))
    return 0
