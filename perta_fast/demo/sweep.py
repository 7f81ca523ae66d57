"""Every rule at every strength, through the functions that the command line runs, compared to gold."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM

from perta_fast.data.samples import Sample
from perta_fast.demo.files import Files
from perta_fast.demo.scoring import Score, score
from perta_fast.progress import Bar
from perta_fast.rules import RULES, Rule
from perta_fast.runs.apply import apply
from perta_fast.runs.unlearn import unlearn

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


def sweep(files: Files, samples: Samples, gold: Mapping[str, Score], lams: Sequence[float]) -> dict[str, list[Run]]:
    """Run all rules at all ``lams``; the result of each rule's best run stays on disk."""
    runs: dict[str, list[Run]] = {}
    with Bar(len(RULES) * len(lams), "rules and strengths", True, "sample") as bar:
        for rule in RULES:
            runs[rule] = []
            for lam in lams:
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


def _subtract(files: Files, rule: str, lam: float) -> None:
    """``unlearn`` if the importance is not estimated yet, else ``apply``."""
    checkpoints = (files.full, files.base, files.tuned)
    out = files.unlearned(rule, lam)
    estimator = Rule.of(rule, lam).estimator
    kept = None if estimator is None else files.importance(estimator)
    if kept is None or not kept.exists():
        unlearn(
            *checkpoints,
            files.questions("forget"),
            files.questions("retain"),
            rule=rule,
            lam=lam,
            out=out,
            save_importance=kept,
            check=False,
            device="cpu",
            progress=False,
        )
    else:
        apply(*checkpoints, kept / "forget", kept / "retain", rule=rule, lam=lam, out=out, progress=False)
