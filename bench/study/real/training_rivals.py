"""Unlearning a real model by training it: gradient ascent, gradient difference, NPO, SimNPO and RMU.

The losses of the first three are those of ``bench.study.baselines``. A step takes as many retained samples as forget
samples, and runs each kind as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.study.baselines import BASELINES, Losses
from bench.study.real.compute import SampleLosses, fast_products
from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.data.samples import IGNORED, Sample
from perta_fast.demo.training import descend_
from perta_fast.models.losses import sample_means

SIMNPO_BETA = 2.5
SIMNPO_WEIGHT = 0.1375  # of the forget loss beside the retain loss
STEERING = 2.0  # length of RMU's target, by the mean length of the hidden states
_WARM_UP = 0.1  # of the steps


class Step(NamedTuple):
    """Counted from 0, with the numbers of its forget and of its retained samples."""

    number: int
    forget: list[int]
    retain: list[int]


def simnpo(losses: Losses) -> Tensor:
    """-2 / beta · mean log sigmoid(beta L_f), times its weight, + L_r; L_f is the mean token loss of an answer.

    Source: SimNPO (arXiv 2410.07163), gamma 0. beta and weight are those that its authors give for 5 % of TOFU; for
    10 %, and by default in open-unlearning, they are 4.5 and 0.125.
    """
    forget = -2 / SIMNPO_BETA * functional.logsigmoid(SIMNPO_BETA * losses.forget).mean()
    return SIMNPO_WEIGHT * forget + losses.retain.mean()


FORMULAS = {**BASELINES, "SimNPO": simnpo}
METHODS = (*FORMULAS, "RMU")


def descend(
    module: Any,
    forget: Sequence[Sample],
    retain: Sequence[Sample],
    method: str,
    rate: float,
    steps: int,
    batch_size: int,
    seed: int,
    losses: SampleLosses,
) -> Iterator[int]:
    """Train ``module`` in place by one of ``METHODS``, and yield the number of steps after each, in evaluation mode.

    AdamW without weight decay, gradients clipped to norm 1; the rate rises over the first tenth of the steps, then
    stays. All parameters are trained, but for RMU (see ``Steering``), which needs a larger rate for that. seed: of the
    order of the samples and of RMU's direction. losses: the mean token loss (N,) of each of N samples.
    """
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is none of {', '.join(METHODS)}")
    size = min(batch_size, len(forget))
    orders = (_batches(len(samples), size, steps, seed) for samples in (forget, retain))
    taken = [Step(number, *both) for number, both in enumerate(zip(*orders, strict=True))]
    loss: Callable[[Step], Tensor]
    trained: Collection[nn.Parameter]
    if method == "RMU":
        steering = Steering(module, forget, retain, taken, seed)
        loss, trained = steering.loss, steering.trained
    else:
        loss, trained = _loss_of(module, forget, retain, method, batch_size, losses), list(module.parameters())
    warm_up = max(1, int(_WARM_UP * steps))
    with _training_only(module, trained):
        for count in descend_(module, taken, loss, lambda step: rate * min(1.0, (step + 1) / warm_up)):
            module.eval()
            yield count


class Steering:
    """RMU: hidden states of forget rows are drawn to one random vector, those of retained rows to what they were.

    loss = mean |h_f - c u|² / d + mean |h_r - h_r of theta_full|² / d, where h (d,) is the output of a layer in the
    middle at a labelled token, means are over the tokens of a sample, then over samples; u (d,) is a random unit vector
    of positive numbers; c is ``STEERING`` times the mean length of h_f under theta_full. ``trained`` are the down
    projections of that layer and the two before it.

    Source: RMU (arXiv 2403.03218) with the weights, the layers (7, 6 and 5 of 16) and the tokens of open-unlearning. It
    takes 2 for c; that is next to nothing where h has a length of 160, as in SmolLM2, so c follows the length of h
    as in Adaptive RMU (arXiv 2408.06223). Products are in bfloat16. Memory: h_r of theta_full for every step, 4 d bytes
    for each labelled token, and no second model.
    """

    def __init__(
        self, module: Any, forget: Sequence[Sample], retain: Sequence[Sample], steps: Sequence[Step], seed: int
    ) -> None:
        layers = module.model.layers
        self.layer = max(0, len(layers) // 2 - 1)
        self.trained = [layer.mlp.down_proj.weight for layer in layers[max(0, self.layer - 2) : self.layer + 1]]
        self._module, self._forget, self._retain = module, forget, retain
        with torch.no_grad():
            self.frozen = [self.states([retain[k] for k in step.retain])[0] for step in steps]
            lengths = [self.states([sample])[0].norm(dim=-1).mean() for sample in forget]
            direction = torch.rand(module.config.hidden_size, generator=torch.Generator().manual_seed(seed))
            length = STEERING * torch.stack(lengths).mean()
            self.target = length * (direction / direction.norm()).to(length.device)  # (d,)

    def loss(self, step: Step) -> Tensor:
        """The sum of both parts."""
        return self.distance([self._forget[k] for k in step.forget], self.target) + self.retain_loss(step)

    def retain_loss(self, step: Step) -> Tensor:
        """The part of the retained samples."""
        return self.distance([self._retain[k] for k in step.retain], self.frozen[step.number])

    def distance(self, samples: list[Sample], target: Tensor) -> Tensor:
        """The mean square of h - ``target``, which is (d,) or, for M labelled tokens, (M, d)."""
        states, owners = self.states(samples)
        return sample_means((states - target).square().mean(-1), owners, len(samples)).mean()

    def states(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        """h (M, d) float32 of the M labelled tokens, and the number of the sample (M,) of each."""
        model = self._module.model
        layers = model.layers
        batch = Batch.of(samples, self.trained[0].device)
        seen: list[Tensor] = []

        def see(_layer: nn.Module, _given: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        hook = layers[self.layer].register_forward_hook(see)
        model.layers = layers[: self.layer + 1]  # those above it are not needed
        try:
            with fast_products(self._module):
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        finally:
            model.layers = layers
            hook.remove()
        labelled = batch.labels != IGNORED
        return seen[0][labelled].float(), labelled.nonzero()[:, 0]


def _loss_of(
    module: Any, forget: Sequence[Sample], retain: Sequence[Sample], method: str, batch_size: int, losses: SampleLosses
) -> Callable[[Step], Tensor]:
    """The loss of a step by one of ``FORMULAS``. What they need of theta_full is measured here, first."""
    device = next(module.parameters()).device
    count = torch.tensor([float(sample.label_count) for sample in forget], device=device)
    reference = torch.zeros(len(forget), device=device)
    if method == "NPO":
        with torch.no_grad():
            for numbers in batches_by_length(forget, batch_size):
                reference[numbers] = losses(module, [forget[k] for k in numbers])

    def loss(step: Step) -> Tensor:
        return FORMULAS[method](
            Losses(
                losses(module, [forget[k] for k in step.forget]),
                count[step.forget],
                reference[step.forget],
                losses(module, [retain[k] for k in step.retain])
                if method != "gradient ascent"  # which uses no retained samples
                else torch.zeros(1),
            )
        )

    return loss


def _batches(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """``steps`` batches of ``size`` numbers below ``count``; each epoch is in a new random order."""
    order = torch.Generator().manual_seed(seed)
    epochs = -(-steps * size // count)
    numbers = torch.cat([torch.randperm(count, generator=order) for _ in range(epochs)])
    batches: list[list[int]] = numbers[: steps * size].view(steps, size).tolist()
    return batches


@contextmanager
def _training_only(module: nn.Module, trained: Collection[nn.Parameter]) -> Iterator[None]:
    """Only ``trained`` requires gradients here."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    chosen = {id(parameter) for parameter in trained}
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
