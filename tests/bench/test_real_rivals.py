"""The rivals of the study on real models, against plain computations on a tiny random Llama."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.study.baselines import Losses
from bench.study.real.closed_form import PREDICTED_RISE, agreeing, kfade
from bench.study.real.training_rivals import METHODS, STEERING, Steering, Step, descend, simnpo
from bench.study.training import losses_of
from perta_fast.data.batches import Batch
from perta_fast.data.samples import IGNORED, Sample
from tests.support.models import draw_samples, llama

FORGET = draw_samples(4, longest=9, seed=1)
RETAIN = draw_samples(7, longest=9, seed=2)
DAMPING = 0.1


def losses(module: Any, samples: list[Sample]) -> Tensor:
    """In float32."""
    return losses_of(module, Batch.of(samples))


def tiny() -> Any:
    """A Llama with grouped-query attention and a tied head."""
    changes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    return llama(3, **changes, vocab_size=300, tie_word_embeddings=True)


def changed(before: Any, after: Any) -> set[str]:
    """The names of the parameters that differ."""
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    return {name for (name, old), new in pairs if not torch.equal(old, new)}


# Methods that train


def test_simnpo_by_hand() -> None:
    given = Losses(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0]), torch.zeros(2), torch.tensor([0.5, 0.7]))
    expected = sum(2 / 2.5 * math.log(1 + math.exp(-2.5 * loss)) for loss in (1.0, 2.0)) / 2
    assert simnpo(given).item() == pytest.approx(0.1375 * expected + 0.6)


def npo_by_hand(forget: Tensor, full: Tensor) -> Tensor:
    """From the probabilities of whole answers."""
    count = torch.tensor([float(sample.label_count) for sample in FORGET])
    ratios = torch.exp(-count * forget) / torch.exp(-count * full)
    return 2 / 0.1 * torch.log(1 + ratios**0.1).mean()


BY_HAND: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gradient ascent": lambda forget, full, retain: -forget.mean(),
    "gradient difference": lambda forget, full, retain: retain.mean() - forget.mean(),
    "NPO": lambda forget, full, retain: npo_by_hand(forget, full) + retain.mean(),
    "SimNPO": lambda forget, full, retain: (
        0.1375 * 2 / 2.5 * torch.log(1 + torch.exp(-2.5 * forget)).mean() + retain.mean()
    ),
}


@pytest.mark.parametrize("method", BY_HAND)
def test_steps_are_those_of_the_formula(method: str) -> None:
    """Every batch has all samples, so that their order does not matter."""
    retain = RETAIN[: len(FORGET)]
    model, expected = llama(), llama()
    full = losses(expected, FORGET).detach()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        BY_HAND[method](losses(expected, FORGET), full, losses(expected, retain)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert list(descend(model, FORGET, retain, method, 1e-3, 3, 4, 0, losses)) == [1, 2, 3]
    assert losses(model, FORGET).tolist() == pytest.approx(losses(expected, FORGET).tolist(), rel=1e-4)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)
    assert changed(llama(), model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_step_takes_as_many_retained_samples_as_forget_samples(batch_size: int) -> None:
    seen: list[list[Sample]] = []

    def noted(module: Any, samples: list[Sample]) -> Tensor:
        seen.append(samples)
        return losses(module, samples)

    assert list(descend(llama(), FORGET, RETAIN, "SimNPO", 1e-4, 5, batch_size, 0, noted)) == [1, 2, 3, 4, 5]
    size = min(batch_size, len(FORGET))
    assert [len(samples) for samples in seen] == 10 * [size]
    forget, retain = ([sample for samples in seen[part::2] for sample in samples] for part in (0, 1))
    for given, taken in ((FORGET, forget), (RETAIN, retain)):
        first = taken[: len(given)]
        assert len(set(first)) == len(first)  # all of an epoch before any comes again
        assert set(taken) <= set(given)


def test_the_rate_rises_then_stays() -> None:
    """A step of Adam with gradients of one sign moves by the rate."""
    model, moves = llama(), []
    before = model.lm_head.weight.detach().clone()
    for _ in descend(model, FORGET, RETAIN, "gradient ascent", 1e-5, 30, 4, 0, losses):
        moves.append((model.lm_head.weight.detach() - before).abs().max().item())
        before = model.lm_head.weight.detach().clone()
    assert moves[:3] == pytest.approx([1e-5 / 3, 2e-5 / 3, 1e-5], rel=0.1)
    assert max(moves) < 1.5e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_everything(method: str) -> None:
    def trained(seed: int) -> Any:
        model = llama(num_hidden_layers=4)
        for _ in descend(model, FORGET, RETAIN, method, 1e-3, 3, 2, seed, losses):
            assert not model.training
        return model

    assert not changed(trained(0), trained(0))
    assert changed(trained(0), trained(1))


def test_an_unknown_method() -> None:
    with pytest.raises(ValueError, match=r"'npo' is none of .*NPO"):
        next(descend(llama(), FORGET, RETAIN, "npo", 1e-3, 1, 2, 0, losses))


STEPS = [Step(0, [0, 1], [2, 3]), Step(1, [2, 3], [0, 6])]


def hidden(model: Any, sample: Sample, layer: int) -> Tensor:
    """The states (M, d) of labelled tokens after ``layer``, by transformers."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model.model(input_ids=torch.tensor([sample.input_ids]), output_hidden_states=True)
    labelled = [k for k, label in enumerate(sample.labels) if label != IGNORED]
    states: Tensor = output.hidden_states[layer + 1][0, labelled].float()
    return states


def test_rmu_keeps_what_the_frozen_model_had() -> None:
    model = llama(num_hidden_layers=6)
    steering = Steering(model, FORGET, RETAIN, STEPS, 0)
    assert [steering.retain_loss(step).item() for step in STEPS] == [0.0, 0.0]
    with torch.no_grad():
        steering.trained[0].add_(0.1)
    for step in STEPS:
        expected = 0.0
        for k in step.retain:
            now, then = (hidden(one, RETAIN[k], 2) for one in (model, llama(num_hidden_layers=6)))
            expected += (now - then).square().mean().item() / 2
        assert steering.retain_loss(step).item() == pytest.approx(expected, rel=0.05)
    assert len(model.model.layers) == 6


def test_rmu_by_hand() -> None:
    model = llama(num_hidden_layers=6)
    steering = Steering(model, FORGET, RETAIN, STEPS, 0)
    lengths = [hidden(model, sample, 2).norm(dim=-1).mean().item() for sample in FORGET]
    assert steering.target.norm().item() == pytest.approx(STEERING * sum(lengths) / len(lengths), rel=0.01)
    assert (steering.target >= 0).all()
    expected = [(hidden(model, FORGET[k], 2) - steering.target).square().mean().item() for k in STEPS[1].forget]
    assert steering.loss(STEPS[1]).item() == pytest.approx(sum(expected) / 2, rel=0.01)


@pytest.mark.parametrize(
    ("layers", "trained"), [(1, {0}), (2, {0}), (4, {0, 1}), (6, {0, 1, 2}), (10, {2, 3, 4}), (16, {5, 6, 7})]
)
def test_rmu_trains_down_projections_in_the_middle(layers: int, trained: set[int]) -> None:
    model, before = (llama(num_hidden_layers=layers) for _ in range(2))
    assert list(descend(model, FORGET, RETAIN, "RMU", 1e-2, 2, 2, 0, losses)) == [1, 2]
    assert changed(before, model) == {f"model.layers.{k}.mlp.down_proj.weight" for k in trained}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
def test_rmu_moves_forget_states_more_than_retained_ones() -> None:
    model, before = (llama(num_hidden_layers=6) for _ in range(2))
    start = Steering(before, FORGET, RETAIN, STEPS, 0)
    forget, retain = ([0, 1, 2, 3], [0, 1, 2, 3])
    for _ in descend(model, FORGET, RETAIN, "RMU", 1e-2, 60, 4, 0, losses):
        pass
    end = Steering(model, FORGET, RETAIN, [Step(0, forget, retain)], 0)
    chosen = [FORGET[k] for k in forget]
    assert end.distance(chosen, start.target) < 0.7 * start.distance(chosen, start.target)
    moved = [
        sum((hidden(model, sample, 2) - hidden(before, sample, 2)).square().mean().item() for sample in samples)
        for samples in (FORGET, RETAIN[:4])
    ]
    assert moved[1] < 0.7 * moved[0]


def test_a_run_that_is_left_gives_the_parameters_back() -> None:
    model = llama(num_hidden_layers=6)
    model.model.embed_tokens.weight.requires_grad_(False)
    run: Any = descend(model, FORGET, RETAIN, "RMU", 1e-3, 3, 2, 0, losses)
    next(run)
    run.close()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]
    assert not any(module._forward_hooks for module in model.modules())


# Steps without training


def linear_names(model: Any) -> set[str]:
    """The weights of all linear layers but the head."""
    return {name for name, _ in model.named_parameters() if name.endswith("proj.weight")}


class Shifted:
    """Adds zeros to the output of every linear layer for one sample, to find gradients by it."""

    def __init__(self, model: Any, sample: Sample) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        shifts: dict[str, Tensor] = {}

        def hook_of(name: str) -> Callable[..., Tensor]:
            def shift(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
                self.inputs[name] = given[0][0].detach()
                shifts[name] = torch.zeros_like(output, requires_grad=True)
                return output + shifts[name]

            return shift

        layers = dict(model.named_modules())
        hooks = [layers[n.removesuffix(".weight")].register_forward_hook(hook_of(n)) for n in linear_names(model)]
        ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
        model(input_ids=ids, labels=labels).loss.backward()
        for hook in hooks:
            hook.remove()
        for name, tensor in shifts.items():
            assert tensor.grad is not None
            self.gradients[name] = tensor.grad[0]


def explicit_moments(model: Any, samples: list[Sample]) -> dict[str, Tensor]:
    """Token by token, without padding."""
    inputs = [Shifted(model, sample).inputs for sample in samples]
    moments = {}
    for name in linear_names(model):
        vectors = torch.cat([of_sample[name] for of_sample in inputs])
        moments[name] = torch.stack([torch.outer(vector, vector) for vector in vectors]).mean(0)
    return moments


def test_kfade_is_the_gradient_divided_by_the_kronecker_product() -> None:
    model = tiny()
    direction = kfade(model, FORGET, RETAIN, losses, damping=DAMPING, batch_size=3)
    assert direction.keys() == linear_names(model)
    shifted = [Shifted(model, sample) for sample in RETAIN]
    moments = explicit_moments(model, RETAIN)
    model.zero_grad()
    for sample in FORGET:
        ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
        (model(input_ids=ids, labels=labels).loss / len(FORGET)).backward()
    expected, squared = {}, 0.0
    for name, parameter in model.named_parameters():
        if name not in direction:
            continue
        assert parameter.grad is not None
        gradient = parameter.grad.double()
        outputs = torch.zeros(len(gradient), len(gradient), dtype=torch.float64)
        for sample, of_sample in zip(RETAIN, shifted, strict=True):
            tokens = of_sample.gradients[name].double() * math.sqrt(sample.label_count)
            outputs += tokens.T @ tokens / len(RETAIN)
        factors = []
        for factor in (outputs, moments[name].double()):
            added = math.sqrt(DAMPING) * torch.linalg.eigvalsh(factor).mean()
            factors.append(factor + added * torch.eye(len(factor), dtype=torch.float64))
        curvature = torch.kron(*factors)
        step = torch.linalg.solve(curvature, gradient.flatten())
        expected[name] = step.view_as(gradient)
        squared += float(step @ curvature @ step)
    scale = math.sqrt(2 * PREDICTED_RISE / squared)
    for name, tensor in direction.items():
        torch.testing.assert_close(tensor, (-scale * expected[name]).float(), rtol=1e-2, atol=1e-5)


def test_drawn_labels_give_the_curvature_of_the_mean_loss() -> None:
    """E y yᵀ over labels drawn from the model is 1/T Σ of the tokens' Gauss-Newton matrices, here at the logits."""
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))  # T = 2 tokens of 3 words
    p = logits.softmax(-1)
    mean = torch.zeros(6, 6)
    for first in range(3):
        for second in range(3):
            y = (p - torch.eye(3)[[first, second]]).flatten() / 2 * math.sqrt(2)
            mean += p[0, first] * p[1, second] * torch.outer(y, y)
    expected = torch.block_diag(*(torch.diag(each) - torch.outer(each, each) for each in p)) / 2  # type: ignore[no-untyped-call]
    torch.testing.assert_close(mean, expected)


def test_kfade_goes_uphill() -> None:
    model = tiny()
    direction = kfade(model, FORGET, RETAIN, losses)
    moved = deepcopy(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if name in direction:
                parameter -= direction[name]
    assert losses(moved, FORGET).mean() > losses(model, FORGET).mean()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_agreeing_by_hand() -> None:
    first = {"a": torch.tensor([1.0, -2.0, 3.0, 0.0, 0.0, -1.0])}
    second = {"a": torch.tensor([2.0, -4.0, -1.0, 5.0, 0.0, -1.0])}
    third = {"a": torch.tensor([6.0, -3.0, 1.0, 1.0, 0.0, 1.0])}
    assert agreeing([first, second, third])["a"].tolist() == [3.0, -3.0, 0.0, 0.0, 0.0, 0.0]
    assert agreeing([first])["a"].tolist() == first["a"].tolist()
    assert first["a"].tolist() == [1.0, -2.0, 3.0, 0.0, 0.0, -1.0]
