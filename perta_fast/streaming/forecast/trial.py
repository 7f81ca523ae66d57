"""Memory and arithmetic of a part of a model, found by running its own code on tensors without values.

Torch's fake tensors have shapes, types and lifetimes, and choose the same kernels as real tensors. So this works for
any architecture, needs no weights, and takes milliseconds for a layer of any size.
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from perta_fast.importance.gradients import gradients_accumulated_into
from perta_fast.importance.per_sample import Plan, candidates
from perta_fast.importance.per_sample_modules import Target
from perta_fast.preconditioning.input_moments import Moments, in_size
from perta_fast.streaming.linear_inputs import layer_of_maps
from perta_fast.streaming.model.partial_forward import PartialForward
from perta_fast.streaming.model.structure import Structure
from perta_fast.tuning.adapter import linear_maps

_Run = Callable[[Tensor | None, dict[str, Tensor]], None]  # takes a mask and the sums to accumulate into

_BOUND = 8  # times the inputs and outputs of each matrix: memory of a part that cannot be tried


@dataclass(frozen=True)
class Cost:
    """The cost of one batch in one part.

    bytes: peak memory beside weights and sums. bound: these are upper bounds from the shapes of its matrices, since its
    code does not run without values.
    """

    bytes: int
    flops: int
    bound: bool = False


class LiveBytes(TorchDispatchMode):
    """Counts the memory that operations allocate inside the context; that of ``known`` does not count.

    ``peak``: the largest number of bytes at one time.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}
        self._now = self.peak = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone() -> None:
            self._alive.discard(key)
            self._now -= size

        self._alive.add(key)
        weakref.finalize(storage, gone)
        self._now += size
        self.peak = max(self.peak, self._now)


class Trial:
    """Runs the parts of ``structure`` as a walk does. squares: for the estimator empirical-fisher.

    device: whose kernels are used; one that torch finds here, or the CPU.
    """

    def __init__(self, structure: Structure, device: torch.device, squares: bool) -> None:
        self._structure, self._device, self._squares = structure, device, squares
        model: Any = structure.model
        self._dtype: torch.dtype = model.dtype
        self._config: Any = model.config.get_text_config()
        self._partial_forward = PartialForward(structure.model, structure.layers, "")
        self._first: dict[str, int] = {}  # layer of each description
        self._like = [self._first_like(number) for number in range(len(structure.layers))]
        self._known: dict[tuple[str, int, int, int], Cost] = {}

    def forward(self, layer: int, count: int, tokens: int) -> Cost:
        """A layer forward, on ``count`` samples of ``tokens`` tokens."""
        return self._layer("forward", layer, count, tokens)

    def backward(self, layer: int, count: int, tokens: int) -> Cost:
        """A layer forward and back."""
        return self._layer("backward", layer, count, tokens)

    def _layer(self, direction: str, layer: int, count: int, tokens: int) -> Cost:
        layer = self._like[layer]
        back = direction == "backward"

        def run(mask: Tensor | None, sums: dict[str, Tensor]) -> None:
            with torch.set_grad_enabled(back), self._accumulating(sums, count, tokens):
                hidden = self._hidden(count, tokens).requires_grad_(back)
                result = self._partial_forward.layer(layer, hidden, mask)
                if back:
                    result.backward(self._hidden(count, tokens))
                _rows(hidden.grad if back else result)

        return self._cost(direction, layer, count, tokens, self._structure.by_layer[layer], run)

    def inputs(self, layer: int, count: int, tokens: int) -> Cost:
        """A layer forward, with the sums of x xᵀ over the inputs x of its linear maps; their memory counts."""
        layer = self._like[layer]
        maps = self.maps[layer]

        def run(mask: Tensor | None, _sums: dict[str, Tensor]) -> None:
            with torch.no_grad(), Moments(within_memory=False).of(maps):
                _rows(self._partial_forward.layer(layer, self._hidden(count, tokens), mask))

        cost = self._cost("inputs", layer, count, tokens, self._structure.by_layer[layer], run)
        if not cost.bound:
            return cost
        elements = sum(in_size(of) ** 2 for of in maps.values())  # as if no two took the same input
        return Cost(cost.bytes + 4 * elements, cost.flops + 2 * count * tokens * elements, bound=True)

    @cached_property
    def maps(self) -> list[dict[str, nn.Module]]:
        """The linear maps of each layer, by name."""
        return layer_of_maps(self._structure, linear_maps(self._structure.model, adapted=False))

    def head(self, count: int, tokens: int) -> Cost:
        """Everything after the layers, and the loss, forward and back; every token has a label."""
        structure = self._structure
        names = [*structure.resident, *([] if structure.head is None else [structure.head])]

        def run(mask: Tensor | None, sums: dict[str, Tensor]) -> None:
            with self._accumulating(sums, count, tokens):
                hidden = self._hidden(count, tokens).requires_grad_()
                ids = torch.zeros(count, tokens, dtype=torch.int64, device=self._device)
                embedded = ids if structure.tied and not self._squares else None
                logits = self._partial_forward.after_layers(hidden, mask, embedded).logits
                # Like ``token_logits``, which selects the labelled tokens.
                labelled = torch.ones(tokens - 1, dtype=torch.int64, device=self._device).repeat(count)
                selected = logits[:, :-1][labelled, labelled].float()
                functional.cross_entropy(selected, labelled, reduction="none").sum().backward()
                _rows(hidden.grad)

        cost = self._cost("head", 0, count, tokens, names, run)
        return self._with_rows(cost, count, tokens, 2) if structure.tied else cost

    def embed_backward(self, count: int, tokens: int) -> Cost:
        """Everything before the layers, forward and back."""
        structure = self._structure

        def run(mask: Tensor | None, sums: dict[str, Tensor]) -> None:
            ids = torch.zeros(count, tokens, dtype=torch.int64, device=self._device)
            with gradients_accumulated_into(structure.model, sums, squared=False):
                hidden = self._partial_forward.before_layers(ids, mask)
                hidden.backward(self._hidden(count, tokens))

        if self._squares:  # the embedding has gradients for the used rows only
            return self._with_rows(Cost(0, 0), count, tokens, 5)
        return self._cost("embed_backward", 0, count, tokens, [structure.embedding], run)

    def _with_rows(self, cost: Cost, count: int, tokens: int, copies: int) -> Cost:
        """``cost``, and the memory of ``EmbeddingFisher`` for each token, in the model's type and in float32."""
        if not self._squares:
            return cost
        width = self._structure.model.get_parameter(self._structure.embedding).shape[1]
        rows = count * tokens * width * copies * (self._dtype.itemsize + 4)
        return Cost(cost.bytes + rows, cost.flops, cost.bound)

    def _first_like(self, layer: int) -> int:
        """The first layer of the same kind and shapes."""
        kinds = getattr(self._config, "layer_types", None)
        shapes = [tuple(parameter.shape) for parameter in self._structure.layers[layer].parameters()]
        description = f"{self._structure.layers[layer]} {shapes} {kinds[layer] if kinds else ''}"
        return self._first.setdefault(description, layer)

    def _hidden(self, count: int, tokens: int) -> Tensor:
        """Hidden states as they come from a scratch file: rows, copied into zeros."""
        shape = count, tokens, self._config.hidden_size
        result = torch.zeros(shape, dtype=self._dtype, device=self._device)
        rows = torch.empty(shape, dtype=self._dtype, device=self._device)
        return result.copy_(rows)

    def _sums(self, names: list[str]) -> dict[str, Tensor]:
        parameters = dict(self._structure.model.named_parameters())
        return {name: torch.empty(parameters[name].shape, device=self._device) for name in names}

    @contextmanager
    def _accumulating(self, sums: dict[str, Tensor], count: int, tokens: int) -> Iterator[None]:
        """Accumulate the gradients of these parameters as a walk does."""
        model = self._structure.model
        if not self._squares:
            with gradients_accumulated_into(model, sums, squared=False):
                yield
            return
        parameters = {p: name for name, p in model.named_parameters()}
        plan = Plan()
        for module in model.modules():
            named = {key: parameters[p] for key, p in module._parameters.items() if p is not None}
            targets = {key: Target(sums[name]) for key, name in named.items() if name in sums}
            kinds = candidates(module)
            if targets and kinds and not isinstance(module, nn.Embedding):
                plan.modules.append(kinds[0](module, targets))
        with plan.installed(model), plan.batch([tokens] * count):
            yield

    def _cost(self, kind: str, layer: int, count: int, tokens: int, names: list[str], run: _Run) -> Cost:
        key = kind, layer, count, tokens
        if key not in self._known:
            self._known[key] = self._try(names, count, tokens, run) or self._bound(kind, names, count, tokens)
        return self._known[key]

    def _try(self, names: list[str], count: int, tokens: int, run: _Run) -> Cost | None:
        config: Any = self._structure.model.config
        eager = config._attn_implementation == "eager"
        with _quiet(), FakeTensorMode(), self._valueless() as known, self._partial_forward.installed():
            square = torch.empty(
                (count, 1, tokens, tokens), dtype=self._dtype if eager else torch.bool, device=self._device
            )
            sums = self._sums(names)
            for mask in (square, None):  # a complete mask is not read
                try:
                    counter = FlopCounterMode(display=False, custom_mapping=_FLOPS)
                    with counter as flops, LiveBytes([*known, *sums.values()]) as live:
                        run(mask, sums)
                except Exception:  # foreign code may fail in any way on tensors without values
                    continue
                # The mask exists in three types while it is made and converted for attention.
                return Cost(live.peak + square.numel() * (2 + 4), flops.get_total_flops())
        return None

    @contextmanager
    def _valueless(self) -> Iterator[list[Tensor]]:
        """Inside the context, all tensors of the tried parts are fake ones on the device."""
        untried = {
            part
            for number, layer in enumerate(self._structure.layers)
            if number != self._like[number]
            for part in layer.modules()
        }
        before: list[tuple[Any, dict[str, Any]]] = []
        made: dict[Tensor, Tensor] = {}
        try:
            for part in set(self._structure.model.modules()) - untried:
                tables: list[dict[str, Any]] = [part._parameters, part._buffers]
                for table in tables:
                    before.append((table, dict(table)))
                    for key, tensor in table.items():
                        if tensor is None:
                            continue
                        if tensor not in made:
                            made[tensor] = self._fake(tensor)
                        table[key] = made[tensor]
            yield list(made.values())
        finally:
            for table, tensors in before:
                table.update(tensors)

    def _fake(self, tensor: Tensor) -> Tensor:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        return nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake

    def _bound(self, kind: str, names: list[str], count: int, tokens: int) -> Cost:
        """For code that needs values (a router's choice of experts): every token goes through every matrix.

        On the way back each matrix has its gradient, and while that of one expert is added to all experts', twice more.
        """
        parameters = dict(self._structure.model.named_parameters())
        shapes = [parameters[name].shape for name in names if parameters[name].dim() > 1]
        scores = 4 * 4 * count * tokens * tokens * self._config.num_attention_heads
        widths = sum(sum(shape[-2:]) * shape[:-2].numel() for shape in shapes)
        elements = [shape.numel() for shape in shapes]
        forward = kind in ("forward", "inputs")
        gradients = 0 if forward else sum(elements) + 2 * max(elements, default=0)
        return Cost(
            (_BOUND * count * tokens * widths + gradients) * self._dtype.itemsize + scores,
            2 * (1 if forward else 3) * count * tokens * sum(elements),
            bound=True,
        )


def _rows(values: Tensor | None) -> None:
    """Make the rows of ``values`` that go to a scratch file."""
    assert values is not None
    values.flatten(0, 1).clone()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's log about operations that need values."""
    log = logging.getLogger(fake_tensor.__name__)
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(before)


def _fused_fisher_flops(fisher: Any, activations: Any, output_gradients: Any, *_: Any, **__: Any) -> int:
    rows: int = torch.Size(activations[:-1]).numel()
    return 2 * rows * int(activations[-1]) * int(output_gradients[-1])


_aten = torch.ops.aten
_FLOPS = {  # operations that torch's counter does not know
    _aten.addmm_: lambda _sum, left, right, **_: 2 * left[0] * left[1] * right[1],
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    ),
    torch.ops.perta_fast.accumulate_squared_gradients_: _fused_fisher_flops,
}
