"""Metrics that every suite offers on its own sets: ROUGE-L, memorisation, membership."""

import math
from collections.abc import Callable, Sequence
from itertools import islice

from perta_fast.data.forms import PARAPHRASED, PARAPHRASED_ANSWER, PERTURBED_ANSWER
from perta_fast.data.rows import Row, check_text
from perta_fast.data.samples import Sample
from perta_fast.evaluation import metrics
from perta_fast.evaluation.examinee import (
    Scored,
    is_end_alone,
    membership,
    memorisation,
    privacy_leakage,
    probabilities,
)
from perta_fast.evaluation.metric_table import GENERATED, MetricTable
from perta_fast.evaluation.results import EvaluationFile, Metric
from perta_fast.evaluation.rouge import ANY_SCRIPT, is_seen_whole
from perta_fast.models.scores import TokenScores

MEMORISATION = ("extraction_strength", "exact_memorization")
MEMBERSHIP = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")
ANSWER_TOKENS = 200  # of an answer to a question, at most
WITHOUT_GOLD = "privleak_without_gold"


def offer_rouge(
    table: MetricTable,
    name: str,
    texts: Sequence[str],
    answers: Callable[[], list[str]],
    key: str,
    references: Callable[[], Sequence[str]] | None = None,
    *,
    default: bool = True,
) -> None:
    """Offer ROUGE-L as open-unlearning computes it; and with words of any script, if a reference needs that.

    texts: of the data, by which this is decided. references: what answers are compared with; None is ``texts``. key:
    what is averaged.
    """

    def computed(any_script: bool) -> Metric:
        truth = texts if references is None else table.once(f"{name} references", references)
        return table.examinee.rouge(name, truth, table.once(f"{name} answers", answers), key, any_script=any_script)

    table.offer(name, lambda: computed(False), default=default, needs=GENERATED)
    if not all(map(is_seen_whole, texts)):
        table.offer(f"{name}{ANY_SCRIPT}", lambda: computed(True), default=default, needs=GENERATED)


def offer_paraphrased(table: MetricTable, role: str) -> None:
    """Offer probability and ROUGE-L of the answers to the questions in other words, if every row has such a question.

    They are computed if they are named, since they take as long as those of the questions themselves.
    """
    rows, what = table.files[role].rows, f"{role} paraphrased questions"
    names = [f"{role}_paraphrased_question_{metric}" for metric in ("Prob", "ROUGE")]
    if not all(row.content.get(PARAPHRASED) for row in rows):
        table.lacking |= dict.fromkeys(names, f"a {PARAPHRASED} in every row of the {role} set")
        return
    for row in rows:
        check_text(row.content[PARAPHRASED], PARAPHRASED, row.where)
    asked = [Row({"question": row.content[PARAPHRASED], "answer": row.content["answer"]}, row.where) for row in rows]

    def samples() -> list[Sample]:
        return table.once(f"{what} samples", lambda: table.examinee.tokenise(asked, what))

    def answers() -> list[str]:
        return table.examinee.answer(table.examinee.prompts(asked, samples()), what, ANSWER_TOKENS)

    table.offer(names[0], lambda: probabilities(table.examinee.score(samples(), what)), default=False)
    truth = table.files[role].texts("answer")
    offer_rouge(table, names[1], truth, answers, "rougeL_recall", lambda: table.examinee.truths(asked), default=False)


def offer_truth_ratio(table: MetricTable, role: str, right: Callable[[], Sequence[TokenScores]]) -> None:
    """Offer the truth ratio of questions that have wrong answers too. right: scores of the right ones."""

    def compute() -> Metric:
        pairs = zip(right(), wrong_answers(table, role), strict=True)
        ratios = [metrics.truth_ratio(metrics.mean(sample.log_probs), means) for sample, means in pairs]
        aggregate = metrics.closer_to_one if role == "forget" else metrics.true_better
        return Metric(aggregate(ratios), [{"score": ratio} for ratio in ratios])

    table.offer("forget_truth_ratio" if role == "forget" else f"{role}_Truth_Ratio", compute)


def paraphrased_answers(table: MetricTable, role: str) -> list[TokenScores]:
    """Scores of each question's right answer in other words."""
    what, rows = f"{role} paraphrased", table.files[role].questions("question", PARAPHRASED_ANSWER)
    return table.once(what, lambda: table.examinee.score(table.examinee.tokenise(rows, what), what))


def wrong_answers(table: MetricTable, role: str) -> list[list[float]]:
    """The mean log-probability of each question's wrong answers."""
    what, file = f"{role} perturbed", table.files[role]
    rows = file.questions("question", PERTURBED_ANSWER)
    scores = table.once(what, lambda: table.examinee.score(table.examinee.tokenise(rows, what), what))
    means = (metrics.mean(score.log_probs) for score in scores)  # in the order of questions and answers
    return [list(islice(means, len(row.content[PERTURBED_ANSWER]))) for row in file.rows]


def offer_memorisation(table: MetricTable, prefix: str, scored: Callable[[], Scored]) -> None:
    """Offer extraction strength and exact memorisation, by names that begin with ``prefix``."""

    def make() -> dict[str, Metric]:
        end_alone = table.examinee.conventions.end_alone
        for measure, value in zip(MEMORISATION, (end_alone, math.nan), strict=True):
            _note_ends_alone(table, f"{prefix}{measure}", scored(), value)
        return memorisation([scores for scores, _ in scored()], prefix, end_alone)

    def both() -> dict[str, Metric]:
        return table.once(f"{prefix}memorisation", make)

    for measure in MEMORISATION:
        table.offer(f"{prefix}{measure}", lambda name=f"{prefix}{measure}": both()[name])  # type: ignore[misc]


def offer_membership(table: MetricTable, reference: EvaluationFile | None) -> None:
    """Offer the membership scores of the forget set against the holdout set, and PrivLeak.

    reference: of a gold model. Without one, PrivLeak is computed where it is named, under a name that says so.
    """

    def make() -> dict[str, Metric]:
        forget, holdout = table.scored("forget"), table.scored("holdout")
        end_alone = table.examinee.conventions.end_alone
        _note_ends_alone(table, "mia_min_k, mia_min_k_plus_plus", [*forget, *holdout], end_alone)
        return membership(forget, holdout, table.examinee.min_k, end_alone)

    def every() -> dict[str, Metric]:
        return table.once("membership", make)

    def without_gold() -> Metric:
        table.examinee.notes.append(
            f"{WITHOUT_GOLD}: takes {metrics.NO_GOLD_AUC} for the AUC of a gold model, whose own may be another; "
            "--reference gives it"
        )
        return Metric(metrics.privacy_leakage(every()["mia_min_k"].value, metrics.NO_GOLD_AUC))

    for name in MEMBERSHIP:
        table.offer(name, lambda name=name: every()[name])  # type: ignore[misc]
    if reference is None:
        table.lacking["privleak"] = "--reference"
        table.offer(WITHOUT_GOLD, without_gold, default=False)
    else:
        table.offer("privleak", lambda: privacy_leakage(every(), reference))


def _note_ends_alone(table: MetricTable, names: str, scored: Scored, value: float) -> None:
    """Say how many answers have no value of these metrics of their own, for want of another token than their end."""
    if alone := sum(is_end_alone(scores) for scores, _ in scored):
        counted = "are left out" if math.isnan(value) else f"count {value:g}"
        table.examinee.notes.append(f"{names}: {alone} of {len(scored)} answers are only their end; they {counted}")
