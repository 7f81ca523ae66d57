"""Metrics of unlearning as pure functions: numbers about tokens and texts in, scores out.

Definitions are those of open-unlearning (github.com/locuslab/open-unlearning), which reports under the same
names, and of the papers named with each. A sample without a token to score has NaN; means leave no NaN out.
"""

import zlib
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_TINY = 1e-10  # what open-unlearning adds to a denominator
MIN_K = 0.4  # share of a sample's tokens, as in MUSE


def probability(log_probs: ArrayLike) -> float:
    """exp of the mean of an answer's token log-probabilities (L,) in nats, its end included.

    The length-normalised probability of TOFU (arXiv 2401.06121, section 2.2.2), in [0, 1].
    """
    return float(np.exp(mean(log_probs)))


def normalised_probability(correct: float, wrong: ArrayLike) -> float:
    """p(correct) / (p(correct) + sum of p(wrong)), of real-authors and world-facts questions (TOFU, 2.2.2)."""
    return float(correct / (correct + np.sum(wrong) + _TINY))


def truth_ratio(correct_log_prob: float, wrong_log_probs: ArrayLike) -> float:
    """Geometric mean of the wrong answers' probabilities over that of the right one (TOFU, eq. 1).

    Each argument is an answer's mean token log-probability; the right answer is the paraphrased one where the
    data has it. Near 0 for a model that knows the answer, about 1 for one that cannot tell.
    """
    return float(np.exp(mean(wrong_log_probs)) / (np.exp(correct_log_prob) + _TINY))


def closer_to_one(ratios: ArrayLike) -> float:
    """Mean of min(R, 1 / R) over truth ratios: on the forget set, 1 if right and wrong are equally likely."""
    values = np.asarray(ratios, dtype=float)
    return mean(np.minimum(values, 1 / (values + _TINY)))


def true_better(ratios: ArrayLike) -> float:
    """Mean of max(0, 1 - R) over truth ratios: on all other sets, 1 if the right answers are far likelier."""
    return mean(np.maximum(0, 1 - np.asarray(ratios, dtype=float)))


def model_utility(values: Sequence[float]) -> float:
    """Harmonic mean of TOFU's nine: probability, ROUGE-L recall and truth ratio on the three other sets.

    0 as soon as one of them is 0 (TOFU, 2.2.2); NaN if one is.
    """
    from scipy.stats import hmean

    return float("nan") if np.isnan(values).any() else float(hmean(values))


def forget_quality(ratios: ArrayLike, gold_ratios: ArrayLike) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test of truth ratios on the forget set (TOFU, 2.2.3).

    gold_ratios: those of a model trained on the retain set alone. 1 if the samples are equal; the smaller, the
    surer it is that the models differ. NaN if a ratio is.
    """
    from scipy.stats import ks_2samp

    if np.isnan(np.concatenate([np.asarray(ratios), np.asarray(gold_ratios)])).any():
        return float("nan")
    return float(ks_2samp(ratios, gold_ratios).pvalue)


def exact_memorization(hits: ArrayLike) -> float:
    """Share of an answer's tokens (L,) that are the model's first choice after those before (arXiv 2205.10770).

    The last label, the end of the answer, is not to be among ``hits``.
    """
    return mean(np.asarray(hits, dtype=float))


def extraction_strength(hits: ArrayLike) -> float:
    """1 - k / L for the least k < L such that greedy decoding after k tokens of the answer yields the rest.

    hits: (L,), as in ``exact_memorization``. From Carlini et al. (arXiv 2012.07805) and Wang et al. (arXiv
    2406.13348). Like open-unlearning, an answer of which not even the last token is right counts 1 / L, not 0.
    """
    right = np.asarray(hits, dtype=bool)
    if right.size == 0:
        return float("nan")
    misses = np.flatnonzero(~right)
    begin = misses[-1] + 1 if misses.size else 0
    return float(1 - min(begin, right.size - 1) / right.size)


def zlib_score(log_probs: ArrayLike, text: str) -> float:
    """Mean token loss over the bytes of the text compressed by zlib (arXiv 2012.07805)."""
    return -mean(log_probs) / len(zlib.compress(text.encode()))


def min_k(values: ArrayLike, share: float = MIN_K) -> float:
    """Minus the mean of the lowest ``share`` of a sample's token values (L,), at least one.

    On log-probabilities it is Min-K% (arXiv 2310.16789); on each one's distance from the mean log-probability
    over the vocabulary, in standard deviations, Min-K%++ (arXiv 2404.02936).
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    return -mean(ordered[: max(1, int(len(ordered) * share))])


def membership_auc(forget: ArrayLike, holdout: ArrayLike) -> float:
    """Area under the ROC curve by which a loss-like score tells ``holdout`` (higher) from ``forget`` (lower).

    1 if the model betrays every forget sample, 0.5 if it betrays none; NaN if a score is.
    """
    from sklearn.metrics import roc_auc_score

    scores = np.concatenate([np.asarray(forget, dtype=float), np.asarray(holdout, dtype=float)])
    if not np.isfinite(scores).all():
        return float("nan")
    return float(roc_auc_score([0] * np.size(forget) + [1] * np.size(holdout), scores))


def privacy_leakage(auc: float, gold_auc: float) -> float:
    """PrivLeak of MUSE (arXiv 2407.06460), in percent, from two ``membership_auc`` of Min-K%.

    100 * (a - g) / g with a = 1 - auc, g = 1 - gold_auc: MUSE's AUC is the chance that a holdout sample is the
    likelier of the two. 0 is gold; near -100 the forget set is still betrayed, far above 0 the model was driven
    past one that never saw it.
    """
    gold = 1 - gold_auc
    return 100 * (1 - auc - gold) / (gold + _TINY)


def rouge_l(reference: str, text: str) -> tuple[float, float]:
    """ROUGE-L recall and F1 of ``text``, words stemmed (rouge-score); 0 where either has no word."""
    score = _scorer().score(reference, text)["rougeL"]
    return float(score.recall), float(score.fmeasure)


@cache
def _scorer() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def mean(values: ArrayLike) -> float:
    """Mean in float64; NaN of nothing."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size else float("nan")
