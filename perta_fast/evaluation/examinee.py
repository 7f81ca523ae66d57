"""A model that evaluations and sweeps score on samples, and how such scores become metrics."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perta_fast.data.json_lines import Row
from perta_fast.data.samples import IGNORED, Sample
from perta_fast.evaluation import metrics
from perta_fast.evaluation.results import EvaluationFile, Metric, averaged
from perta_fast.models.greedy_answers import greedy_answers
from perta_fast.models.loading import Subject, samples_for
from perta_fast.models.token_scores import TokenScores, score_tokens
from perta_fast.progress import Progress

Scored = list[tuple[TokenScores, str]]  # of each sample, with the text of its labels


@dataclass
class Examinee:
    """A model, and how it is run.

    max_new_tokens: None takes each benchmark's own. show_text: keep answers. ``data`` and ``notes`` gather what
    the record of the evaluation will say.
    """

    subject: Subject
    batch_size: int
    max_length: int | None
    progress: Progress
    max_new_tokens: int | None = None
    show_text: bool = False
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note_file(self, role: str, path: Path, digest: str, samples: int) -> None:
        """Add a data file to the record."""
        self.data[role] = {"path": str(path.resolve()), "blake3": digest, "samples": samples}

    def tokenise(self, rows: Sequence[Row], role: str) -> list[Sample]:
        """Tokens and labels; those cut to the length limit are counted in a note."""
        samples = samples_for(self.subject, rows, self.max_length)
        if cut := sum(sample.truncated for sample in samples):
            self.notes.append(f"{role}: {cut} of {len(samples)} samples were cut to the length limit")
        return samples

    def score(self, samples: Sequence[Sample], role: str, *, detailed: bool = False) -> list[TokenScores]:
        """Score every labelled token, in one forward pass. detailed: as in ``score_tokens``."""
        scores = score_tokens(
            self.subject.module,
            samples,
            batch_size=self.batch_size,
            detailed=detailed,
            progress=self.progress,
            description=role,
        )
        if broken := sum(not math.isfinite(metrics.mean(sample.log_probs)) for sample in scores):
            self.notes.append(f"{role}: the loss of {broken} of {len(scores)} samples is not finite")
        return scores

    def score_with_texts(self, samples: Sequence[Sample], role: str, *, detailed: bool = True) -> Scored:
        """``score``, with the text of each sample's labels."""
        labels = [[label for label in sample.labels if label != IGNORED] for sample in samples]
        texts = self.subject.tokenizer.batch_decode(labels, skip_special_tokens=True)
        return list(zip(self.score(samples, role, detailed=detailed), texts, strict=True))

    def answer(
        self, prompts: Sequence[Sequence[int]], role: str, new_tokens: int, stop: Sequence[str] = ()
    ) -> list[str]:
        """Greedy answers, at most ``max_new_tokens`` long, or ``new_tokens`` if that was left open."""
        return greedy_answers(
            self.subject.module,
            self.subject.tokenizer,
            prompts,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens or new_tokens,
            stop=stop,
            progress=self.progress,
            description=f"{role} answers",
        )

    def rouge(self, references: Sequence[str], answers: Sequence[str], key: str) -> Metric:
        """ROUGE-L; ``key`` (rougeL_recall or rougeL_f1) is averaged."""
        pairs = [metrics.rouge_l(*pair) for pair in zip(references, answers, strict=True)]
        columns: dict[str, list[Any]] = {
            "rougeL_recall": [recall for recall, _ in pairs],
            "rougeL_f1": [f1 for _, f1 in pairs],
        }
        texts = {"ground_truth": references, "generation": answers} if self.show_text else {}
        return averaged(key, columns.pop(key), **columns, **texts)


def probabilities(scores: Sequence[TokenScores]) -> Metric:
    """Mean ``probability``."""
    return averaged(
        "prob",
        [metrics.probability(sample.log_probs) for sample in scores],
        avg_loss=[-metrics.mean(sample.log_probs) for sample in scores],
    )


def memorisation(scores: Sequence[TokenScores], prefix: str = "") -> dict[str, Metric]:
    """Extraction strength and exact memorisation, by names that begin with ``prefix``.

    The last label, the end, does not count; the mean leaves out the NaN of an answer that has no other.
    """
    results = {}
    for measure in (metrics.extraction_strength, metrics.exact_memorization):
        values = [measure(sample.hits[:-1]) for sample in scores]
        known = [value for value in values if not math.isnan(value)]
        results[prefix + measure.__name__] = Metric(metrics.mean(known), [{"score": value} for value in values])
    return results


def membership(forget: Scored, holdout: Scored) -> dict[str, Metric]:
    """The membership metrics from scores and texts: ``membership_auc`` of each score.

    Samples carry ``score``: forget first, then holdout. Min-K leaves the last label out, as open-unlearning.
    """
    measures: dict[str, Callable[[TokenScores, str], float]] = {
        "mia_loss": lambda scores, text: -metrics.mean(scores.log_probs),
        "mia_zlib": lambda scores, text: metrics.zlib_score(scores.log_probs, text),
        "mia_min_k": lambda scores, text: metrics.min_k(scores.log_probs[:-1]),
        "mia_min_k_plus_plus": lambda scores, text: metrics.min_k(scores.standardised[:-1]),
    }
    result = {}
    for name, measure in measures.items():
        ours, others = ([measure(*sample) for sample in rows] for rows in (forget, holdout))
        samples = [{"set": "forget", "score": score} for score in ours]
        samples += [{"set": "holdout", "score": score} for score in others]
        result[name] = Metric(metrics.membership_auc(ours, others), samples)
    return result


def privacy_leakage(membership: Mapping[str, Metric], reference: EvaluationFile) -> Metric:
    """PrivLeak from ``membership`` and a gold model's."""
    return Metric(metrics.privacy_leakage(membership["mia_min_k"].value, reference.value("mia_min_k")))
