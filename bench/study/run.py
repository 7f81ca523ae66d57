"""The study of docs/study.md: ``python -m bench.study.run --data TOFU --work DIR``.

Trains small models on TOFU (arXiv 2401.06121), unlearns them by every rule and by three methods that train, and
scores them. You can stop or kill the command at any time: the same command goes on, and repeats only the pieces that
were unfinished. If you start it several times, the processes share the work.
``--report`` writes the tables into docs/study.md from the pieces that are finished.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from transformers.utils import logging

from bench.study import analyses, main_table, tables
from bench.study.data import Split, Tofu
from bench.study.models import Models
from bench.study.settings import SIZES
from bench.study.store import Busy, NotYet, Store
from bench.study.trial import Trial
from perta_fast.errors import InputError, PertaError
from perta_fast.evaluation.tofu import SPLITS

Stage = Callable[[], object]
_PAUSE = 5.0  # seconds to wait while other processes make all remaining pieces
PAGE = Path(__file__).resolve().parents[2] / "docs" / "study.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study or write its report; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    try:
        _check(options)
        if options.report:
            tables.write(PAGE, _trials(options, compute=False))
            return 0
        options.work.mkdir(parents=True, exist_ok=True)
        run_stages([lambda: run_stages(list(_stages(options)))])  # twice, as another process may be writing the splits
    except PertaError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except NotYet as error:
        print(f"{options.work}: has no study of this data and size yet ({error})", file=sys.stderr)
        return 2
    return 0


def run_stages(stages: list[Stage]) -> None:
    """Run the stages in order; those that wait for another process are tried again after the rest."""
    while stages:
        waiting = []
        for stage in stages:
            try:
                stage()
            except Busy:
                waiting.append(stage)
        if len(waiting) == len(stages):
            time.sleep(_PAUSE)
        stages = waiting


def _trials(options: argparse.Namespace, *, compute: bool) -> list[Trial]:
    """Every seed with every split, seed by seed. Learning rates and alpha are chosen on the first seed."""
    store, settings = Store(options.work, compute=compute), SIZES[options.size]
    tofu = Tofu.read(options.data, settings)
    splits = [Split.of(name, tofu, store) for name in options.splits]
    models = [Models(tofu, settings, seed, store) for seed in options.seeds]
    firsts = [Trial(models[0], split) for split in splits]
    others = [Trial(of_seed, first.split, first) for of_seed in models[1:] for first in firsts]
    return firsts + others


def _stages(options: argparse.Namespace) -> Iterator[Stage]:
    """The work of the study: first the main table of every seed, then the analyses, most of them on the last split."""
    trials = _trials(options, compute=True)
    on_last = [trial for trial in trials if trial.split.name == options.splits[-1]]
    yield from chain.from_iterable(map(main_table.stages, trials))
    yield from chain.from_iterable(map(analyses.stages_of_all, trials))
    yield from analyses.stages_of_one(on_last[0])
    yield from analyses.draw_stages(on_last[0])
    yield from chain.from_iterable(map(analyses.stages, on_last))


def _check(options: argparse.Namespace) -> None:
    for split in options.splits:
        if split not in SPLITS:
            raise InputError(f"--splits: {split!r} is not one of {', '.join(SPLITS)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.study.run", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with TOFU's files, as JSON lines")
    parser.add_argument("--work", type=Path, required=True, help="folder for all pieces; an unfinished study goes on")
    parser.add_argument("--seeds", type=_integers, default=[0, 1, 2], help="0,1,2")
    parser.add_argument("--splits", type=lambda text: text.split(","), default=list(SPLITS), help=",".join(SPLITS))
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--report", action="store_true", help="only write the tables, from the finished pieces")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads that torch uses")
    return parser


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
