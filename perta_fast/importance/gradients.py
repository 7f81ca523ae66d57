"""Means over a data set of gradients, or of squared per-sample gradients: what importance is made of."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.data.samples import Sample
from perta_fast.distributed.dealing import deal
from perta_fast.distributed.overlapped_sum import OverlappedSum
from perta_fast.distributed.ranks import Ranks
from perta_fast.distributed.sharded import (
    computing_device,
    held,
    held_gradient,
    is_sharded,
    reshard_,
    sharded_as,
    summed_by_fsdp,
)
from perta_fast.errors import InputError, NotFiniteError, RunError
from perta_fast.importance.per_sample import Plan, only_asking, plan_for
from perta_fast.importance.per_sample_modules import Target
from perta_fast.models.losses import per_sample_losses
from perta_fast.ops import accumulate_, accumulate_square_
from perta_fast.ops.backends import DTYPE_CODES
from perta_fast.progress import Progress, sample_bar
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
    progress: Progress = True,
    ranks: Ranks = Ranks.ALONE,
) -> Accumulated:
    """The mean over ``samples`` of gradients, or of squared ones.

    What ``estimate_importance`` runs once model and data are there; see there for arguments and errors.
    """
    with ranks.together(description):
        parameters = _covered(module, estimator)
        means = {
            name: torch.zeros(held(parameter).shape, dtype=torch.float32, device=parameter.device)
            for name, parameter in parameters.items()
        }
        summed = summed_by_fsdp(module)
        if any(processes != ranks.world for processes, _ in summed.values()):
            raise InputError(
                "the module is sharded by FSDP2; pass group, the processes that its data is dealt over"
            )
    dealt = deal([len(sample.input_ids) for sample in samples], ranks.world)
    one_by_one: list[str] = []
    with (
        _ready_to_measure(module),
        sample_bar(len(dealt[ranks.rank]), description, ranks.first and progress) as bar,
    ):
        job = _Backward(module, samples, dealt, ranks, bool(summed), bar.update)
        if estimator == "grad":
            others = {name: mean for name, mean in means.items() if name not in summed}
            with (
                ranks.together(description),
                OverlappedSum(ranks, others) as sums,
                gradients_folded_into(module, means, squared=False, complete=sums.complete),
            ):
                job.run(batch_size, sums)
        else:
            with ranks.together(description):
                targets = {name: Target(mean, None) for name, mean in means.items()}
                plan = plan_for(module, samples, targets)
            with ranks.together(description):
                if any(left != plan.left for left in ranks.gather(plan.left)):
                    raise RunError("the processes see different models; use the same versions and devices")
            if plan.rules:
                batched = {name: mean for name, mean in means.items() if name not in plan.left}
                with ranks.together(description), OverlappedSum(ranks, batched) as sums, plan.installed(module):
                    for name in batched:
                        targets[name].complete = partial(sums.complete, name)
                    job.run(batch_size, sums, plan)
            if plan.left:
                one_by_one = plan.left
                left = {name: means[name] for name in plan.left}
                bar.reset()
                with (
                    ranks.together(description),
                    OverlappedSum(ranks, left) as sums,
                    only_asking(module, left),
                    gradients_folded_into(module, left, squared=True, complete=sums.complete),
                ):
                    job.run(1, sums, unreached=True)
    for name, mean in means.items():
        if name in summed:
            mean.mul_(summed[name][1])
        mean.div_(len(samples))
        if estimator == "empirical-fisher":
            mean.clamp_(min=0)  # a tied head and embedding meet as H^2 + (E^2 + 2 E H), which may round below 0
    return Accumulated({name: sharded_as(parameters[name], mean) for name, mean in means.items()}, one_by_one)


def _covered(module: nn.Module, estimator: Estimator) -> dict[str, nn.Parameter]:
    """The parameters to estimate the importance of. Raises InputError if that cannot be done."""
    reshard_(module)
    if is_sharded(module) and estimator != "grad":
        raise InputError(
            f"{estimator} is not to be had of a sharded module, whose gradients are sums of samples; estimate "
            "grad, which serves rules grad and fisher, or start from a checkpoint, with stream if need be"
        )
    _check_parameters(module)
    parameters = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point()
    }
    if not parameters:
        raise InputError("the model has no floating-point parameter that requires a gradient")
    return parameters


@dataclass(frozen=True)
class _Backward:
    """Back-propagates the loss of every sample that is dealt to this rank.

    in_step: the ranks meet in every forward and backward pass, so all must do as many.
    """

    module: nn.Module
    samples: Sequence[Sample]
    dealt: Sequence[Sequence[int]]
    ranks: Ranks
    in_step: bool
    advance: Advance

    def run(
        self, batch_size: int, sums: OverlappedSum, plan: Plan | None = None, unreached: bool = False
    ) -> None:
        """A batch at a time. unreached: a forward pass may reach no parameter that asks for a gradient."""
        device = computing_device(self.module)
        own = self.dealt[self.ranks.rank]
        batches = [
            [own[place] for place in places]
            for places in batches_by_length([self.samples[k] for k in own], batch_size)
        ]
        counted = len(batches)
        if self.in_step:
            rounds = -(-max(map(len, self.dealt)) // batch_size)
            batches += [[0]] * (rounds - counted)
        for k, numbers in enumerate(batches):
            chosen = [self.samples[number] for number in numbers]
            if plan is not None:
                plan.begin(chosen)
            losses = per_sample_losses(self.module, Batch.of(chosen, device))
            with self.ranks.together("a batch") if self.in_step else nullcontext():
                if not losses.requires_grad and not unreached:
                    raise InputError(
                        "the model's loss has no gradient; does its forward run under no_grad or "
                        "inference_mode?"
                    )
                check_losses(losses, numbers)
            if k == len(batches) - 1:
                sums.last_pass()
            if losses.requires_grad:
                (losses.sum() if k < counted else 0 * losses.sum()).backward()
            if plan is not None:
                plan.finish()
            self.advance(len(numbers) if k < counted else 0)


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
def gradients_folded_into(
    module: nn.Module,
    sums: Mapping[str, Tensor],
    squared: bool,
    complete: Callable[[str], object] | None = None,
) -> Iterator[None]:
    """Fold every parameter's gradient, complete over all its uses, and free it at once.

    complete: is called with a parameter's name when a backward pass has folded its gradient.
    """
    fold = accumulate_square_ if squared else accumulate_

    def hook(parameter: Tensor, name: str) -> None:
        gradient = held_gradient(parameter)
        fold(sums[name], gradient.to_dense() if gradient.is_sparse else gradient.contiguous())
        parameter.grad = None
        if complete is not None:
            complete(name)

    parameters = dict(module.named_parameters())
    handles = [parameters[name].register_post_accumulate_grad_hook(partial(hook, name=name)) for name in sums]
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
