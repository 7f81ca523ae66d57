"""A few steps of training on samples: what an attacker does who has some of the forgotten data."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from perta_fast.data.batches import Batch
from perta_fast.data.samples import Sample
from perta_fast.errors import InputError, NotFiniteError
from perta_fast.models.held_tensors import check_dtype, check_in_memory
from perta_fast.models.losses import per_sample_losses
from perta_fast.models.token_scores import device_of, evaluation_mode
from perta_fast.progress import Bar, Progress

RATE, BATCH_SIZE, SEED = 1e-5, 8, 0


def relearn_(
    module: nn.Module,
    samples: Sequence[Sample],
    steps: int,
    rate: float = RATE,
    batch_size: int = BATCH_SIZE,
    seed: int = SEED,
    *,
    progress: Progress = False,
    description: str = "relearning",
) -> list[float]:
    """Train the parameters of ``module`` that require a gradient, in place; returns each step's loss before it.

    The loss, in nats, is the mean over the batch of each row's mean token loss. Batches go through the samples again
    and again, each time in another order; ``seed`` decides it. AdamW of a constant ``rate``, with torch's own settings
    but no weight decay; no dropout. 16-bit parameters are stepped as float32 copies and rounded after each step, as
    such small steps would be lost in 16 bits. Gradients that the module holds stay as they are.

    Raises InputError for steps, rate or batch_size not above 0, no samples, or a parameter that is not plain float32,
    bfloat16 or float16; NotFiniteError if a loss is not finite, with the module changed by the steps before. Memory
    beside the model: 12 bytes for each parameter, 18 if it has 16 bits; the activations of a batch.
    """
    if steps < 1 or batch_size < 1 or not (math.isfinite(rate) and rate > 0):
        raise InputError(f"steps, batch_size and rate must be above 0; they are {steps}, {batch_size} and {rate}")
    if not samples:
        raise InputError("there are no samples to relearn")
    check_trainable(module)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    copies = [parameter.detach().float() for parameter in trained]  # of float32 it is no copy
    optimizer = torch.optim.AdamW(copies, lr=rate, weight_decay=0.0, foreach=False)
    losses, device = [], device_of(module)
    batches = _batches(len(samples), batch_size, seed)
    with Bar(steps, description, progress, "step") as bar, evaluation_mode(module), torch.enable_grad():
        for step in range(1, steps + 1):
            batch = Batch.of([samples[k] for k in next(batches)], device)
            loss = per_sample_losses(module, batch).sum() / batch.shares.sum()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise NotFiniteError(f"the loss of step {step} of relearning is not finite")
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            for copy, gradient in zip(copies, gradients, strict=True):
                copy.grad = None if gradient is None else gradient.float()
            del loss, gradients
            optimizer.step()
            optimizer.zero_grad()  # before the next gradients take their place
            with torch.no_grad():
                for parameter, copy in zip(trained, copies, strict=True):
                    if parameter.dtype != copy.dtype:
                        parameter.copy_(copy)
            bar.update(1)
    return losses


def check_trainable(module: nn.Module) -> None:
    """Raise InputError for a parameter that ``relearn_`` cannot train, or if there is none."""
    parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
    for name, parameter in parameters.items():
        check_in_memory(name, parameter)
        check_dtype(name, parameter.dtype)
    if not parameters:
        raise InputError(
            "the module has no parameter that requires a gradient, so it cannot relearn; call requires_grad_() on it"
        )


def _batches(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Numbers of samples without end: all of them in an order drawn anew, cut into batches, the last one smaller."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for begin in range(0, count, batch_size):
            yield order[begin : begin + batch_size]
