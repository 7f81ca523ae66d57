"""The exact per-sample Fisher of a whole model, from one backward pass a batch.

Every module with parameters is given a rule (``module_rules``) after a look at how it is called. A parameter
that no rule fits is left to batches of one.
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
    ElementwiseRule,
    EmbeddingRule,
    LinearRule,
    ModuleRule,
    SeparateRule,
    Target,
)

# The look takes a batch of these sizes: two unlike primes, so that a shape tells which dimension is which.
LOOK_SAMPLES, LOOK_TOKENS = 5, 7


@contextmanager
def only_asking(module: nn.Module, names: Collection[str]) -> Iterator[None]:
    """No parameter but those named asks autograd for a gradient."""
    silent = [p for name, p in module.named_parameters() if p.requires_grad and name not in names]
    try:
        for parameter in silent:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in silent:
            parameter.requires_grad_(True)


@dataclass
class Plan:
    """Rules to install, and the names of parameters that none fits."""

    rules: list[ModuleRule]
    left: list[str] = field(default_factory=list)

    @contextmanager
    def installed(self, module: nn.Module) -> Iterator[None]:
        """Rules stand in for their modules and no parameter asks autograd for a gradient."""
        with ExitStack() as stack:
            for rule in self.rules:
                stack.enter_context(rule.installed())
            stack.enter_context(only_asking(module, ()))
            yield

    def begin(self, samples: Sequence[Sample]) -> None:
        """Tell the rules what the next forward pass is over."""
        lengths = torch.tensor([len(sample.input_ids) for sample in samples])
        shape = BatchShape(len(samples), int(lengths.max()), lengths)
        for rule in self.rules:
            rule.batch = shape

    def finish(self) -> None:
        """Fold what the backward pass has left."""
        for rule in self.rules:
            rule.finish()


def plan_for(
    module: nn.Module,
    samples: Sequence[Sample],
    targets: Mapping[str, Target],
    run: Callable[..., Any] | None = None,
) -> Plan:
    """Choose a rule for each module with a parameter of ``targets``, from how a few samples run through it.

    run: is called in place of ``module``, and runs the part of it that ``targets`` are of.
    """
    names = {parameter: name for name, parameter in module.named_parameters() if name in targets}
    uses: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in targets}
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter in names:
                uses[names[parameter]].append((part, key))
    device = next(iter(names)).device
    seen = _look(run or module, device, samples, {part for places in uses.values() for part, _ in places})
    rules: dict[nn.Module, ModuleRule] = {}
    plan = Plan([])
    for name, places in uses.items():
        found = [seen[part] for part, _ in places]
        if not _can_be_combined(found):
            plan.left.append(name)
            continue
        chosen = [_rule_for(part, seen[part], rules) for part, _ in places]
        for rule, (_, key) in zip(chosen, places, strict=True):
            rule.targets[key] = targets[name]
        _combine(chosen, sum(each.calls for each in found))
    head = rules.get(_output_head(module))
    if isinstance(head, LinearRule):
        head.sparse = True
    plan.rules = list(rules.values())
    return plan


def _can_be_combined(found: Sequence["_Seen"]) -> bool:
    """Whether a parameter's gradients from these modules can be summed by sample before they are squared."""
    kinds = [each.kind for each in found]
    if not found or None in kinds or any(each.calls == 0 for each in found):
        return False
    calls = sum(each.calls for each in found)
    return calls == 1 or kinds == [ElementwiseRule] or set(kinds) == {LinearRule} or _is_tied(kinds, calls)


def _is_tied(kinds: Sequence[type[ModuleRule] | None], calls: int) -> bool:
    """An input embedding and an output head, each called once."""
    return len(kinds) == calls == 2 and set(kinds) == {EmbeddingRule, LinearRule}


def _combine(rules: Sequence[ModuleRule], calls: int) -> None:
    """Let the rules of one parameter know of each other."""
    linear = [rule for rule in rules if isinstance(rule, LinearRule)]
    if _is_tied([type(rule) for rule in rules], calls):
        (linear[0].embedding,) = (rule for rule in rules if isinstance(rule, EmbeddingRule))
    elif linear and calls > 1:
        waiting: list[tuple[Tensor, Tensor]] = []
        for rule in linear:
            rule.deferred = waiting


def _rule_for(part: nn.Module, seen: "_Seen", rules: dict[nn.Module, ModuleRule]) -> ModuleRule:
    assert seen.kind is not None
    if part not in rules:
        rules[part] = seen.kind(part, {})
    return rules[part]


def _output_head(module: nn.Module) -> Any:
    find = getattr(module, "get_output_embeddings", None)
    return None if find is None else find()


@dataclass
class _Seen:
    """How a module was called: how often, and the rule that gave the same result each time."""

    calls: int = 0
    kind: type[ModuleRule] | None = None


def look_inputs(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """The small batch that the look takes: token ids (N, T), padded on the right, and lengths (N,)."""
    chosen = [samples[k % len(samples)] for k in range(LOOK_SAMPLES)]
    tokens = [sample.input_ids[:LOOK_TOKENS] for sample in chosen]
    padded = [(*ids, *[0] * (LOOK_TOKENS - len(ids))) for ids in tokens]
    return torch.tensor(padded), torch.tensor([len(ids) for ids in tokens])


def _look(
    run: Callable[..., Any], device: torch.device, samples: Sequence[Sample], parts: set[nn.Module]
) -> dict[nn.Module, _Seen]:
    """Run a small batch through the model and try the rules on each module's own inputs."""
    ids, lengths = look_inputs(samples)
    shape = BatchShape(LOOK_SAMPLES, LOOK_TOKENS, lengths)
    seen = {part: _Seen(kind=None if "forward" in part.__dict__ else LinearRule) for part in parts}

    def hook(part: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> None:
        found = seen[part]
        first = found.calls == 0
        found.calls += 1
        if found.kind is None:
            return
        fitting = [kind for kind in candidates(part) if _fits(kind, part, shape, arguments, keywords, result)]
        if first:
            found.kind = fitting[0] if fitting else None
        elif found.kind not in fitting:
            found.kind = None

    handles = [part.register_forward_hook(hook, with_kwargs=True) for part in parts]
    try:
        with torch.no_grad():
            run(
                input_ids=ids.to(device),
                attention_mask=(torch.arange(LOOK_TOKENS) < lengths[:, None]).long().to(device),
                use_cache=False,
            )
    finally:
        for handle in handles:
            handle.remove()
    return seen


def candidates(part: nn.Module) -> list[type[ModuleRule]]:
    """Rules to try, the fastest first."""
    if type(part) in (nn.Linear, Conv1D):
        return [LinearRule]
    if isinstance(part, nn.Embedding):
        return [EmbeddingRule] if part.max_norm is None and not part.scale_grad_by_freq else []
    if any(True for child in part.children() for _ in child.parameters()):
        return []
    vectors = all(parameter.dim() == 1 for parameter in part._parameters.values() if parameter is not None)
    return [ElementwiseRule, SeparateRule] if vectors else [SeparateRule]


def _fits(
    kind: type[ModuleRule],
    part: nn.Module,
    shape: BatchShape,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    result: Any,
) -> bool:
    """Whether the rule computes what the module did."""
    unused = Target(torch.empty(0), None)
    rule = kind(part, {key: unused for key, value in part._parameters.items() if value is not None})
    rule.batch = shape
    try:
        if kind is LinearRule:  # its arithmetic is known
            shape.by_sample(arguments[0])
            return len(arguments) == 1 and not keywords
        with torch.enable_grad():
            again = rule.forward(*arguments, **keywords)
    except Exception:  # whatever a stranger's module makes of it, the rule is not for this module
        return False
    pairs = zip(*((value if isinstance(value, tuple) else (value,)) for value in (again, result)), strict=False)
    return all(_same(first, second) for first, second in pairs)


def _same(first: Any, second: Any) -> bool:
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)) or first.dtype != second.dtype:
        return False
    # Positions may be given once for all samples, and are then looked up for each.
    if first.shape != second.shape and (first.shape[1:] != second.shape[1:] or len(second) != 1):
        return False
    if not first.is_floating_point():
        return bool((first == second).all())
    tolerance = 32 * torch.finfo(first.dtype).eps
    return bool(((first - second).abs() <= tolerance * second.abs().max()).all())
