"""A user's own forget, retain and holdout data, in the forms that ``perta unlearn`` takes."""

from collections.abc import Mapping
from pathlib import Path

from perta_fast.data.json_lines import Row, read_data
from perta_fast.data.samples import prompt_of
from perta_fast.evaluation.examinee import Examinee, Scored, membership, memorisation, privacy_leakage, probabilities
from perta_fast.evaluation.results import EvaluationFile, Metric, averaged

NEW_TOKENS = 200

Files = Mapping[str, tuple[Path, list[Row], str]]


def read_own_data(paths: Mapping[str, Path]) -> Files:
    """Files by ``forget``, ``retain`` and ``holdout``: path, records and hash."""
    return {role: (path, *read_data(path)) for role, path in paths.items()}


def evaluate_own_data(examinee: Examinee, files: Files, reference: EvaluationFile | None) -> dict[str, Metric]:
    """Loss, probability, extraction strength and exact memorisation of each set.

    ROUGE-L too where all lines are questions. With a holdout set, the membership scores of the forget set; with
    ``reference`` as well, PrivLeak.
    """
    results: dict[str, Metric] = {}
    scored: dict[str, Scored] = {}
    for role, (path, records, digest) in files.items():
        examinee.note_file(role, path, digest, len(records))
        samples = examinee.tokenise(records, role)
        scored[role] = examinee.score_with_texts(samples, role)
        scores = [score for score, _ in scored[role]]
        probability = probabilities(scores)
        losses = [sample["avg_loss"] for sample in probability.samples]
        results |= {f"{role}_loss": averaged("avg_loss", losses), f"{role}_Q_A_Prob": probability}
        if all("question" in record.content for record in records):
            answers = examinee.answer([prompt_of(sample) for sample in samples], role, NEW_TOKENS)
            truth = [record.content["answer"] for record in records]
            results[f"{role}_Q_A_ROUGE"] = examinee.rouge(truth, answers, "rougeL_recall")
        results |= memorisation(scores, f"{role}_")
    if "holdout" in scored:
        results |= membership(scored["forget"], scored["holdout"])
        if reference is not None:
            results["privleak"] = privacy_leakage(results, reference)
    return results
