"""The importance: means over a data set of gradients, or of squared per-sample gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.data.samples import Sample, row_count
from perta_fast.distributed.overlapped_sum import OverlappedSum
from perta_fast.distributed.ranks import Ranks, deal
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
from perta_fast.importance.per_sample import Plan, embeddings_need_gradients, gradients_only_for, plan_for
from perta_fast.importance.per_sample_modules import Target
from perta_fast.models.held_tensors import check_dtype, check_in_memory
from perta_fast.models.losses import per_sample_losses
from perta_fast.models.token_scores import evaluation_mode
from perta_fast.ops import accumulate_, accumulate_square_
from perta_fast.progress import Bar, Progress
from perta_fast.rules import Estimator


@dataclass
class Accumulated:
    """Float32 means by parameter name. one_by_one: the parameters that took a backward pass for each sample."""

    means: dict[str, Tensor]
    one_by_one: list[str]


def accumulate(
    module: nn.Module,
    samples: Sequence[Sample],
    estimator: Estimator,
    batch_size: int,
    description: str = "importance",
    progress: Progress = True,
    ranks: Ranks = Ranks.ALONE,
) -> Accumulated:
    """The mean over ``samples`` of gradients, or of squared per-sample gradients; see ``estimate_importance``."""
    with ranks.together(description):
        parameters = _covered(module, estimator)
        means = {
            name: torch.zeros(held(parameter).shape, dtype=torch.float32, device=parameter.device)
            for name, parameter in parameters.items()
        }
        summed = summed_by_fsdp(module)
        if any(processes != ranks.world for processes, _ in summed.values()):
            raise InputError("the module is sharded by FSDP2; pass group, the processes that its data is dealt over")
    dealt = deal([len(sample.input_ids) for sample in samples], ranks.world)
    one_by_one: list[str] = []
    with _ready_to_measure(module), Bar(len(dealt[ranks.rank]), description, ranks.first and progress, "sample") as bar:
        passes = _BackwardPasses(module, samples, dealt, ranks, bool(summed), bar.update)
        if estimator == "grad":
            local = {name: mean for name, mean in means.items() if name not in summed}
            with (
                ranks.together(description),
                OverlappedSum(ranks, local) as sums,
                gradients_accumulated_into(module, means, squared=False, complete=sums.complete),
            ):
                passes.run(batch_size, sums)
        else:
            one_by_one = _accumulate_squares(passes, means, batch_size, description, bar.reset)
    for name, mean in means.items():
        if name in summed:
            mean.mul_(summed[name][1])
        mean.div_(row_count(samples))
        if estimator == "empirical-fisher":
            mean.clamp_(min=0)  # a tied weight gets H^2 + (E^2 + 2 E H), which rounding may leave below 0
    return Accumulated({name: sharded_as(parameters[name], mean) for name, mean in means.items()}, one_by_one)


def _accumulate_squares(
    passes: "_BackwardPasses",
    sums: dict[str, Tensor],
    batch_size: int,
    description: str,
    restart_bar: Callable[[], object],
) -> list[str]:
    """Add every sample's squared gradient to ``sums``; return the parameters that took a pass for each sample."""
    module, ranks = passes.module, passes.ranks
    with ranks.together(description):
        targets = {name: Target(total) for name, total in sums.items()}
        plan = plan_for(module, passes.samples, targets)
    with ranks.together(description):
        if any(names != plan.one_by_one for names in ranks.gather(plan.one_by_one)):
            raise RunError("the processes see different models; use the same versions and devices")
    if plan.modules:
        batched = {name: total for name, total in sums.items() if name not in plan.one_by_one}
        with ranks.together(description), OverlappedSum(ranks, batched) as over_ranks, plan.installed(module):
            for name in batched:
                targets[name].complete = partial(over_ranks.complete, name)
            passes.run(batch_size, over_ranks, plan)
    if plan.one_by_one:
        others = {name: sums[name] for name in plan.one_by_one}
        restart_bar()
        with (
            ranks.together(description),
            OverlappedSum(ranks, others) as over_ranks,
            embeddings_need_gradients(module),
            gradients_only_for(module, others),
            gradients_accumulated_into(module, others, squared=True, complete=over_ranks.complete),
        ):
            passes.run(1, over_ranks, unreached=True)
    return plan.one_by_one


def _covered(module: nn.Module, estimator: Estimator) -> dict[str, nn.Parameter]:
    """The parameters that the importance covers. Raises InputError if it cannot be estimated."""
    reshard_(module)
    if is_sharded(module) and estimator != "grad":
        raise InputError(
            f"{estimator} cannot be estimated on a sharded module, whose gradients are sums over samples; estimate "
            "grad, for rules grad and fisher, or start from a checkpoint, with stream if it is large"
        )
    parameters = {}
    for name, parameter in module.named_parameters():
        check_in_memory(name, parameter)
        if parameter.requires_grad:
            check_dtype(name, parameter.dtype)
            parameters[name] = parameter
    if not parameters:
        raise InputError("the model has no floating-point parameter that requires a gradient")
    return parameters


@dataclass(frozen=True)
class _BackwardPasses:
    """Back-propagates the loss of every sample that is dealt to this rank."""

    module: nn.Module
    samples: Sequence[Sample]
    dealt: Sequence[Sequence[int]]  # the numbers of each rank's samples
    ranks: Ranks
    in_step: bool  # the ranks exchange data in every pass, so all must do the same number of passes
    advance: Callable[[int], Any]  # called with the number of samples that are done

    def run(self, batch_size: int, sums: OverlappedSum, plan: Plan | None = None, unreached: bool = False) -> None:
        """Run batch by batch. unreached: a forward pass may reach no parameter that needs a gradient."""
        device = computing_device(self.module)
        dealt = self.dealt[self.ranks.rank]
        by_length = batches_by_length([self.samples[number] for number in dealt], batch_size)
        batches = [[dealt[k] for k in batch] for batch in by_length]
        counted = len(batches)
        if self.in_step:  # batches that do not count, so that all ranks do the same number
            most = -(-max(map(len, self.dealt)) // batch_size)
            batches += [[0]] * (most - counted)
        for k, numbers in enumerate(batches):
            samples = [self.samples[number] for number in numbers]
            with nullcontext() if plan is None else plan.batch([len(sample.input_ids) for sample in samples]):
                losses = per_sample_losses(self.module, Batch.of(samples, device))
                with self.ranks.together("a batch") if self.in_step else nullcontext():
                    if not losses.requires_grad and not unreached:
                        raise InputError(
                            "the model's loss has no gradient; does its forward run under no_grad or inference_mode?"
                        )
                    check_losses(losses, numbers)
                if k == len(batches) - 1:
                    sums.last_pass()
                if losses.requires_grad:
                    (losses.sum() if k < counted else 0 * losses.sum()).backward()
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
        raise NotFiniteError(f"the importance of {name} is not finite; run the model in float32 or bfloat16 (‹dtype›)")


@contextmanager
def gradients_accumulated_into(
    module: nn.Module, sums: Mapping[str, Tensor], squared: bool, complete: Callable[[str], object] | None = None
) -> Iterator[None]:
    """Add each parameter's gradient to ``sums`` as soon as it is complete over all uses, and free it.

    complete: called with a parameter's name when a backward pass has added its gradient.
    """
    add = accumulate_square_ if squared else accumulate_

    def hook(parameter: Tensor, name: str) -> None:
        gradient = held_gradient(parameter)
        add(sums[name], gradient.to_dense() if gradient.is_sparse else gradient.contiguous())
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
    """Put layers that checkpoint activations in training mode: transformers checkpoints in no other mode.

    Their submodules stay in evaluation mode, and so does a model with dropout.
    """
    config = getattr(module, "config", None)
    if config is None or any(value for name, value in vars(config).items() if "drop" in name):
        return
    for layer in module.modules():
        if getattr(layer, "gradient_checkpointing", False) is True:
            layer.training = True


@contextmanager
def _ready_to_measure(module: nn.Module) -> Iterator[None]:
    """Switch dropout and compiled code off and clear gradients; restore training modes and gradients at the end."""
    gradients = {parameter: parameter.grad for parameter in module.parameters()}
    for parameter in gradients:
        parameter.grad = None
    try:
        # Compiled code would not call the modules whose inputs and gradients are recorded.
        with evaluation_mode(module), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            _keep_checkpointing(module)
            yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
