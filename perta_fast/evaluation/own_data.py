"""A user's own forget, retain and holdout data, in the forms that ``perta unlearn`` takes."""

from collections.abc import Mapping
from functools import partial

from perta_fast.data.forms import PARAPHRASED_ANSWER, PERTURBED_ANSWER, TRUTH_RATIO
from perta_fast.data.samples import Sample
from perta_fast.evaluation.benchmark_files import DataFile
from perta_fast.evaluation.examinee import Scored, probabilities
from perta_fast.evaluation.metric_table import MetricTable
from perta_fast.evaluation.offers import (
    ANSWER_TOKENS,
    offer_membership,
    offer_memorisation,
    offer_paraphrased,
    offer_rouge,
    offer_truth_ratio,
    paraphrased_answers,
)
from perta_fast.evaluation.results import EvaluationFile, Metric, averaged
from perta_fast.models.scores import TokenScores


class OwnData(MetricTable):
    """Loss, probability, extraction strength and exact memorisation of each set.

    files: by role, ``forget``, ``retain`` and ``holdout`` among them. ROUGE-L too where all rows are questions; the
    truth ratio where all have wrong answers (``perturbed_answer``), as TOFU's rows do. With a holdout set, the
    membership scores of the forget set; with ``reference`` as well, PrivLeak.
    """

    def __init__(self, files: Mapping[str, DataFile], reference: EvaluationFile | None) -> None:
        super().__init__(files)
        for role, file in files.items():
            self.offer(f"{role}_loss", partial(self._loss, role))
            self.offer(f"{role}_Q_A_Prob", partial(self._probability, role))
            if all("question" in row.content for row in file.rows):
                answers = partial(self._answers, role)
                truths = partial(self._truths, role)
                offer_rouge(self, f"{role}_Q_A_ROUGE", file.texts("answer"), answers, "rougeL_recall", truths)
                offer_paraphrased(self, role)
                self._offer_truth_ratio(role)
            offer_memorisation(self, f"{role}_", partial(self.scored, role))
        if "holdout" in files:
            offer_membership(self, reference)

    def _offer_truth_ratio(self, role: str) -> None:
        """Of right answers in other words, if every row has one, else of the answers."""
        has = {name: all(name in row.content for row in self.files[role].rows) for name in TRUTH_RATIO}
        if has[PERTURBED_ANSWER]:
            own = partial(self._scores, role)
            offer_truth_ratio(self, role, partial(paraphrased_answers, self, role) if has[PARAPHRASED_ANSWER] else own)

    def samples(self, role: str) -> list[Sample]:
        return self.once(f"{role} samples", lambda: self._tokenised(role))

    def _tokenised(self, role: str) -> list[Sample]:
        rows = self.files[role].rows
        asked, talks = (sum(key in row.content for row in rows) for key in ("question", "messages"))
        if talks or 0 < asked < len(rows):
            others = f"{len(rows) - asked} of {len(rows)} rows are no single questions"
            self.examinee.notes.append(f"{role}: has no ROUGE, which is of questions and answers; {others}")
        return self.examinee.tokenise(rows, role)

    def scored(self, role: str) -> Scored:
        return self.once(f"{role} scores", lambda: self.examinee.score_with_texts(self.samples(role), role))

    def _probability(self, role: str) -> Metric:
        return probabilities(self._scores(role))

    def _scores(self, role: str) -> list[TokenScores]:
        return [score for score, _ in self.scored(role)]

    def _loss(self, role: str) -> Metric:
        return averaged("avg_loss", [sample["avg_loss"] for sample in self.metric(f"{role}_Q_A_Prob").samples])

    def _truths(self, role: str) -> list[str]:
        return self.examinee.truths(self.files[role].rows)

    def _answers(self, role: str) -> list[str]:
        prompts = self.examinee.prompts(self.files[role].rows, self.samples(role))
        return self.examinee.answer(prompts, role, ANSWER_TOKENS)
