"""The whole demo, from word lists to the table."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging

from perta_fast.demo.checkpoints import train_models
from perta_fast.demo.clock import Clock
from perta_fast.demo.files import Files, work_directory
from perta_fast.demo.real import is_installed, run_real, save_start
from perta_fast.demo.scoring import Score
from perta_fast.demo.selectivity import measure_update
from perta_fast.demo.settings import FAST, FULL, Settings
from perta_fast.demo.sweep import Run, Samples, best_run, gap_to_gold, score_checkpoint, sweep
from perta_fast.demo.table import LEGEND, Line, explain, format_table
from perta_fast.errors import InputError, printable, shell_command
from perta_fast.progress import Progress
from perta_fast.records.versions import installed_versions
from perta_fast.rules import PRECONDITIONED

_SPLITS = ("forget", "retain", "forget_rephrased", "retain_rephrased")


def run_demo(
    out: Path | None = None,
    *,
    save: Path | None = None,
    model: str | None = None,
    fast: bool = False,
    seed: int = 0,
    progress: Progress = True,
) -> None:
    """Teach a model made-up authors, unlearn some of them, and print the results.

    model: "smollm2" is SmolLM2-135M-Instruct, unlearned by the default of ``unlearn``; "small" are small models,
    trained on the spot and unlearned by every rule. None takes the first if its Python package is installed.

    out: directory to make, for data, float32 checkpoints, importances, the best result of each rule (see ``Files``) and
    ``demo.json``; None works in a temporary directory. save: only make this directory, with SmolLM2-135M-Instruct as
    ``base`` and the questions, for a run of one's own. fast: a smaller model that learns less, for tests. seed: the
    same seed gives the same numbers on one machine. progress: False shows the results alone. All runs on the CPU.

    Raises InputError if ``out`` exists and is not an empty directory. After an error nothing is left behind.
    """
    if model == "smollm2" and fast:
        raise InputError("‹fast› is for the small models; leave it out, or take ‹model› small")
    if save is not None:
        if out is not None or fast or model == "small":
            raise InputError(
                "‹save› writes only SmolLM2 and its questions: it goes with none of ‹out›, ‹fast› and ‹model› small"
            )
        with work_directory(save) as directory, _torch_settings(None):
            save_start(Files(directory), seed)
        files = ", ".join(f"{split}.jsonl" for split in ("all", "forget", "retain"))
        if progress:
            print(printable(f"written to {save}: the model in base, and the questions in {files}"))
        return
    if model == "smollm2" or (model is None and not fast and is_installed()):
        with work_directory(out) as directory, _torch_settings(None):
            run_real(Files(directory), seed, progress=progress)
        return
    _run_small(out, FAST if fast else FULL, seed, progress)


def _run_small(out: Path | None, settings: Settings, seed: int, progress: Progress) -> None:
    clock = Clock()
    with work_directory(out) as directory, _torch_settings(settings.threads):
        files = Files(directory)
        samples = train_models(files, settings, seed, clock, progress)
        with clock.phase("scoring"):
            gold = score_checkpoint(files.gold, samples, _SPLITS)
        with clock.phase("importance, subtraction, scoring"):
            runs = sweep(files, samples, gold, settings, progress)
        with clock.phase("scoring"):
            lines = _lines(files, samples, gold, runs)
        by_name = {line.name: line for line in lines}
        others = [by_name[rule] for rule in runs if rule != "tv"]
        print(f"\n{format_table(lines)}\n\n{LEGEND}\n\n{explain(by_name['tv'], others)}\n")
        print(clock.summary())
        result = {
            "settings": {"seed": seed, **asdict(settings)},
            "table": [asdict(line) for line in lines],
            "runs": {rule: [asdict(run) for run in tried] for rule, tried in runs.items()},
            "seconds": asdict(clock),
            "versions": installed_versions(),
        }
        files.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if out is not None:
            best = min((best_run(tried) for tried in runs.values()), key=lambda run: run.gap)
            where = printable(f"Everything is in {out}. This repeats the row {best.rule}:")
            print(f"\n{where}\n{_command(files, best)}")


def _lines(files: Files, samples: Samples, gold: dict[str, Score], runs: dict[str, list[Run]]) -> list[Line]:
    lines = []
    for name, path in (("theta_full", files.full), ("theta_0", files.base)):
        scores = score_checkpoint(path, samples, _SPLITS)
        lines.append(Line(name, None, scores, gap_to_gold(scores, gold)))
    lines.append(Line("gold", None, gold, 0.0))
    for rule, tried in runs.items():
        best = best_run(tried)
        scores = score_checkpoint(files.unlearned(rule, best.lam), samples, _SPLITS)
        lines.append(Line(rule, best.lam, scores, best.gap, measure_update(files, rule, best.lam)))
    return lines


def _command(files: Files, run: Run) -> str:
    arguments: dict[str, str | Path] = {"model": files.full, "base": files.base, "tuned": files.tuned}
    if run.rule == PRECONDITIONED:
        arguments |= {"retain": files.questions("retain"), "device": "cpu"}
    elif run.rule != "tv":
        arguments |= {"forget": files.questions("forget"), "retain": files.questions("retain"), "device": "cpu"}
    arguments |= {"rule": run.rule, "lam": f"{run.lam:g}", "out": files.directory / "again"}
    parts = [part for name, value in arguments.items() for part in (f"--{name}", value)]
    return shell_command("perta", "unlearn", *parts)


@contextmanager
def _torch_settings(threads: int | None) -> Iterator[None]:
    """Set the number of torch's threads, and switch off transformers' bar for each checkpoint."""
    before, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(threads or before)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if bars:
            logging.enable_progress_bar()
