"""Each sample's loss against its cross-entropy written out, alone and in any company."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.data.samples import IGNORED, Sample
from perta_fast.models.losses import per_sample_losses, sample_means, token_logits
from tests.support.models import draw_samples, llama

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = llama().eval()
SAMPLES = draw_samples(12, vocabulary=300, longest=20)


def written_out(sample: Sample) -> float:
    """-log p of each labelled token given those before it, in float64, averaged."""
    with torch.no_grad():
        logits = MODEL(input_ids=torch.tensor([sample.input_ids])).logits[0].double()
    losses = [
        float(logits[place - 1].logsumexp(0) - logits[place - 1, label])
        for place, label in enumerate(sample.labels)
        if place > 0 and label != IGNORED
    ]
    return math.fsum(losses) / len(losses)


def losses_of(samples: list[Sample]) -> torch.Tensor:
    with torch.no_grad():
        return per_sample_losses(MODEL, Batch.of(samples))


EXPECTED = torch.tensor([written_out(sample) for sample in SAMPLES])


def test_a_sample_alone() -> None:
    alone = torch.cat([losses_of([sample]) for sample in SAMPLES])
    torch.testing.assert_close(alone, EXPECTED, rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, len(SAMPLES) - 1), min_size=1, max_size=8))
def test_any_company(numbers: list[int]) -> None:
    found = losses_of([SAMPLES[k] for k in numbers])
    torch.testing.assert_close(found, EXPECTED[numbers], rtol=1e-5, atol=0)


def test_bfloat16_logits_are_averaged_in_float32() -> None:
    model = llama().eval().bfloat16()
    sample = SAMPLES[0]
    with torch.no_grad():
        found = per_sample_losses(model, Batch.of([sample]))
        logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0, :-1]
    assert logits.dtype == torch.bfloat16 and found.dtype == torch.float32
    targets = torch.tensor(sample.labels[1:])
    expected = torch.nn.functional.cross_entropy(logits.double(), targets).float()
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=0)


def test_a_sample_without_labels_disturbs_no_other_and_is_not_a_number() -> None:
    """What ``accumulate`` refuses by the sample's number; a loss of 0 would pass for a perfect answer."""
    unlabelled = Sample((5, 6, 7), (IGNORED,) * 3)
    only_the_first = Sample((5, 6), (5, IGNORED))  # nothing predicts it
    found = losses_of([SAMPLES[0], unlabelled, SAMPLES[1], only_the_first])
    torch.testing.assert_close(found[[0, 2]], EXPECTED[:2], rtol=1e-5, atol=0)
    assert found[[1, 3]].isnan().all()


def test_logits_are_those_of_labelled_tokens_alone() -> None:
    batch = Batch.of(SAMPLES[:3])
    with torch.no_grad():
        logits, targets, numbers = token_logits(MODEL, batch)
    assert targets.tolist() == [label for sample in SAMPLES[:3] for label in sample.labels[1:] if label != IGNORED]
    assert numbers.tolist() == [n for n in range(3) for _ in range(SAMPLES[n].label_count)]
    assert logits.shape == (len(targets), 300)


def test_means_by_sample() -> None:
    means = sample_means(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2, 0, 2]), 3)
    torch.testing.assert_close(means, torch.tensor([2.0, float("nan"), 3.5]), equal_nan=True)


def test_padding_is_on_the_right() -> None:
    batch = Batch.of([Sample((3, 4, 5), (IGNORED, 4, 5)), Sample((6,), (6,))])
    assert batch.input_ids.tolist()[0] == [3, 4, 5]
    assert batch.input_ids.tolist()[1][0] == 6
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 4, 5], [6, IGNORED, IGNORED]]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.labels.dtype == torch.int64


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 9))
def test_batches_hold_each_sample_once_the_longest_first(lengths: list[int], batch_size: int) -> None:
    samples = [Sample((1,) * length, (1,) * length) for length in lengths]
    batches = list(batches_by_length(samples, batch_size))
    order = [k for batch in batches for k in batch]
    assert sorted(order) == list(range(len(samples)))
    assert [lengths[k] for k in order] == sorted(lengths, reverse=True)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(1 <= len(batch) <= batch_size for batch in batches)


@pytest.mark.parametrize("labels", [(1, 2, 3), (IGNORED, 2, 3), (IGNORED, IGNORED, 3)])
def test_label_count_leaves_the_first_token_out(labels: tuple[int, ...]) -> None:
    assert Sample((1, 2, 3), labels).label_count == sum(label != IGNORED for label in labels[1:])
