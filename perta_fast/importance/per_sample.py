"""The exact per-sample Fisher of a whole model, from one backward pass for each batch.

A small batch, the probe, is run through the model to see how each module is called. Each module with parameters gets
the first ``ModuleFisher`` (``per_sample_modules``) that gives the same result as the module. Parameters without one
take a backward pass for each sample.

Shapes: N samples, T tokens of the longest of them.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from perta_fast.data.samples import Sample
from perta_fast.importance.per_sample_modules import (
    BatchShape,
    ElementwiseFisher,
    EmbeddingFisher,
    LinearFisher,
    LoopFisher,
    ModuleFisher,
    Target,
)

# Sizes of the probe: two different primes, so that a shape tells which dimension is which.
PROBE_SAMPLES, PROBE_TOKENS = 5, 7


@contextmanager
def gradients_only_for(module: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Make autograd compute gradients only for the parameters ``names``."""
    others = [p for name, p in module.named_parameters() if p.requires_grad and name not in names]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


@dataclass
class Plan:
    """Which modules give per-sample squares in a batch, and the parameters that need a pass for each sample."""

    modules: list[ModuleFisher] = field(default_factory=list)
    one_by_one: list[str] = field(default_factory=list)

    @contextmanager
    def installed(self, module: nn.Module) -> Iterator[None]:
        """Put ``modules`` in place of the model's, and let autograd compute no parameter's gradient."""
        with ExitStack() as stack:
            for fisher in self.modules:
                stack.enter_context(fisher.installed())
            stack.enter_context(gradients_only_for(module, ()))
            yield

    @contextmanager
    def batch(self, lengths: Sequence[int]) -> Iterator[None]:
        """A context for the forward and backward pass over samples of these lengths."""
        shape = BatchShape(len(lengths), max(lengths), torch.tensor(lengths))
        for fisher in self.modules:
            fisher.batch = shape
        yield
        for fisher in self.modules:
            fisher.finish_batch()


def plan_for(
    model: nn.Module, samples: Sequence[Sample], targets: Mapping[str, Target], run: Callable[..., Any] | None = None
) -> Plan:
    """Choose a ``ModuleFisher`` for each module with one of ``targets``. run: the part of ``model`` to call."""
    names = {parameter: name for name, parameter in model.named_parameters() if name in targets}
    uses: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in targets}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter in names:
                uses[names[parameter]].append((module, key))
    device = next(iter(names)).device
    seen = _probe(run or model, device, samples, {module for using in uses.values() for module, _ in using})
    fishers: dict[nn.Module, ModuleFisher] = {}
    plan = Plan()
    for name, using in uses.items():
        calls = [seen[module] for module, _ in using]
        if not _can_be_combined(calls):
            plan.one_by_one.append(name)
            continue
        for module, key in using:
            kind = seen[module].kind
            assert kind is not None
            fishers.setdefault(module, kind(module, {})).targets[key] = targets[name]
        _connect([fishers[module] for module, _ in using], sum(call.count for call in calls))
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else fishers.get(find_head())
    if isinstance(head, LinearFisher):
        head.sparse = True
    plan.modules = list(fishers.values())
    return plan


def _can_be_combined(calls: Sequence["_Calls"]) -> bool:
    """Whether each sample's gradients of one parameter, from all its modules, can be summed before they are squared."""
    kinds = [call.kind for call in calls]
    if not calls or None in kinds or any(call.count == 0 for call in calls):
        return False
    count = sum(call.count for call in calls)
    tied = len(kinds) == count == 2 and set(kinds) == {EmbeddingFisher, LinearFisher}
    return count == 1 or kinds == [ElementwiseFisher] or set(kinds) == {LinearFisher} or tied


def _connect(fishers: Sequence[ModuleFisher], calls: int) -> None:
    """Connect the modules that share one parameter."""
    embedding = next((fisher for fisher in fishers if isinstance(fisher, EmbeddingFisher)), None)
    deferred: list[tuple[Tensor, Tensor]] = []
    for fisher in fishers:
        if isinstance(fisher, LinearFisher) and calls > 1:
            if embedding is None:
                fisher.deferred = deferred
            else:
                fisher.embedding = embedding


@dataclass
class _Calls:
    """How often a module was called, and the ``ModuleFisher`` that gave the same result each time."""

    count: int = 0
    kind: type[ModuleFisher] | None = None


def probe_inputs(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """The small batch of the probe: token ids (N, T), padded on the right, and lengths (N,)."""
    chosen = [samples[k % len(samples)] for k in range(PROBE_SAMPLES)]
    tokens = [sample.input_ids[:PROBE_TOKENS] for sample in chosen]
    padded = [(*ids, *[0] * (PROBE_TOKENS - len(ids))) for ids in tokens]
    return torch.tensor(padded), torch.tensor([len(ids) for ids in tokens])


def _probe(
    run: Callable[..., Any], device: torch.device, samples: Sequence[Sample], modules: set[nn.Module]
) -> dict[nn.Module, _Calls]:
    """Run a small batch through the model; try on each module the kinds of ``ModuleFisher`` that may fit it."""
    ids, lengths = probe_inputs(samples)
    shape = BatchShape(PROBE_SAMPLES, PROBE_TOKENS, lengths)
    seen = {module: _Calls(kind=None if "forward" in module.__dict__ else LinearFisher) for module in modules}

    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> None:
        calls = seen[module]
        calls.count += 1
        if calls.kind is None:
            return
        fitting = [kind for kind in candidates(module) if _fits(kind, module, shape, arguments, keywords, result)]
        if calls.count == 1:
            calls.kind = next(iter(fitting), None)
        elif calls.kind not in fitting:
            calls.kind = None

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            run(
                input_ids=ids.to(device),
                attention_mask=(torch.arange(PROBE_TOKENS) < lengths[:, None]).long().to(device),
                use_cache=False,
            )
    finally:
        for handle in handles:
            handle.remove()
    return seen


def candidates(module: nn.Module) -> list[type[ModuleFisher]]:
    """The kinds to try on a module, the fastest first."""
    if type(module) in (nn.Linear, Conv1D):
        return [LinearFisher]
    if isinstance(module, nn.Embedding):
        return [EmbeddingFisher] if module.max_norm is None and not module.scale_grad_by_freq else []
    if any(True for child in module.children() for _ in child.parameters()):
        return []
    vectors = all(parameter.dim() == 1 for parameter in module._parameters.values() if parameter is not None)
    return [ElementwiseFisher, LoopFisher] if vectors else [LoopFisher]


def _fits(
    kind: type[ModuleFisher],
    module: nn.Module,
    shape: BatchShape,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    result: Any,
) -> bool:
    """Whether a ``ModuleFisher`` gives the same result as the module."""
    fisher = kind(module, {key: Target.unused() for key, value in module._parameters.items() if value is not None})
    fisher.batch = shape
    try:
        if kind is LinearFisher:  # its arithmetic is known
            shape.by_sample(arguments[0])
            return len(arguments) == 1 and not keywords
        with torch.enable_grad():
            again = fisher.forward(*arguments, **keywords)
    except Exception:  # foreign code may fail in any way; then this kind does not fit
        return False
    pairs = zip(*((value if isinstance(value, tuple) else (value,)) for value in (again, result)), strict=False)
    return all(_close(first, second) for first, second in pairs)


def _close(first: Any, second: Any) -> bool:
    """Whether two tensors are equal up to rounding."""
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)) or first.dtype != second.dtype:
        return False
    # Positions may be given once for all samples; a ModuleFisher looks them up for each.
    if first.shape != second.shape and (first.shape[1:] != second.shape[1:] or len(second) != 1):
        return False
    if not first.is_floating_point():
        return bool((first == second).all())
    tolerance = 32 * torch.finfo(first.dtype).eps
    return bool(((first - second).abs() <= tolerance * second.abs().max()).all())
