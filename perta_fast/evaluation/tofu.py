"""TOFU (arXiv 2401.06121): probability, ROUGE-L recall and truth ratio on four sets, utility and forget quality."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from perta_fast.data.rows import Row
from perta_fast.data.samples import Sample
from perta_fast.errors import InputError
from perta_fast.evaluation import metrics
from perta_fast.evaluation.benchmark_files import DataFile, benchmark_file, read_benchmark_file
from perta_fast.evaluation.examinee import Scored, probabilities
from perta_fast.evaluation.metric_table import GENERATED, MetricTable
from perta_fast.evaluation.offers import (
    ANSWER_TOKENS,
    offer_membership,
    offer_memorisation,
    offer_paraphrased,
    offer_rouge,
    offer_truth_ratio,
    paraphrased_answers,
    wrong_answers,
)
from perta_fast.evaluation.results import EvaluationFile, Metric, averaged
from perta_fast.models.scores import TokenScores

SPLITS = ("forget01", "forget05", "forget10")
_FICTITIOUS = ("forget", "retain")  # sets with paraphrased answers
_UTILITY = (
    *("retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio"),
    *("ra_Q_A_Prob_normalised", "ra_Q_A_ROUGE", "ra_Truth_Ratio"),
    *("wf_Q_A_Prob_normalised", "wf_Q_A_ROUGE", "wf_Truth_Ratio"),
)


def read_tofu(folder: Path, split: str) -> dict[str, DataFile]:
    """The four sets by the first part of their metrics' names; ``holdout`` too, if the folder has it.

    The files have the names of the data set: ``forget10_perturbed`` and so on, .jsonl or .json.
    """
    if split not in SPLITS:
        raise InputError(f"‹split› is {split!r}; it must be one of {', '.join(SPLITS)}")
    fictitious = ("question", "answer", "paraphrased_answer")
    wrong = ("perturbed_answer",)
    files = {
        "forget": read_benchmark_file(folder, f"{split}_perturbed", fictitious, wrong),
        "retain": read_benchmark_file(folder, "retain_perturbed", fictitious, wrong),
        "ra": read_benchmark_file(folder, "real_authors_perturbed", fictitious[:2], wrong),
        "wf": read_benchmark_file(folder, "world_facts_perturbed", fictitious[:2], wrong),
    }
    holdout = split.replace("forget", "holdout")
    if benchmark_file(folder, holdout) is not None:
        files["holdout"] = read_benchmark_file(folder, holdout, fictitious[:2])
    return files


class TofuMetrics(MetricTable):
    """All metrics of TOFU; with ``reference``, forget quality, and PrivLeak if there is a holdout set."""

    def __init__(self, files: Mapping[str, DataFile], reference: EvaluationFile | None) -> None:
        super().__init__(files)
        for role in ("forget", "retain", "ra", "wf"):
            self._offer_set(role)
        self.offer("model_utility", self._utility, needs=GENERATED)
        if "holdout" in files:
            offer_membership(self, reference)
        if reference is None:
            self.lacking |= {"forget_quality": "--reference", "forget_quality_log10": "--reference"}
        else:
            self.offer("forget_quality", lambda: self._quality(reference))
            self.offer("forget_quality_log10", self._log_quality)

    def _offer_set(self, role: str) -> None:
        fictitious = role in _FICTITIOUS
        self.offer(f"{role}_Q_A_Prob", lambda: probabilities(self._scores(role)))
        if not fictitious:
            self.offer(f"{role}_Q_A_Prob_normalised", lambda: self._normalised(role))
        truth = self.files[role].texts("answer")
        offer_rouge(
            self, f"{role}_Q_A_ROUGE", truth, partial(self._answers, role), "rougeL_recall", partial(self._truths, role)
        )
        offer_truth_ratio(
            self, role, partial(paraphrased_answers, self, role) if fictitious else partial(self._scores, role)
        )
        if fictitious:
            offer_memorisation(self, "" if role == "forget" else "retain_", partial(self.scored, role))
            offer_paraphrased(self, role)

    def rows(self, role: str) -> list[Row]:
        """Questions and answers of a set."""
        return self.files[role].questions("question", "answer")

    def samples(self, role: str) -> list[Sample]:
        return self.once(f"{role} samples", lambda: self.examinee.tokenise(self.rows(role), role))

    def scored(self, role: str) -> Scored:
        """Scores and texts of the answers of a set."""
        detailed = role not in ("ra", "wf")
        return self.once(
            f"{role} scores", lambda: self.examinee.score_with_texts(self.samples(role), role, detailed=detailed)
        )

    def _scores(self, role: str) -> list[TokenScores]:
        return [score for score, _ in self.scored(role)]

    def _normalised(self, role: str) -> Metric:
        pairs = zip(self._scores(role), wrong_answers(self, role), strict=True)
        values = [
            metrics.normalised_probability(metrics.probability(sample.log_probs), list(map(math.exp, means)))
            for sample, means in pairs
        ]
        return averaged("prob", values)

    def _truths(self, role: str) -> list[str]:
        return self.examinee.truths(self.rows(role))

    def _answers(self, role: str) -> list[str]:
        return self.examinee.answer(self.examinee.prompts(self.rows(role), self.samples(role)), role, ANSWER_TOKENS)

    def _utility(self) -> Metric:
        return Metric(metrics.model_utility([self.metric(name).value for name in _UTILITY]))

    def _quality(self, reference: EvaluationFile) -> Metric:
        ratios = [sample["score"] for sample in self.metric("forget_truth_ratio").samples]
        return Metric(metrics.forget_quality(ratios, reference.values("forget_truth_ratio", "score", len(ratios))))

    def _log_quality(self) -> Metric:
        quality = self.metric("forget_quality").value
        return Metric(math.log10(quality) if quality > 0 else float("nan"))  # it may be too small for float64
