"""Passes over a model: against each sample alone in float64, and one answer at a time."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from perta_fast.data.samples import IGNORED, Sample
from perta_fast.errors import InputError
from perta_fast.models.greedy_answers import greedy_answers
from perta_fast.models.token_scores import evaluation_mode, score_tokens
from tests.support.models import draw_samples, llama, tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = llama().eval()
SAMPLES = draw_samples(13, vocabulary=300, longest=20)
PROMPTS = [sample.input_ids for sample in draw_samples(7, longest=15, seed=1)]


@torch.no_grad()
def alone(sample: Sample) -> tuple[list[float], list[bool], list[float]]:
    """Log-probability, hit and standardised log-probability of each labelled token, in float64."""
    logits = MODEL(input_ids=torch.tensor([sample.input_ids])).logits[0].double()
    rows = []
    for place, label in enumerate(sample.labels):
        if place > 0 and label != IGNORED:
            every = logits[place - 1] - logits[place - 1].logsumexp(0)
            center = sum(every.exp() * every)
            deviation = (sum(every.exp() * every**2) - center**2).sqrt()
            hit = int(every.argmax()) == label
            rows.append((float(every[label]), hit, float((every[label] - center) / deviation)))
    first, second, third = zip(*rows, strict=True)
    return list(first), list(second), list(third)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_token_as_if_alone(batch_size: int) -> None:
    scores = score_tokens(MODEL, SAMPLES, batch_size=batch_size, detailed=True)
    for found, sample in zip(scores, SAMPLES, strict=True):
        log_probs, hits, standardised = alone(sample)
        np.testing.assert_allclose(found.log_probs, log_probs, atol=1e-5)
        np.testing.assert_array_equal(found.hits, hits)
        np.testing.assert_allclose(found.standardised, standardised, atol=1e-3)


def test_the_short_form_and_transformers_loss() -> None:
    for found, sample in zip(score_tokens(MODEL, SAMPLES, batch_size=5), SAMPLES, strict=True):
        assert found.hits.size == found.standardised.size == 0
        with torch.no_grad():
            loss = MODEL(input_ids=torch.tensor([sample.input_ids]), labels=torch.tensor([sample.labels])).loss
        assert -found.log_probs.mean() == pytest.approx(float(loss), abs=1e-5)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score_tokens(MODEL, SAMPLES, batch_size=8, detailed=True)
    monkeypatch.setattr("perta_fast.models.token_scores._CHUNK", 700)  # two tokens
    for one, other in zip(whole, score_tokens(MODEL, SAMPLES, batch_size=8, detailed=True), strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-6)
        np.testing.assert_array_equal(one.hits, other.hits)


def test_a_plain_module_without_logits_to_keep() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MODEL

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> object:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    trimmed = score_tokens(MODEL, SAMPLES, batch_size=4)
    for one, other in zip(trimmed, score_tokens(Plain(), SAMPLES, batch_size=4), strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


@torch.no_grad()
def answered_alone(model: PreTrainedModel, prompt: tuple[int, ...], room: int) -> str:
    """The likeliest token each time, without a cache."""
    words, ids = tokenizer(), list(prompt)
    for _ in range(room):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == words.eos_token_id:
            break
    return str(words.decode(ids[len(prompt) :], skip_special_tokens=True)).strip()


def test_answers_are_those_of_each_prompt_alone() -> None:
    expected = [answered_alone(MODEL, prompt, 9) for prompt in PROMPTS]
    for batch_size in (1, 3, 7):
        assert greedy_answers(MODEL, tokenizer(), PROMPTS, batch_size=batch_size, max_new_tokens=9) == expected


GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 0}


@pytest.mark.parametrize("kind", ["Llama", "GPT-2"])
def test_a_prompt_that_nearly_fills_the_context_cuts_its_own_answer_alone(kind: str) -> None:
    torch.manual_seed(0)
    model = llama(max_position_embeddings=64).eval() if kind == "Llama" else GPT2LMHeadModel(GPT2Config(**GPT2)).eval()
    lengths = (5, 62, 11, 59, 62, 55, 20)  # of 64 tokens; 55 leaves all the room that is asked for
    prompts = [tuple(range(7 + k, 7 + k + length)) for k, length in enumerate(lengths)]
    expected = [answered_alone(model, prompt, min(9, 64 - len(prompt))) for prompt in prompts]
    assert all(expected)
    for batch_size in (1, 3, 7):
        assert greedy_answers(model, tokenizer(), prompts, batch_size=batch_size, max_new_tokens=9) == expected
    answers = greedy_answers(model, tokenizer(), prompts, batch_size=7, max_new_tokens=9, as_configured=True)
    assert answers == expected


def test_sampling_settings_of_the_checkpoint_are_not_used() -> None:
    model = llama().eval()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.min_new_tokens = 9
    model.generation_config.suppress_tokens = list(range(2, 200))
    settings = {"batch_size": 3, "max_new_tokens": 9}
    assert greedy_answers(model, tokenizer(), PROMPTS, **settings) == greedy_answers(
        MODEL, tokenizer(), PROMPTS, **settings
    )


def test_stop_words_cut_the_answer() -> None:
    whole = greedy_answers(MODEL, tokenizer(), PROMPTS[:1], batch_size=1, max_new_tokens=9)[0]
    cut = greedy_answers(MODEL, tokenizer(), PROMPTS[:1], batch_size=1, max_new_tokens=9, stop=[whole[2]])[0]
    assert cut == whole.split(whole[2])[0].strip()


def test_a_prompt_that_fills_the_context() -> None:
    with pytest.raises(InputError, match="128 tokens leaves no room"):
        greedy_answers(MODEL, tokenizer(), [[5] * 128], batch_size=1, max_new_tokens=9)


def test_modes_come_back() -> None:
    model = llama().train()
    model.lm_head.eval()
    with evaluation_mode(model):
        assert not any(each.training for each in model.modules())
    assert model.training
    assert not model.lm_head.training
