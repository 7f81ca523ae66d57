"""A user's own forget, retain and holdout data, in the forms that ``perta unlearn`` takes."""

from collections.abc import Mapping

from perta_fast.data.samples import prompt_of
from perta_fast.evaluation.benchmark_files import DataFile
from perta_fast.evaluation.examinee import Examinee, Scored, membership, memorisation, privacy_leakage, probabilities
from perta_fast.evaluation.results import EvaluationFile, Metric, averaged

NEW_TOKENS = 200


def evaluate_own_data(
    examinee: Examinee, files: Mapping[str, DataFile], reference: EvaluationFile | None
) -> dict[str, Metric]:
    """Loss, probability, extraction strength and exact memorisation of each set.

    files: by ``forget``, ``retain`` and ``holdout``. ROUGE-L too where all rows are questions. With a holdout set,
    the membership scores of the forget set; with ``reference`` as well, PrivLeak.
    """
    results: dict[str, Metric] = {}
    scored: dict[str, Scored] = {}
    for role, file in files.items():
        examinee.note_file(role, file)
        samples = examinee.tokenise(file.rows, role)
        scored[role] = examinee.score_with_texts(samples, role)
        scores = [score for score, _ in scored[role]]
        probability = probabilities(scores)
        losses = [sample["avg_loss"] for sample in probability.samples]
        results |= {f"{role}_loss": averaged("avg_loss", losses), f"{role}_Q_A_Prob": probability}
        if all("question" in row.content for row in file.rows):
            answers = examinee.answer([prompt_of(sample) for sample in samples], role, NEW_TOKENS)
            results[f"{role}_Q_A_ROUGE"] = examinee.rouge(file.texts("answer"), answers, "rougeL_recall")
        results |= memorisation(scores, f"{role}_")
    if "holdout" in scored:
        results |= membership(scored["forget"], scored["holdout"])
        if reference is not None:
            results["privleak"] = privacy_leakage(results, reference)
    return results
