"""TOFU (arXiv 2401.06121): probability, ROUGE-L recall and truth ratio on four sets, utility and forget quality."""

import math
from itertools import islice
from pathlib import Path

from perta_fast.data.samples import Sample, prompt_of
from perta_fast.errors import InputError
from perta_fast.evaluation import metrics
from perta_fast.evaluation.benchmark_files import DataFile, read_benchmark_file
from perta_fast.evaluation.examinee import Examinee, Scored, membership, memorisation, privacy_leakage, probabilities
from perta_fast.evaluation.results import EvaluationFile, Metric, averaged

SPLITS = ("forget01", "forget05", "forget10")
NEW_TOKENS = 200
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
        raise InputError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    fictitious = ("question", "answer", "paraphrased_answer")
    wrong = ("perturbed_answer",)
    files = {
        "forget": read_benchmark_file(folder, f"{split}_perturbed", fictitious, wrong),
        "retain": read_benchmark_file(folder, "retain_perturbed", fictitious, wrong),
        "ra": read_benchmark_file(folder, "real_authors_perturbed", fictitious[:2], wrong),
        "wf": read_benchmark_file(folder, "world_facts_perturbed", fictitious[:2], wrong),
    }
    holdout = split.replace("forget", "holdout")
    if any((folder / f"{holdout}{ending}").is_file() for ending in (".jsonl", ".json")):
        files["holdout"] = read_benchmark_file(folder, holdout, fictitious[:2])
    return files


def evaluate_tofu(
    examinee: Examinee, files: dict[str, DataFile], reference: EvaluationFile | None
) -> dict[str, Metric]:
    """All metrics of TOFU; with ``reference``, forget quality, and PrivLeak if there is a holdout set."""
    results: dict[str, Metric] = {}
    scored = {role: _evaluate_set(examinee, role, files[role], results) for role in ("forget", "retain", "ra", "wf")}
    results["model_utility"] = Metric(metrics.model_utility([results[name].value for name in _UTILITY]))
    if "holdout" in files:
        holdout = _tokenised(examinee, "holdout", files["holdout"])
        results |= membership(scored["forget"], examinee.score_with_texts(holdout, "holdout"))
    if reference is not None:
        ratios = [sample["score"] for sample in results["forget_truth_ratio"].samples]
        quality = metrics.forget_quality(ratios, reference.values("forget_truth_ratio", "score", len(ratios)))
        log = math.log10(quality) if quality > 0 else float("nan")  # a p-value may be too small for float64
        results |= {"forget_quality": Metric(quality), "forget_quality_log10": Metric(log)}
        if "holdout" in files:
            results["privleak"] = privacy_leakage(results, reference)
    return results


def check_reference(reference: EvaluationFile, files: dict[str, DataFile]) -> None:
    """Raise InputError unless the gold results have all that ``evaluate_tofu`` reads."""
    reference.values("forget_truth_ratio", "score", len(files["forget"].rows))
    if "holdout" in files:
        reference.value("mia_min_k")


def _evaluate_set(examinee: Examinee, role: str, file: DataFile, results: dict[str, Metric]) -> Scored:
    """Add the metrics of one set to ``results``; returns the scores and texts of its answers."""
    fictitious = role in ("forget", "retain")
    samples = _tokenised(examinee, role, file)
    scored = examinee.score_with_texts(samples, role, detailed=fictitious)
    right = scores = [score for score, _ in scored]
    if fictitious:
        paraphrased = examinee.tokenise(file.questions("question", "paraphrased_answer"), f"{role} paraphrased")
        right = examinee.score(paraphrased, f"{role} paraphrased")
    perturbed = examinee.tokenise(file.questions("question", "perturbed_answer"), f"{role} perturbed")
    wrong_scores = iter(examinee.score(perturbed, f"{role} perturbed"))  # in the order of questions and answers
    counts = [len(row.content["perturbed_answer"]) for row in file.rows]
    wrong = [[metrics.mean(score.log_probs) for score in islice(wrong_scores, count)] for count in counts]
    results[f"{role}_Q_A_Prob"] = probabilities(scores)
    if not fictitious:
        normalised = [
            metrics.normalised_probability(metrics.probability(sample.log_probs), list(map(math.exp, means)))
            for sample, means in zip(scores, wrong, strict=True)
        ]
        results[f"{role}_Q_A_Prob_normalised"] = averaged("prob", normalised)
    answers = examinee.answer([prompt_of(sample) for sample in samples], role, NEW_TOKENS)
    results[f"{role}_Q_A_ROUGE"] = examinee.rouge(file.texts("answer"), answers, "rougeL_recall")
    pairs = zip(right, wrong, strict=True)
    ratios = [metrics.truth_ratio(metrics.mean(sample.log_probs), means) for sample, means in pairs]
    aggregate = metrics.closer_to_one if role == "forget" else metrics.true_better
    name = "forget_truth_ratio" if role == "forget" else f"{role}_Truth_Ratio"
    results[name] = Metric(aggregate(ratios), [{"score": ratio} for ratio in ratios])
    if fictitious:
        results |= memorisation(scores, "" if role == "forget" else "retain_")
    return scored


def _tokenised(examinee: Examinee, role: str, file: DataFile) -> list[Sample]:
    """Questions and answers of a set, whose file is added to the record."""
    examinee.note_file(role, file)
    return examinee.tokenise(file.questions("question", "answer"), role)
