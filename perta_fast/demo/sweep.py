"""Every rule at every strength, through the functions that the command line runs, compared to gold."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from perta_fast.data.samples import Sample
from perta_fast.demo.files import Files
from perta_fast.demo.scoring import Score, score
from perta_fast.demo.settings import Settings
from perta_fast.progress import Bar, Progress
from perta_fast.rules import PRECONDITIONED, RULES, AnyRule, Rule
from perta_fast.runs.apply import apply
from perta_fast.runs.unlearn import unlearn

DEMO_RULES: tuple[AnyRule, ...] = (*RULES, PRECONDITIONED)
Samples = Mapping[str, Sequence[Sample]]  # by split


@dataclass(frozen=True)
class Run:
    """One rule at one strength, and how the result answers the trained questions."""

    rule: str
    lam: float
    forget: Score
    retain: Score
    gap: float  # to the gold model, in percentage points


def score_checkpoint(path: Path, samples: Samples, splits: Sequence[str]) -> dict[str, Score]:
    """Load a checkpoint with transformers and score it on each of ``splits``."""
    module = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
    return {split: score(module, samples[split]) for split in splits}


def gap_to_gold(scores: Mapping[str, Score], gold: Mapping[str, Score]) -> float:
    """|forget accuracy - gold's| + the amount by which retain accuracy is below gold's, in percentage points.

    Forgetting too little counts like forgetting more than gold, which has never seen the data. 0 is perfect.
    """
    forgetting = abs(scores["forget"].accuracy - gold["forget"].accuracy)
    return forgetting + max(0.0, gold["retain"].accuracy - scores["retain"].accuracy)


def sweep(
    files: Files, samples: Samples, gold: Mapping[str, Score], settings: Settings, progress: Progress
) -> dict[str, list[Run]]:
    """Run all rules at all their strengths; the result of each rule's best run stays on disk."""
    runs: dict[str, list[Run]] = {}
    total = sum(len(settings.lams_of(rule)) for rule in DEMO_RULES)
    with Bar(total, "rules and strengths", progress, "sample") as bar:
        for rule in DEMO_RULES:
            runs[rule] = []
            for lam in settings.lams_of(rule):
                _subtract(files, rule, lam)
                scores = score_checkpoint(files.unlearned(rule, lam), samples, ("forget", "retain"))
                runs[rule].append(Run(rule, lam, **scores, gap=gap_to_gold(scores, gold)))
                bar.update(1)
            kept = best_run(runs[rule])
            for run in runs[rule]:
                if run is not kept:
                    shutil.rmtree(files.unlearned(rule, run.lam))
    return runs


def best_run(runs: Sequence[Run]) -> Run:
    """The run with the smallest gap to gold; of equal ones, that with the smallest lambda."""
    return min(runs, key=lambda run: (run.gap, run.lam))


def _subtract(files: Files, rule: AnyRule, lam: float) -> None:
    """``unlearn`` if what the rule needs is not there yet, else ``apply``."""
    out = files.unlearned(rule, lam)
    data = (files.questions("forget"), files.questions("retain"))
    how: dict[str, Any] = {"lam": lam, "out": out, "check": False, "device": "cpu", "progress": False}
    if rule == PRECONDITIONED:
        if not files.preconditioned.exists():
            unlearn(files.full, files.base, files.tuned, *data, rule=rule, save_tuned=files.preconditioned, **how)
        else:
            apply(files.full, files.base, files.preconditioned, rule="tv", lam=lam, out=out, progress=False)
        return
    checkpoints = (files.full, files.base, files.tuned)
    estimator = Rule.of(rule, lam).estimator
    kept = None if estimator is None else files.importance(estimator)
    if kept is None or not kept.exists():
        unlearn(*checkpoints, *data, rule=rule, save_importance=kept, **how)
    else:
        apply(*checkpoints, kept / "forget", kept / "retain", rule=rule, lam=lam, out=out, progress=False)
