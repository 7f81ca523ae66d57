"""The study of docs/study.md: ``python -m bench.study.run --data TOFU --work DIR``.

Trains small models on TOFU (arXiv 2401.06121), unlearns by every rule and by training, and scores. It may be
stopped at any time, also killed: the same command goes on, and makes again only what it was in the middle of.
Given several times at once, the processes share the work.
``--report`` writes the tables into docs/study.md from what is there.
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
_PAUSE = 5.0  # seconds, while other processes make all that is left to do
PAGE = Path(__file__).resolve().parents[2] / "docs" / "study.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or report; the exit status."""
    options = _parser().parse_args(arguments)
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    try:
        _check(options)
        if options.report:
            tables.write(PAGE, _trials(options, compute=False))
            return 0
        options.work.mkdir(parents=True, exist_ok=True)
        _run([lambda: _run(list(_stages(options)))])  # another process may be writing the splits
    except PertaError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except NotYet as missing:
        print(f"{options.work}: has no study of this data and size yet ({missing})", file=sys.stderr)
        return 2
    return 0


def _run(stages: list[Stage]) -> None:
    """In order, but for what waits for another process."""
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
    """All seeds with all splits, seed by seed. The first seed is the one by which learning rates are chosen."""
    store, settings = Store(options.work, compute=compute), SIZES[options.size]
    tofu = Tofu.read(options.data, settings)
    splits = [Split.of(name, tofu, store) for name in options.splits]
    models = [Models(tofu, settings, seed, store) for seed in options.seeds]
    firsts = [Trial(models[0], split) for split in splits]
    others = [Trial(each, first.split, first) for each in models[1:] for first in firsts]
    return firsts + others


def _stages(options: argparse.Namespace) -> Iterator[Stage]:
    """The main table of every seed first. Most analyses are on the last split and one seed."""
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
            raise InputError(f"--splits has {split!r}; each must be one of {', '.join(SPLITS)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.study.run", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with TOFU's files, as JSON lines")
    parser.add_argument("--work", type=Path, required=True, help="folder to keep everything in, and to go on from")
    parser.add_argument("--seeds", type=_integers, default=[0, 1, 2], help="0,1,2")
    parser.add_argument("--splits", type=lambda text: text.split(","), default=list(SPLITS), help=",".join(SPLITS))
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--report", action="store_true", help="only write the tables of what is there")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    return parser


def _integers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
