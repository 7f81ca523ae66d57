"""Each metric on a case worked out by hand, at its extremes, and beside another library where one has it."""

import math
import zlib

import numpy as np
import pytest
from scipy.stats import ks_2samp

from perta_fast.evaluation import metrics, rouge

HALF, QUARTER = math.log(0.5), math.log(0.25)


def test_probability_is_the_geometric_mean() -> None:
    assert metrics.probability([HALF, math.log(0.125)]) == pytest.approx(0.25)
    assert metrics.probability([0.0, 0.0]) == 1
    assert math.isnan(metrics.probability([]))
    assert math.isnan(metrics.probability([HALF, math.nan]))


def test_normalised_probability() -> None:
    assert metrics.normalised_probability(0.3, [0.1, 0.2]) == pytest.approx(0.5)
    assert metrics.normalised_probability(0.0, [0.0]) == 0


def test_truth_ratio() -> None:
    wrong = [math.log(0.1), math.log(0.4)]  # geometric mean 0.2, arithmetic 0.25
    assert metrics.truth_ratio(HALF, wrong) == pytest.approx(0.4)
    assert metrics.truth_ratio(QUARTER, [QUARTER]) == pytest.approx(1)


def test_aggregates_of_truth_ratios() -> None:
    ratios = [0.5, 1.0, 4.0]
    assert metrics.closer_to_one(ratios) == pytest.approx((0.5 + 1 + 0.25) / 3)
    assert metrics.true_better(ratios) == pytest.approx((0.5 + 0 + 0) / 3)
    assert metrics.closer_to_one([0.0]) == 0
    assert metrics.true_better([0.0]) == 1


def test_model_utility_is_a_harmonic_mean() -> None:
    assert metrics.model_utility([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert metrics.model_utility([0.3] * 9) == pytest.approx(0.3)
    assert metrics.model_utility([1.0] * 8 + [0.0]) == 0
    assert math.isnan(metrics.model_utility([1.0, math.nan]))


def test_forget_quality() -> None:
    draws = np.random.default_rng(0)
    gold, near, far = draws.random(40), draws.random(40), draws.random(40) + 2
    assert metrics.forget_quality(gold, gold) == 1
    # Samples that do not overlap: 2 of the C(80, 40) equally likely orders are as far apart.
    assert metrics.forget_quality(gold, far) == pytest.approx(2 / math.comb(80, 40), rel=1e-6)
    assert metrics.forget_quality(near, gold) == pytest.approx(ks_2samp(1 / near, 1 / gold).pvalue)
    assert metrics.forget_quality([0.5], [0.7]) == 1  # one sample tells nothing
    assert math.isnan(metrics.forget_quality([math.nan, 1.0], [1.0, 2.0]))


@pytest.mark.parametrize(
    ("hits", "strength", "exact"),
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 0, 0, 0], 0.25, 0.0),  # the floor of open-unlearning, 1 / L
        ([1, 1, 1, 0], 0.25, 0.75),
        ([0, 1, 1, 1], 0.75, 0.75),
        ([1, 0, 1, 1], 0.5, 0.75),
        ([1], 1.0, 1.0),
    ],
)
def test_memorisation(hits: list[int], strength: float, exact: float) -> None:
    assert metrics.extraction_strength(hits) == strength
    assert metrics.exact_memorization(hits) == exact


def test_memorisation_of_nothing() -> None:
    assert math.isnan(metrics.extraction_strength([]))
    assert math.isnan(metrics.exact_memorization([]))


def test_min_k() -> None:
    assert metrics.min_k([-1.0, -5.0, -2.0, -4.0, -3.0]) == pytest.approx(4.5)  # two of five
    assert metrics.min_k([-1.0, -3.0], share=0.1) == 3  # at least one
    assert metrics.min_k([-1.0, -3.0], share=1.0) == 2
    assert math.isnan(metrics.min_k([]))


def test_zlib() -> None:
    text = "the same the same the same"
    assert metrics.zlib_score([-2.0, -4.0], text) == pytest.approx(3 / len(zlib.compress(text.encode())))


def test_membership_auc_counts_pairs() -> None:
    assert metrics.membership_auc([1, 2], [3, 4]) == 1
    assert metrics.membership_auc([3, 4], [1, 2]) == 0
    assert metrics.membership_auc([1, 3], [2, 4]) == pytest.approx(3 / 4)  # (1,2) (1,4) (3,4) of four pairs
    assert metrics.membership_auc([1], [1]) == 0.5
    assert math.isnan(metrics.membership_auc([math.nan], [1]))


def test_privacy_leakage() -> None:
    assert metrics.privacy_leakage(0.6, 0.6) == 0
    assert metrics.privacy_leakage(1.0, 0.5) == pytest.approx(-100)
    assert metrics.privacy_leakage(0.0, 0.5) == pytest.approx(100)


def test_rouge_l() -> None:
    # Longest common subsequence "the cat sat", 3 of 6 words of the reference, 3 of 4 of the answer.
    recall, f1 = rouge.rouge_l("the cat sat on a mat", "the black cat sat")
    assert recall == pytest.approx(3 / 6)
    assert f1 == pytest.approx(2 * (1 / 2) * (3 / 4) / (1 / 2 + 3 / 4))
    assert rouge.rouge_l("running", "runs") == (1.0, 1.0)  # stemmed
    assert rouge.rouge_l("a word", "") == (0.0, 0.0)
