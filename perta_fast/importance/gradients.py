"""Means over a data set of gradients, or of squared per-sample gradients: what importance is made of."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from perta_fast.data import Sample
from perta_fast.errors import InputError, NotFiniteError
from perta_fast.importance.module_rules import Target
from perta_fast.importance.per_sample import Plan, only_asking, plan_for
from perta_fast.losses import Batch, batches_by_length, per_sample_losses
from perta_fast.ops import accumulate_, accumulate_square_
from perta_fast.ops.backends import DTYPE_CODES
from perta_fast.progress import sample_bar
from perta_fast.rules import Estimator

Advance = Callable[[int], Any]


@dataclass
class Accumulated:
    """Means by parameter name, float32; and the parameters that took a backward pass for each sample."""

    means: dict[str, Tensor]
    one_by_one: list[str] = field(default_factory=list)


def accumulate(
    module: nn.Module,
    samples: Sequence[Sample],
    estimator: Estimator,
    batch_size: int,
    description: str = "importance",
    progress: bool = True,
) -> Accumulated:
    """The mean over ``samples`` of gradients, or of squared ones.

    What ``estimate_importance`` runs once model and data are there; see there for arguments and errors.
    """
    _check_parameters(module)
    means = {
        name: torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point()
    }
    if not means:
        raise InputError("the model has no floating-point parameter that requires a gradient")
    result = Accumulated(means)
    with _ready_to_measure(module), sample_bar(len(samples), description, progress) as bar:
        if estimator == "grad":
            with gradients_folded_into(module, means, squared=False):
                _backward(module, samples, batch_size, bar.update)
        else:
            plan = plan_for(module, samples, {name: Target(mean, None) for name, mean in means.items()})
            if plan.rules:
                with plan.installed(module):
                    _backward(module, samples, batch_size, bar.update, plan)
            if plan.left:
                result.one_by_one = plan.left
                left = {name: means[name] for name in plan.left}
                bar.reset(len(samples))
                with only_asking(module, left), gradients_folded_into(module, left, squared=True):
                    _backward(module, samples, 1, bar.update, unreached=True)
    for mean in means.values():
        mean.div_(len(samples))
        if estimator == "empirical-fisher":
            mean.clamp_(min=0)  # a tied head and embedding meet as H^2 + (E^2 + 2 E H), which may round below 0
    return result


def _backward(
    module: nn.Module,
    samples: Sequence[Sample],
    batch_size: int,
    advance: Advance,
    plan: Plan | None = None,
    unreached: bool = False,
) -> None:
    """Back-propagate every sample's loss, a batch at a time.

    unreached: a forward pass may reach none of the parameters that ask for a gradient.
    """
    device = next(module.parameters()).device
    for numbers in batches_by_length(samples, batch_size):
        chosen = [samples[k] for k in numbers]
        if plan is not None:
            plan.begin(chosen)
        losses = per_sample_losses(module, Batch.of(chosen, device))
        if not losses.requires_grad and not unreached:
            raise InputError(
                "the model's loss has no gradient; does its forward run under no_grad or inference_mode?"
            )
        check_losses(losses, numbers)
        if losses.requires_grad:
            losses.sum().backward()
        if plan is not None:
            plan.finish()
        advance(len(numbers))


def check_losses(losses: Tensor, numbers: Sequence[int]) -> None:
    """Raise NotFiniteError, naming the samples by ``numbers``, if a loss is not finite."""
    finite = torch.isfinite(losses)
    if not bool(finite.all()):
        bad = [numbers[k] for k in (~finite).nonzero().flatten().tolist()]
        raise NotFiniteError(
            f"the loss of sample {', '.join(map(str, bad))} (counted from 0) is not finite; "
            "look at the sample, or run the model in float32 or bfloat16"
        )


def check_finite(name: str, mean: Tensor) -> None:
    """Raise NotFiniteError if the importance of ``name`` is not finite."""
    if mean.numel() and not bool(torch.isfinite(torch.stack(mean.aminmax())).all()):  # a NaN is both
        raise NotFiniteError(
            f"the importance of {name} is not finite; run the model in float32 or bfloat16 (--dtype)"
        )


def _check_parameters(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise InputError(f"parameter {name} is on the meta device: its values are not in memory")
        if parameter.requires_grad and parameter.dtype not in DTYPE_CODES:
            raise InputError(f"parameter {name} is {parameter.dtype}; it must be float32, bfloat16 or float16")


@contextmanager
def gradients_folded_into(module: nn.Module, sums: Mapping[str, Tensor], squared: bool) -> Iterator[None]:
    """Fold every parameter's gradient, complete over all its uses, and free it at once."""
    fold = accumulate_square_ if squared else accumulate_

    def hook_for(total: Tensor) -> Any:
        def hook(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            fold(total, gradient.to_dense() if gradient.is_sparse else gradient.contiguous())
            parameter.grad = None

        return hook

    parameters = dict(module.named_parameters())
    handles = [
        parameters[name].register_post_accumulate_grad_hook(hook_for(total)) for name, total in sums.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep_checkpointing(module: nn.Module) -> None:
    """Let layers that were told to checkpoint their activations do so, which transformers ties to training.

    The mode is set on these layers alone and not on their parts; a model with dropout is left in evaluation.
    """
    config = getattr(module, "config", None)
    if config is None or any(value for name, value in vars(config).items() if "drop" in name):
        return
    for part in module.modules():
        if getattr(part, "gradient_checkpointing", False) is True:
            part.training = True


@contextmanager
def _ready_to_measure(module: nn.Module) -> Iterator[None]:
    """Dropout off, no gradients left over; all put back at the end."""
    training = {part: part.training for part in module.modules()}
    gradients = {parameter: parameter.grad for parameter in module.parameters()}
    module.eval()
    _keep_checkpointing(module)
    for parameter in gradients:
        parameter.grad = None
    try:
        with torch.enable_grad():
            yield
    finally:
        for part, mode in training.items():
            part.training = mode
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
