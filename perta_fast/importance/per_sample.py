"""The exact per-sample Fisher of a whole model, from one batched backward pass a batch.

Every module with parameters is given a rule (``module_rules``) after a look at how it is called. A parameter that no
rule fits is left to batches of one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from perta_fast.data import Sample
from perta_fast.importance.module_rules import (
    BatchShape,
    ElementwiseRule,
    EmbeddingRule,
    LinearRule,
    ModuleRule,
    SeparateRule,
    Target,
)
from perta_fast.losses import Batch, per_sample_losses

# The look at the model is a batch of these sizes: two unlike primes, so that a shape tells which dimension is which.
_LOOK_SAMPLES, _LOOK_TOKENS = 5, 7


@dataclass
class Plan:
    """Rules to install, and the names of parameters that none fits."""

    rules: list[ModuleRule]
    left: list[str] = field(default_factory=list)

    @contextmanager
    def installed(self, module: nn.Module) -> Iterator[None]:
        """Rules stand in for their modules and no parameter asks autograd for a gradient."""
        asking = [parameter for parameter in module.parameters() if parameter.requires_grad]
        with ExitStack() as stack:
            for rule in self.rules:
                stack.enter_context(rule.installed())
            try:
                for parameter in asking:
                    parameter.requires_grad_(False)
                yield
            finally:
                for parameter in asking:
                    parameter.requires_grad_(True)

    def backward(self, module: nn.Module, samples: Sequence[Sample], device: torch.device) -> Tensor:
        """One batch forward, backward and folded, with the plan installed; return each sample's loss."""
        batch = Batch.of(samples, device)
        shape = BatchShape(*batch.input_ids.shape, torch.tensor([len(sample.input_ids) for sample in samples]))
        for rule in self.rules:
            rule.batch = shape
        losses = per_sample_losses(module, batch)
        if bool(torch.isfinite(losses).all()):
            losses.sum().backward()
            for rule in self.rules:
                rule.finish()
        return losses.detach()


def plan_for(module: nn.Module, samples: Sequence[Sample], targets: Mapping[str, Target]) -> Plan:
    """Choose a rule for each module that holds a parameter of ``targets``, from how a small batch runs through it."""
    names = {parameter: name for name, parameter in module.named_parameters() if name in targets}
    owners: dict[str, list[nn.Module]] = {name: [] for name in targets}
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter in names:
                owners[names[parameter]].append(part)
    seen = _look(module, samples, {part for parts in owners.values() for part in parts})
    rules: dict[nn.Module, ModuleRule] = {}
    plan = Plan([])

    def rule_of(part: nn.Module, name: str) -> ModuleRule:
        kind = seen[part].kind
        assert kind is not None
        own = next(key for key, parameter in part._parameters.items() if parameter is not None and names.get(parameter) == name)
        rule = rules.setdefault(part, kind(part, {}))
        rule.targets[own] = targets[name]
        return rule

    for name, parts in owners.items():
        kinds = [seen[part].kind for part in parts]
        calls = [seen[part].calls for part in parts]
        if not parts or None in kinds or 0 in calls:
            plan.left.append(name)
        elif sum(calls) == 1 or kinds == [ElementwiseRule]:
            rule_of(parts[0], name)
        elif all(kind is LinearRule for kind in kinds):
            waiting: list[tuple[Tensor, Tensor]] = []
            for part in parts:
                rule = rule_of(part, name)
                assert isinstance(rule, LinearRule)
                rule.deferred = waiting
        elif sorted(kind.__name__ for kind in kinds if kind) == ["EmbeddingRule", "LinearRule"] and sum(calls) == 2:
            embedding, head = sorted((rule_of(part, name) for part in parts), key=lambda rule: type(rule).__name__)
            assert isinstance(head, LinearRule) and isinstance(embedding, EmbeddingRule)
            head.embedding = embedding
        else:
            plan.left.append(name)
    head_module = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    for part, rule in rules.items():
        if isinstance(rule, LinearRule):
            rule.sparse = part is head_module
    plan.rules = list(rules.values())
    return plan


@dataclass
class _Seen:
    """How a module was called: how often, and the rule that gave the same result each time."""

    calls: int = 0
    kind: type[ModuleRule] | None = None


def _look(module: nn.Module, samples: Sequence[Sample], parts: set[nn.Module]) -> dict[nn.Module, _Seen]:
    """Run a small batch through the model and try the rules on each module's own inputs."""
    chosen = [samples[k % len(samples)] for k in range(_LOOK_SAMPLES)]
    tokens = [sample.input_ids[:_LOOK_TOKENS] for sample in chosen]
    padded = [(*ids, *[0] * (_LOOK_TOKENS - len(ids))) for ids in tokens]
    device = next(module.parameters()).device
    lengths = torch.tensor([len(ids) for ids in tokens])
    shape = BatchShape(_LOOK_SAMPLES, _LOOK_TOKENS, lengths)
    seen = {part: _Seen(kind=None if "forward" in part.__dict__ else LinearRule) for part in parts}

    def hook(part: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> None:
        found = seen[part]
        first = found.calls == 0
        found.calls += 1
        if found.kind is None:
            return
        fitting = [kind for kind in _candidates(part) if _fits(kind, part, shape, arguments, keywords, result)]
        if first:
            found.kind = fitting[0] if fitting else None
        elif found.kind not in fitting:
            found.kind = None

    handles = [part.register_forward_hook(hook, with_kwargs=True) for part in parts]
    try:
        with torch.no_grad():
            module(
                input_ids=torch.tensor(padded, device=device),
                attention_mask=(torch.arange(_LOOK_TOKENS) < lengths[:, None]).long().to(device),
                use_cache=False,
            )
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _candidates(part: nn.Module) -> list[type[ModuleRule]]:
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
    unused = torch.empty(0)
    rule = kind(part, {key: Target(unused, None) for key, value in part._parameters.items() if value is not None})
    rule.batch = shape
    try:
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
    if first.shape != second.shape and first.shape[1:] != second.shape[1:]:
        return False
    if not first.is_floating_point():
        return bool((first == second).all())
    tolerance = 32 * torch.finfo(first.dtype).eps
    return bool(((first - second).abs() <= tolerance * second.abs().max()).all())
