"""A few steps of AdamW on samples, against torch's own on a model in float32."""

import math

import pytest
import torch
from torch import nn

from perta_fast.data.batches import Batch
from perta_fast.errors import InputError, NotFiniteError
from perta_fast.models.losses import per_sample_losses
from perta_fast.models.relearning import relearn_
from tests.support.models import draw_samples, llama


def test_steps_are_those_of_adamw_on_the_mean_loss():
    samples, ours, theirs = draw_samples(4), llama(), llama()

    losses = relearn_(ours, samples, 3, rate=1e-3, batch_size=4)

    expected, optimizer = [], torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        loss = per_sample_losses(theirs.eval(), Batch.of(samples)).mean()
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == pytest.approx(expected, rel=1e-5) and losses[-1] < losses[0]
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (
            own - other
        ).abs().max() < 2e-4  # where a gradient is almost 0, its sign depends on the order of samples


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_batches():
    samples = draw_samples(7)

    def trained(seed):
        model = llama()
        return relearn_(model, samples, 4, batch_size=3, seed=seed), [value.clone() for value in model.parameters()]

    first, second, other = trained(0), trained(0), trained(1)

    assert first[0] == second[0] and all(map(torch.equal, first[1], second[1]))
    assert first[0] != other[0]


def test_each_sample_comes_once_before_one_comes_again():
    samples, seen = draw_samples(5, longest=2), []
    model = llama()
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].tolist()), with_kwargs=True)

    relearn_(model, samples, 6, batch_size=2)

    assert [len(batch) for batch in seen] == [2, 2, 1, 2, 2, 1]
    everything = sorted(list(sample.input_ids) for sample in samples)
    assert sorted(row for batch in seen[:3] for row in batch) == everything
    assert sorted(row for batch in seen[3:] for row in batch) == everything


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_steps_too_small_for_16_bits_add_up(dtype):
    model = llama().to(dtype)
    with torch.no_grad():
        model.lm_head.weight.fill_(1.0)  # its neighbours are 0.004 or more away in bfloat16
    assert torch.tensor(1 - 1e-3).to(torch.bfloat16) == 1

    relearn_(model, draw_samples(2), 12, rate=1e-3)

    assert model.lm_head.weight.dtype == dtype and (model.lm_head.weight != 1).any()


def test_gradients_modes_and_frozen_parameters_stay():
    model = llama().train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    frozen, held = model.lm_head.weight.clone(), torch.ones_like(model.model.norm.weight)
    model.model.norm.weight.grad = held

    with torch.no_grad():  # whoever calls may have switched gradients off
        relearn_(model, draw_samples(2), 1)

    assert model.training and not model.model.layers[0].training
    assert torch.equal(model.lm_head.weight, frozen) and model.model.norm.weight.grad is held and held.eq(1).all()
    assert all(value.grad is None for name, value in model.named_parameters() if name != "model.norm.weight")


def test_bad_arguments_and_losses_are_named():
    samples = draw_samples(2)
    for bad in ({"steps": 0}, {"steps": -1}, {"batch_size": 0}, {"rate": 0.0}, {"rate": math.nan}, {"rate": math.inf}):
        with pytest.raises(InputError, match="must be above 0"):
            relearn_(llama(), samples, **{"steps": 1} | bad)
    with pytest.raises(InputError, match="no samples"):
        relearn_(llama(), [], 1)
    with pytest.raises(InputError, match="no parameter that requires a gradient"):
        relearn_(llama().requires_grad_(False), samples, 1)
    with pytest.raises(InputError, match=r"parameter weight is torch\.float8_e4m3fn"):
        relearn_(nn.Linear(4, 4).to(torch.float8_e4m3fn), samples, 1)
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match="the loss of step 1 of relearning is not finite"):
        relearn_(model, samples, 1)
