"""Loss and accuracy of answers, against cases worked out by hand and against transformers' own decoding."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from perta_fast.data.batches import Batch
from perta_fast.data.rows import rows_from
from perta_fast.data.samples import IGNORED, Sample, encode
from perta_fast.demo.scoring import score
from perta_fast.models.losses import per_sample_losses
from tests.support.models import FORGET, RETAIN, llama, tokenizer


class NextToken(nn.Module):
    """Predicts k + 1 after k of eight tokens, with a logit of ``confidence`` against 0 for all others."""

    def __init__(self, confidence: float) -> None:
        super().__init__()
        self.confidence = confidence

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        following = nn.functional.one_hot((input_ids + 1) % 8, 8)
        return SimpleNamespace(logits=self.confidence * following.float())


def sample(prompt: tuple[int, ...], answer: tuple[int, ...]) -> Sample:
    return Sample((*prompt, *answer), (*[IGNORED] * len(prompt), *answer))


RIGHT = sample((5, 1), (2, 3, 4))
WRONG_END = sample((1,), (2, 3, 5))
WRONG_START = sample((4, 1), (0, 1))


def test_accuracy_is_the_share_of_wholly_right_answers() -> None:
    found = score(NextToken(2.0), [RIGHT, WRONG_END, WRONG_START, RIGHT])
    assert found.accuracy == 50.0
    assert found.questions == 4


def test_loss_is_the_mean_over_questions_of_the_mean_over_tokens() -> None:
    # -log softmax: with a logit c for one of eight tokens, log(e^c + 7) less the logit of the token asked for.
    confidence = 2.0
    miss = math.log(math.exp(confidence) + 7)
    hit = miss - confidence
    expected = (hit + (2 * hit + miss) / 3 + (miss + hit) / 2) / 3
    found = score(NextToken(confidence), [RIGHT, WRONG_END, WRONG_START])
    assert found.loss == pytest.approx(expected, rel=1e-6)


def test_more_samples_than_a_batch_weigh_the_same() -> None:
    few = score(NextToken(1.0), [RIGHT, WRONG_END, WRONG_START])
    many = score(NextToken(1.0), [RIGHT, WRONG_END, WRONG_START] * 50)
    assert many.loss == pytest.approx(few.loss, rel=1e-5)
    assert many.accuracy == pytest.approx(few.accuracy, rel=1e-5)


def test_accuracy_is_what_greedy_decoding_reproduces() -> None:
    written = tokenizer()
    records = rows_from([*FORGET, *RETAIN])
    samples = encode(records, written, 128)
    model = llama().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = Batch.of(samples)
    for _ in range(100):  # until some answers are right and others are not
        per_sample_losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if 20 < score(model, samples).accuracy < 80:
            break
    reproduced = [decodes_to_its_answer(model, each) for each in samples]
    assert 0 < sum(reproduced) < len(samples)
    assert score(model, samples).accuracy == pytest.approx(100 * sum(reproduced) / len(samples), rel=1e-6)


def decodes_to_its_answer(model: nn.Module, each: Sample) -> bool:
    """By transformers' own generate."""
    answer = [label for label in each.labels if label != IGNORED]
    prompt = torch.tensor([each.input_ids[: -len(answer)]])
    generated = model.generate(  # type: ignore[operator]
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=len(answer)
    )
    return bool(generated[0, prompt.shape[1] :].tolist() == answer)
