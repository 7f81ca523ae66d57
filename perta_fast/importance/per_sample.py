"""The exact per-sample Fisher of a whole model, from one backward pass for each batch.

Two small batches, the probes, are run through the model to see how each module is called. Each module with parameters
gets the first ``ModuleFisher`` (``per_sample_modules``) that gives the same result as the module in every call.
Parameters without one, and those that are also read elsewhere than in their module's own forward, take a backward pass
for each sample.

Shapes: N samples, T tokens of the longest of them.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from perta_fast.data.samples import Sample
from perta_fast.importance.batch_shape import BatchShape
from perta_fast.importance.per_sample_modules import (
    ElementwiseFisher,
    EmbeddingFisher,
    LinearFisher,
    LoopFisher,
    ModuleFisher,
    Target,
)

# Sizes of the first probe: two different primes, so that a shape tells which dimension is which.
PROBE_SAMPLES, PROBE_TOKENS = 5, 7
# Of the second probe. A size of the model, or the number of tokens that an expert gets, may equal one of the first
# probe's sizes, but hardly that of the second too.
_SECOND_PROBE = 17, 2


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


@contextmanager
def embeddings_need_gradients(module: nn.Module) -> Iterator[None]:
    """Let the results of embeddings need a gradient when their weights do not any more.

    A part that is checkpointed with ``use_reentrant`` gives its parameters gradients only if its input needs one.
    """

    def hook(_embedding: nn.Module, _arguments: Any, result: Any) -> Any:
        return result + result.new_zeros(()).requires_grad_() if isinstance(result, Tensor) else result

    embeddings = [part for part in module.modules() if isinstance(part, nn.Embedding) and part.weight.requires_grad]
    handles = [embedding.register_forward_hook(hook) for embedding in embeddings]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters() if name in targets}
    uses: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in targets}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter in names:
                uses[names[parameter]].append((module, key))
    device = next(iter(names)).device
    holders = {parameter: {module for module, _ in uses[name]} for parameter, name in names.items()}
    reads = _OutsideReads(holders)
    holding = set[nn.Module]().union(*holders.values())
    modules = {module: name for name, module in model.named_modules() if module in holding}
    with _without_flex_attention(model):
        first, second = (
            _probe(run or model, device, probe_inputs(samples, *sizes), modules, reads)
            for sizes in ((PROBE_SAMPLES, PROBE_TOKENS), _SECOND_PROBE)
        )
    seen = {module: calls.and_of(second[module]) for module, calls in first.items()}
    read_outside = {names[parameter] for parameter in reads.found}
    fishers: dict[nn.Module, ModuleFisher] = {}
    plan = Plan()
    for name, using in uses.items():
        calls = [seen[module] for module, _ in using]
        if name in read_outside or not _can_be_combined(calls):
            plan.one_by_one.append(name)
            continue
        for module, key in using:
            if module not in fishers:
                kind, layout = seen[module].ways[0]
                fishers[module] = kind(module, {}, layout, modules[module])
            fishers[module].targets[key] = targets[name]
        _connect([fishers[module] for module, _ in using], sum(call.count for call in calls))
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else fishers.get(find_head())
    if isinstance(head, LinearFisher):
        head.sparse = True
    plan.modules = list(fishers.values())
    return plan


def _can_be_combined(calls: Sequence["_Calls"]) -> bool:
    """Whether each sample's gradients of one parameter, from all its modules, can be summed before they are squared."""
    if not calls or any(call.count == 0 or not call.ways for call in calls):
        return False
    kinds = [call.ways[0][0] for call in calls]
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


_Way = tuple[type[ModuleFisher], Any]  # a kind, and one of its layouts


@dataclass
class _Calls:
    """How often a probe called a module, and the ways that gave the same result each time, the fastest first."""

    count: int = 0
    ways: list[_Way] = field(default_factory=list)

    def add(self, ways: list[_Way]) -> None:
        """One more call, for which these fit."""
        self.ways = [way for way in self.ways if way in ways] if self.count else ways
        self.count += 1

    def and_of(self, other: "_Calls") -> "_Calls":
        """Of two probes. A module that one of them does not reach counts as not called."""
        count = max(self.count, other.count) if self.count and other.count else 0
        return _Calls(count, [way for way in self.ways if way in other.ways])


class _OutsideReads(TorchDispatchMode):
    """Finds the parameters that an operation reads while no forward of a module that holds them runs.

    Such are a weight that another module uses by hand, and one that a hook makes a weight of. A ``ModuleFisher`` sees
    none of it. holders: the modules with each parameter.
    """

    def __init__(self, holders: Mapping[Tensor, set[nn.Module]]) -> None:
        super().__init__()
        self._holders = holders
        self._running: list[nn.Module] = []
        self.found: set[Tensor] = set()

    def begin(self, module: nn.Module) -> None:
        """The forward of ``module`` begins."""
        self._running.append(module)

    def end(self) -> None:
        """The forward that began last has ended."""
        self._running.pop()

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        if operation is not torch.ops.aten.detach.default:  # has no gradient
            read = {leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)}
            self.found |= {tensor for tensor in read if self._is_outside(tensor)}
        return operation(*arguments, **(keywords or {}))

    def _is_outside(self, tensor: Tensor) -> bool:
        return tensor in self._holders and self._holders[tensor].isdisjoint(self._running)


@contextmanager
def _without_flex_attention(model: Any) -> Iterator[None]:
    """With sdpa, which calls the same modules: torch refuses flex_attention while ``_OutsideReads`` watches."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if name != "flex_attention":
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(name)


def probe_inputs(
    samples: Sequence[Sample], count: int = PROBE_SAMPLES, longest: int = PROBE_TOKENS
) -> tuple[Tensor, Tensor]:
    """The small batch of a probe: token ids (N, T), padded on the right, and lengths (N,)."""
    chosen = [samples[k % len(samples)] for k in range(count)]
    tokens = [sample.input_ids[:longest] for sample in chosen]
    padded = [(*ids, *[0] * (longest - len(ids))) for ids in tokens]
    return torch.tensor(padded), torch.tensor([len(ids) for ids in tokens])


def _probe(
    run: Callable[..., Any],
    device: torch.device,
    inputs: tuple[Tensor, Tensor],
    modules: Collection[nn.Module],
    reads: _OutsideReads,
) -> dict[nn.Module, _Calls]:
    """Run a small batch through the model; try on each module the kinds of ``ModuleFisher`` that may fit it."""
    ids, lengths = inputs
    count, tokens = ids.shape
    shape = BatchShape(count, tokens, lengths)
    seen = {module: _Calls() for module in modules}

    def before(module: nn.Module, _arguments: Any) -> None:
        reads.begin(module)

    def after(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> None:
        reads.end()  # what is tried below must not read the module's own parameters either
        kinds = [] if "forward" in module.__dict__ else candidates(module)
        ways = [(kind, layout) for kind in kinds for layout in kind.layouts(shape, arguments, keywords)]
        seen[module].add([way for way in ways if _fits(way, module, shape, arguments, keywords, result)])

    # The last hook before the forward and the first after it, so that the model's own hooks are outside of it.
    handles = [module.register_forward_pre_hook(before) for module in modules]
    handles += [module.register_forward_hook(after, with_kwargs=True, prepend=True) for module in modules]
    try:
        with torch.no_grad(), reads:
            run(
                input_ids=ids.to(device),
                attention_mask=(torch.arange(tokens) < lengths[:, None]).long().to(device),
                use_cache=False,
            )
    finally:
        for handle in handles:
            handle.remove()
    return seen


def candidates(module: nn.Module) -> list[type[ModuleFisher]]:
    """The kinds to try on a module, the fastest first."""
    own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
    if type(module) in (nn.Linear, Conv1D):  # pruned ones and the like make their weight of other parameters
        return [LinearFisher] if {"weight"} <= own.keys() <= {"weight", "bias"} else []
    if isinstance(module, nn.Embedding):
        plain = own.keys() == {"weight"} and module.max_norm is None and not module.scale_grad_by_freq
        return [EmbeddingFisher] if plain else []
    if any(True for child in module.children() for _ in child.parameters()):
        return []
    vectors = all(parameter.dim() == 1 for parameter in own.values())
    return [ElementwiseFisher, LoopFisher] if vectors else [LoopFisher]


def _fits(
    way: _Way, module: nn.Module, shape: BatchShape, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any
) -> bool:
    """Whether a ``ModuleFisher`` gives the same result as the module."""
    kind, layout = way
    if kind is LinearFisher:  # its arithmetic is known
        return True
    targets = {key: Target.unused() for key, value in module._parameters.items() if value is not None}
    fisher = kind(module, targets, layout)
    fisher.batch = shape
    try:
        with torch.enable_grad():
            again = fisher.forward(*arguments, **keywords)
    except Exception:  # foreign code may fail in any way; then this kind does not fit
        return False
    pairs = zip(*((value if isinstance(value, tuple) else (value,)) for value in (again, result)), strict=False)
    return all(_close(first, second) for first, second in pairs)


def _close(first: Any, second: Any) -> bool:
    """Whether two tensors are equal up to rounding. Two without elements show nothing."""
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)) or first.dtype != second.dtype:
        return False
    # Positions may be given once for all samples; a ModuleFisher looks them up for each.
    if first.shape != second.shape and (first.shape[1:] != second.shape[1:] or len(second) != 1):
        return False
    if not second.numel():
        return False
    if not first.is_floating_point():
        return bool((first == second).all())
    tolerance = 32 * torch.finfo(first.dtype).eps
    return bool(((first - second).abs() <= tolerance * second.abs().max()).all())
