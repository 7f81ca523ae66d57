"""The study on real models: ``python -m bench.study.real.run --data TOFU --work DIR``.

Tunes SmolLM2-135M-Instruct and Gemma 3 270M on a part of TOFU (arXiv 2401.06121), unlearns it by every rule and by
other methods, and asks what is left. You can stop or kill the command at any time: the same command goes on. If you
start it several times, the processes share the work. ``--report`` writes the tables into docs/study.md from what is
finished, of every size. ``--keep`` copies what was measured into the project, where a study on another machine takes it
up.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging

from bench.study.real import tables
from bench.study.real.afterwards import after_names, after_of
from bench.study.real.curves import curve, landmark, landmarks
from bench.study.real.data import Rows
from bench.study.real.kept import KEPT, keep, take_up
from bench.study.real.methods import (
    SHARED,
    alpha_methods,
    importance_methods,
    main_methods,
    other_tuned_methods,
    part_methods,
)
from bench.study.real.models import Models
from bench.study.real.rivals import STEPS, rates, trained
from bench.study.real.settings import SIZES, SMALL
from bench.study.real.shares import shares
from bench.study.real.sources import SOURCES
from bench.study.real.training_rivals import METHODS
from bench.study.run import PAGE, run_stages
from bench.study.store import Store
from perta_fast.errors import PertaError

Stage = Callable[[], object]
UNTIED = ("smollm2",)  # also studied with an output head of its own


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study or write its report; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    try:
        sizes = [options.size] if options.size else SIZES if options.report else [SMALL]
        trials = [models for size in sizes for models in _trials(options, size)]
        options.work.mkdir(parents=True, exist_ok=True)
        if options.keep:
            print(f"{keep(options.work)} pieces are kept in {KEPT}")
            return 0
        take_up(options.work)
        if options.report:
            tables.write(PAGE, trials)
            return 0
        run_stages(list(_stages(trials)))
    except PertaError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


def _trials(options: argparse.Namespace, size: str) -> list[Models]:
    """Every model and seed that was asked for, at a size."""
    settings = SIZES[size]
    rows = Rows.read(options.data, settings)
    store = Store(options.work, compute=not options.report)
    kinds = [(name, False) for name in options.models] + [(name, True) for name in UNTIED if name in options.models]
    return [Models(name, rows, settings, seed, store, untied) for seed in options.seeds for name, untied in kinds]


def _stages(trials: Sequence[Models]) -> Iterator[Stage]:
    """The main question for every model and seed, then the others."""
    real = [models for models in trials if not models.untied]
    for models in real:
        yield from (partial(curve, models, method) for method in [*main_methods(), *other_tuned_methods()])
        yield from _landmarks(models)
    for models in real:
        yield from (partial(after_of, models, name) for name in after_names())
        yield from (partial(curve, models, method) for method in STEPS)
        for method in METHODS:
            yield from (partial(trained, models, method, rate) for rate in rates(models, method))
    for models in trials:
        yield from _landmarks(models)
        yield from (partial(shares, models, weighing) for weighing in SHARED)
        few = [] if models.untied else [*alpha_methods(), *importance_methods(models.settings.few_rows)]
        others = [*main_methods(), *part_methods(models.untied), *few]
        yield from (partial(curve, models, method) for method in others)


def _landmarks(models: Models) -> Iterator[Stage]:
    return (partial(landmark, models, name) for name in landmarks(models.untied))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.study.real.run", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with TOFU's files, as JSON lines")
    parser.add_argument("--work", type=Path, required=True, help="folder for all pieces; an unfinished study goes on")
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(SOURCES), help=",".join(SOURCES))
    parser.add_argument(
        "--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1], help="0,1"
    )
    parser.add_argument("--size", choices=SIZES, help=f"{SMALL}; of --report, every size")
    parser.add_argument("--report", action="store_true", help="only write the tables, from the finished pieces")
    parser.add_argument("--keep", action="store_true", help="only copy what was measured into the project")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads that torch uses")
    return parser


if __name__ == "__main__":
    sys.exit(main())
