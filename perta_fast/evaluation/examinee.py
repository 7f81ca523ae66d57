"""A model that evaluations and sweeps score on samples; and the metrics that are made of such scores.

What runs the model is imported late: data and metrics are checked without torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.data.rows import Row
from perta_fast.data.samples import IGNORED, Sample, by_row, prompt_of, row_count, truncated_count
from perta_fast.evaluation import metrics
from perta_fast.evaluation.benchmark_files import DataFile
from perta_fast.evaluation.conventions import OURS, Asked, Conventions
from perta_fast.evaluation.kept_passes import as_lists, kept_by_row, kept_scores
from perta_fast.evaluation.prompt_used import both, prompt_used
from perta_fast.evaluation.results import EvaluationFile, Metric, averaged
from perta_fast.evaluation.rouge import blind_note, is_blind, rouge_l, rouge_l_any_script
from perta_fast.files.kept_parts import KeptParts
from perta_fast.files.kept_rows import KeptRows
from perta_fast.models.scores import TokenScores
from perta_fast.progress import Progress
from perta_fast.records.report import data_path

if TYPE_CHECKING:
    import torch
    from torch import nn

    from perta_fast.models.loading import Subject

Scored = list[tuple[TokenScores, str]]  # the scores of each sample, and the text of its labels


@dataclass
class Examinee:
    """A model, and how it is run.

    max_new_tokens: None takes each benchmark's own. show_text: keep answers. kept: finished passes, if they are kept.
    min_k: share of the tokens for Min-K and Min-K++. conventions: how rows become tokens, what is masked, how the model
    answers, what counts. prompt (of ``prompt_used``), data, notes: for the record of the evaluation. asked_type: for a
    reference model to run in; None takes its own.
    """

    subject: "Subject"
    batch_size: int
    max_length: int | None
    progress: Progress
    max_new_tokens: int | None = None
    show_text: bool = False
    kept: KeptParts | None = None
    min_k: float = metrics.MIN_K
    conventions: Conventions = OURS
    prompt: dict[str, Any] | None = None
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    asked_type: "torch.dtype | None" = None

    def note_file(self, role: str, file: DataFile) -> None:
        """Add a data file to the record."""
        self.data[role] = {"path": data_path(file.path), "blake3": file.digest, "samples": len(file.rows)}
        if file.read_as:
            self.data[role]["read_as"] = file.read_as
            self.notes.append(f"{role} data: {file.read_as}")

    def tokenise(self, rows: Sequence[Row], role: str) -> list[Sample]:
        """Tokens and labels; a note counts the samples that were cut to the length limit."""
        from perta_fast.models.loading import samples_for

        asked = self._asked(rows)
        given = rows if asked is None else [row.sample for row in asked]
        samples = samples_for(self.subject, given, self.max_length, self.progress)
        if cut := truncated_count(samples):
            self.notes.append(f"{role}: {cut} of {row_count(samples)} samples were cut to the length limit")
        used = prompt_used(self.subject.tokenizer, rows, samples)
        self.prompt = used if self.prompt is None else both(self.prompt, used)
        return samples

    def _asked(self, rows: Sequence[Row]) -> list[Asked] | None:
        """Rows as tokens, where the conventions have their own; None if not."""
        own, tokenizer = self.conventions.asked, self.subject.tokenizer
        return None if own is None else [own(row, tokenizer) for row in rows]

    def prompts(self, rows: Sequence[Row], samples: Sequence[Sample]) -> list[tuple[int, ...]]:
        """What the model answers to; ``samples`` are those of ``rows``."""
        asked = self._asked(rows)
        return [prompt_of(sample) for sample in samples] if asked is None else [row.prompt for row in asked]

    def truths(self, rows: Sequence[Row]) -> list[str]:
        """What the answers to questions are compared with."""
        asked, tokenizer = self._asked(rows), self.subject.tokenizer
        return [row.content["answer"] for row in rows] if asked is None else [row.truth(tokenizer) for row in asked]

    def score(self, samples: Sequence[Sample], role: str, *, detailed: bool = False) -> list[TokenScores]:
        """Score every labelled token of each row, in one forward pass. detailed: as in ``score_tokens``."""
        scores = kept_scores(
            self.kept,
            f"{role} scores",
            as_lists(samples),
            lambda rows: self._score(samples, role, detailed=detailed, rows=rows),
        )
        if broken := sum(not math.isfinite(metrics.mean(sample.log_probs)) for sample in scores):
            self.notes.append(f"{role}: the loss of {broken} of {len(scores)} samples is not finite")
        return scores

    def score_under(self, stress: str, samples: Sequence[Sample], role: str) -> list[TokenScores]:
        """``score``, detailed, of a model that is changed for now: the pass is not kept."""
        return self._score(samples, f"{role} {stress}", detailed=True)

    def score_by(self, reference: Path, sets: Mapping[str, Sequence[Sample]]) -> dict[str, list[TokenScores]]:
        """What the model in ``reference`` scores on samples of this one, by role. It is loaded if no pass is kept.

        Raises InputError if it reads other tokens.
        """
        from perta_fast.evaluation.reference_model import load_reference
        from perta_fast.models.loading import samples_for

        load = cache(partial(load_reference, reference, self.subject, self.asked_type))

        def score(samples: Sequence[Sample], role: str, rows: KeptRows) -> list[TokenScores]:
            known = samples_for(load(), samples, None)  # checks that it can read them
            return self._run(load().module, known, f"{role} reference", rows=rows)

        return {
            role: kept_scores(self.kept, f"{role} reference scores", as_lists(samples), partial(score, samples, role))
            for role, samples in sets.items()
        }

    def _score(
        self, samples: Sequence[Sample], description: str, *, detailed: bool, rows: KeptRows | None = None
    ) -> list[TokenScores]:
        return self._run(self.subject.module, samples, description, detailed=detailed, rows=rows)

    def _run(
        self,
        module: "nn.Module",
        samples: Sequence[Sample],
        description: str,
        *,
        detailed: bool = False,
        rows: KeptRows | None = None,
    ) -> list[TokenScores]:
        from perta_fast.models.token_scores import score_rows

        return score_rows(
            module,
            samples,
            batch_size=self.batch_size,
            detailed=detailed,
            hidden=self.hidden,
            rows=rows,
            progress=self.progress,
            description=description,
        )

    @property
    def hidden(self) -> int | None:
        """The token that is masked wherever it stands, if any."""
        return self.conventions.hidden(self.subject.tokenizer)

    def score_with_texts(self, samples: Sequence[Sample], role: str, *, detailed: bool = True) -> Scored:
        """``score``, with the text of each row's labels."""
        labels = [
            [label for k in numbers for label in samples[k].labels if label != IGNORED] for numbers in by_row(samples)
        ]
        texts = self.subject.tokenizer.batch_decode(labels, skip_special_tokens=True)
        return list(zip(self.score(samples, role, detailed=detailed), texts, strict=True))

    def answer(
        self, prompts: Sequence[Sequence[int]], role: str, new_tokens: int, stop: Sequence[str] = ()
    ) -> list[str]:
        """Greedy answers, at most ``max_new_tokens`` long, or ``new_tokens`` if that is None."""
        from perta_fast.models.greedy_answers import greedy_answers

        tokenizer, conventions = self.subject.tokenizer, self.conventions
        answers: list[str] = kept_by_row(
            self.kept,
            f"{role} answers",
            list(map(list, prompts)),
            lambda rows: greedy_answers(
                self.subject.module,
                tokenizer,
                prompts,
                batch_size=self.batch_size,
                max_new_tokens=self.max_new_tokens or new_tokens,
                stop=stop,
                hidden=self.hidden,
                as_configured=conventions.as_configured,
                rows=rows,
                progress=self.progress,
                description=f"{role} answers",
            ),
        )
        return list(map(conventions.read, answers))

    def rouge(
        self, name: str, references: Sequence[str], answers: Sequence[str], key: str, *, any_script: bool = False
    ) -> Metric:
        """ROUGE-L; ``key`` (rougeL_recall or rougeL_f1) is averaged. name: of the metric, for a note.

        any_script: with words of any script, where references have such.
        """
        blind = sum(map(is_blind, references))
        if blind and not any_script:
            self.notes.append(blind_note(name, blind, len(references)))
        recall, f1 = zip(*map(rouge_l_any_script if any_script else rouge_l, references, answers), strict=True)
        columns = {"rougeL_recall": recall, "rougeL_f1": f1}
        texts = {"ground_truth": references, "generation": answers} if self.show_text else {}
        return averaged(key, columns.pop(key), **columns, **texts)


def probabilities(scores: Sequence[TokenScores]) -> Metric:
    return averaged(
        "prob",
        [metrics.probability(sample.log_probs) for sample in scores],
        avg_loss=[-metrics.mean(sample.log_probs) for sample in scores],
    )


def memorisation(
    scores: Sequence[TokenScores], prefix: str = "", end_alone: float = OURS.end_alone
) -> dict[str, Metric]:
    """Extraction strength and exact memorisation, by names that begin with ``prefix``.

    The last label, the end of the answer, does not count; an answer without another label is not in the mean, unless
    ``end_alone`` is a number, which is then its extraction strength.
    """
    results = {}
    for measure in (metrics.extraction_strength, metrics.exact_memorization):
        values = [measure(sample.hits[:-1]) for sample in scores]
        if measure is metrics.extraction_strength:
            values = [
                end_alone if is_end_alone(sample) else value for sample, value in zip(scores, values, strict=True)
            ]
        known = [value for value in values if not math.isnan(value)]
        results[prefix + measure.__name__] = Metric(metrics.mean(known), [{"score": value} for value in values])
    return results


def membership(forget: Scored, holdout: Scored, share: float, end_alone: float = OURS.end_alone) -> dict[str, Metric]:
    """``membership_auc`` of each membership score. share: of the tokens, for Min-K and Min-K++.

    An answer that is only its end has no Min-K and no Min-K++, so their AUCs are those of the others, unless
    ``end_alone`` is a number, which is then its value.
    """
    sets = {"forget": forget, "holdout": holdout}
    values = {
        role: [_membership_scores(*sample, share, end_alone) for sample in scored] for role, scored in sets.items()
    }
    alone = {role: [is_end_alone(score) for score, _ in scored] for role, scored in sets.items()}
    return {
        name: auc_of({role: [of_sample[name] for of_sample in values[role]] for role in sets}, alone)
        for name in values["forget"][0]
    }


def auc_of(values: Mapping[str, Sequence[float]], alone: Mapping[str, Sequence[bool]]) -> Metric:
    """``membership_auc`` of the values of the forget and the holdout set; its samples are in this order.

    alone: which answers are only their end. If there was nothing to make their value of, they are left out; NaN of
    another answer comes from scores that are not finite.
    """
    known = {
        role: [value for value, end in zip(own, alone[role], strict=True) if not (end and math.isnan(value))]
        for role, own in values.items()
    }
    samples = [{"set": role, "score": value} for role, own in values.items() for value in own]
    return Metric(metrics.membership_auc(known["forget"], known["holdout"]), samples)


def is_end_alone(scores: TokenScores) -> bool:
    """Whether an answer is only its end: without the last label nothing is left of it."""
    return scores.log_probs.size < 2


def _membership_scores(scores: TokenScores, text: str, share: float, end_alone: float) -> dict[str, float]:
    """The scores of one sample. Like open-unlearning, Min-K leaves out the last label."""
    alone = is_end_alone(scores)
    return {
        "mia_loss": -metrics.mean(scores.log_probs),
        "mia_zlib": metrics.zlib_score(scores.log_probs, text),
        "mia_min_k": end_alone if alone else metrics.min_k(scores.log_probs[:-1], share),
        "mia_min_k_plus_plus": end_alone if alone else metrics.min_k(scores.standardised[:-1], share),
    }


def privacy_leakage(membership: Mapping[str, Metric], reference: EvaluationFile) -> Metric:
    """PrivLeak from ``membership`` and a gold model's."""
    return Metric(metrics.privacy_leakage(membership["mia_min_k"].value, reference.value("mia_min_k")))
