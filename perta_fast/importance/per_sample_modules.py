"""How one module gives the parameter gradient of every sample from a batched backward pass.

While a ``ModuleFisher`` is installed, it replaces the module's ``forward`` and computes the same. The squares of linear
maps are accumulated inside the backward pass by the fused operation, which stores no per-sample gradient. All other
parameters are small, so the gradient of each sample may exist for a while. docs/mathematics.md shows why this is exact.

Shapes: N samples, T tokens of the longest of them, R rows of a sample, U rows of a table that has one row for each
different token of each sample, d features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from perta_fast.errors import RunError
from perta_fast.importance.batch_shape import BatchShape, Layout, UnexpectedCall
from perta_fast.ops import accumulate_, accumulate_square_, accumulate_squared_gradients_

_WORTH_GATHERING = 0.8  # share of tokens with a gradient, below which copying them costs less than their zeros


@dataclass
class Target:
    """Where a parameter's gradients go: sums over samples of their squares and, optionally, of the gradients.

    complete: called in the backward pass, if that can be known there, when the batch has added all its gradients.
    """

    fisher: Tensor  # float32, the parameter's shape
    gradient: Tensor | None = None
    complete: Callable[[], object] | None = None

    @classmethod
    def unused(cls) -> "Target":
        """A target for a trial that accumulates nothing."""
        return cls(torch.empty(0))

    def add(self, gradients: Tensor) -> None:
        """Add per-sample gradients, (N, *shape)."""
        gradients = gradients.float()
        self.fisher.add_(gradients.square().sum(0))
        if self.gradient is not None:
            self.gradient.add_(gradients.sum(0))


@dataclass
class ModuleFisher:
    """A module whose forward is replaced while ``installed``; ``targets`` by the name of its own parameters.

    layout: one of ``layouts``, which says how arguments hold the samples. None: as the sizes of each call allow.
    name: of the module, for messages.
    """

    module: nn.Module
    targets: dict[str, Target]
    layout: Any = None
    name: str = ""
    batch: BatchShape = field(init=False)

    def __post_init__(self) -> None:
        self.original: Callable[..., Any] = self.module.forward

    @classmethod
    def layouts(cls, batch: BatchShape, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Sequence[Any]:
        """The layouts in which a call may be meant, the best first; [None] where a kind has only one."""
        return [None]

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Compute what the module computes, in a form that gives per-sample gradients."""
        raise NotImplementedError

    def _checked_forward(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            return self.forward(*arguments, **keywords)
        except UnexpectedCall as error:
            raise RunError(
                f"module {self.name} is called otherwise than it was on trial ({error}); set ‹batch_size› to 1"
            ) from error

    def finish_batch(self) -> None:
        """Accumulate what remains; called after the backward pass of a batch."""

    def values(self, name: str) -> Tensor:
        """A parameter of the module, without gradient."""
        parameter: Tensor = getattr(self.module, name)
        return parameter.detach()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the module's forward, which is its class's: the probe leaves out modules with another."""
        self.module.forward = self._checked_forward
        try:
            yield
        finally:
            del self.module.forward


class _Linear(torch.autograd.Function):
    """y = x W^T + b. Its backward passes x and the output's gradient to ``owner`` and computes no gradient of W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, owner: "LinearFisher", anchor: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.owner = owner
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.owner.accumulate(x, delta)
        return (delta @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


@dataclass
class LinearFisher(ModuleFisher):
    """nn.Linear, and GPT-2's Conv1D, which stores its weight transposed. Its layout is a ``Layout``.

    deferred: the inputs and output gradients of every call, if the weight is used in several: the gradients of all
    calls must be summed before they are squared.
    """

    deferred: list[tuple[Tensor, Tensor]] | None = None
    embedding: "EmbeddingFisher | None" = None  # the input embedding that is tied to this output head
    sparse: bool = False  # the output's gradient may be zero at whole tokens (a head with masked labels)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.transposed = isinstance(self.module, Conv1D)
        self._bias_sums: list[Tensor] = []  # (N, d_out) of each call

    @classmethod
    def layouts(cls, batch: BatchShape, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Sequence[Layout]:
        return batch.layouts(arguments[0]) if len(arguments) == 1 and not keywords else []

    def forward(self, x: Tensor) -> Tensor:
        self._by_sample(x)  # fails here if the backward pass could not accumulate
        weight: Any = self.module.weight
        anchor = torch.zeros((), device=x.device, requires_grad=True)  # so that the output has a backward pass
        matrix = weight.T if self.transposed else weight
        result: Tensor = _Linear.apply(x, matrix, self.module.bias, self, anchor)
        return result

    def accumulate(self, x: Tensor, delta: Tensor) -> None:
        """Add the gradients of one call, from its input and its output's gradient."""
        activations, lengths = self._by_sample(x)  # (N, R, d_in)
        deltas, _ = self._by_sample(delta)  # (N, R, d_out)
        if "bias" in self.targets:
            self._bias_sums.append(deltas.float().sum(1))
        if "weight" not in self.targets:
            return
        if self.deferred is not None:
            self.deferred.append((activations, deltas))
            return
        if self.embedding is not None:
            self.embedding.keep_head_gradient(activations, deltas)
        if self.sparse:
            nonzero = deltas.any(-1)
            if int(nonzero.sum()) < _WORTH_GATHERING * nonzero.numel():
                activations, deltas, lengths = activations[nonzero], deltas[nonzero], nonzero.sum(1)
        self._add(activations, deltas, lengths)
        complete = self.targets["weight"].complete
        if complete is not None and self.embedding is None:
            complete()

    def _by_sample(self, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        layout = self.layout or next(iter(self.batch.layouts(tensor)), Layout.FLAT)
        return self.batch.by_sample(tensor, layout)

    def _add(self, activations: Tensor, deltas: Tensor, lengths: Tensor | None) -> None:
        pair = (deltas, activations) if self.transposed else (activations, deltas)
        inputs = (tensor.contiguous() for tensor in pair)
        target = self.targets["weight"]
        accumulate_squared_gradients_(target.fisher, *inputs, lengths=lengths, gradient=target.gradient)

    def finish_batch(self) -> None:
        if self._bias_sums:
            self.targets["bias"].add(torch.stack(self._bias_sums).sum(0))
            self._bias_sums.clear()
        if self.deferred:
            activations, deltas = (torch.cat(calls, 1) for calls in zip(*self.deferred, strict=True))
            self._add(activations, deltas, None)
            self.deferred.clear()


@contextmanager
def _parameters_replaced(module: nn.Module, replacements: dict[str, Tensor]) -> Iterator[None]:
    before = module._parameters
    module._parameters = {**before, **replacements}  # type: ignore[dict-item]
    try:
        yield
    finally:
        module._parameters = before


@dataclass
class EmbeddingFisher(ModuleFisher):
    """An embedding that looks tokens up in a small table with one row for each different token of each sample.

    Autograd sums the gradients over all uses of a row: the sample's gradient of the token's vector.
    ``head_gradient``, (U, d) float32: the gradient of a tied head at the same rows.
    """

    head_gradient: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._table: Tensor | None = None  # (U, d), a leaf
        self._tokens = torch.empty(0)  # (U,): the token of each row
        self._starts = torch.empty(0)  # (N + 1,): where each sample's rows begin

    def forward(self, ids: Tensor) -> Any:
        module: Any = self.module
        if ids.dim() != 2 or ids.shape[0] not in (1, self.batch.count):
            raise UnexpectedCall(f"token ids of shape {tuple(ids.shape)}")
        ids = ids.expand(self.batch.count, -1)  # (N, T); positions are given once for all samples
        vocabulary = module.weight.shape[0]
        numbers = ids + vocabulary * torch.arange(self.batch.count, device=ids.device)[:, None]
        pairs, rows = numbers.unique(return_inverse=True)  # sorted by sample
        if self._table is None:
            self._tokens = pairs % vocabulary
            samples = torch.arange(self.batch.count + 1, device=ids.device)
            self._starts = torch.searchsorted(pairs, samples * vocabulary)
            self._table = self.values("weight")[self._tokens].requires_grad_()
        padding, module.padding_idx = module.padding_idx, None
        try:
            with _parameters_replaced(module, {"weight": self._table}):
                return self.original(rows)
        finally:
            module.padding_idx = padding

    def keep_head_gradient(self, activations: Tensor, deltas: Tensor) -> None:
        """Keep the tied head's gradient of each sample at the sample's tokens, for the product with the embedding's."""
        tokens = self._tokens.tensor_split(self._starts[1:-1].cpu())
        samples = zip(deltas, activations, tokens, strict=True)
        self.head_gradient = torch.cat([delta[:, rows].float().T @ a.float() for delta, a, rows in samples])

    def finish_batch(self) -> None:
        if self._table is None:
            return
        if self._table.grad is not None:
            target, gradients = self.targets["weight"], self._table.grad.to_dense().float()
            if self.module.padding_idx is not None:  # its vector has no gradient by definition
                gradients[self._tokens == self.module.padding_idx] = 0
            # A tied head adds H_n^2 of (E_n + H_n)^2 = H_n^2 + (E_n^2 + 2 E_n H_n); here is the rest.
            head = 0 if self.head_gradient is None else 2 * self.head_gradient
            target.fisher.index_add_(0, self._tokens, gradients * (gradients + head))
            if target.gradient is not None:
                target.gradient.index_add_(0, self._tokens, gradients)
        self._table = self.head_gradient = None


@dataclass
class ElementwiseFisher(ModuleFisher):
    """Scales and shifts of the last dimension, as in norms: each sample gets a copy of the vector."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._copies: dict[str, Tensor] = {}  # (N, d) by parameter name, leaves

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Any:
        rows = x
        if self.batch.count == 1 and x.shape[0] != 1:  # all rows are the sample's own
            rows = x[None]
        elif x.dim() == 2 and x.shape[0] == self.batch.count * self.batch.tokens:
            rows = x.view(self.batch.count, self.batch.tokens, -1)
        if rows.shape[0] != self.batch.count:
            raise UnexpectedCall(self.batch.unlike(x))
        middle = [1] * (rows.dim() - 2)
        copies = {}
        for name in self.targets:
            if name not in self._copies:
                vector = self.values(name)
                self._copies[name] = vector.expand(self.batch.count, *vector.shape).requires_grad_()
            copies[name] = self._copies[name].view(self.batch.count, *middle, -1)
        result = self._compute(rows, copies, *arguments, **keywords)
        return result if rows is x else result.view(x.shape)

    def _compute(self, x: Tensor, copies: dict[str, Tensor], *arguments: Any, **keywords: Any) -> Any:
        if isinstance(self.module, nn.LayerNorm):  # torch's kernel takes no batched scale
            result = functional.layer_norm(x.float(), self.module.normalized_shape, None, None, self.module.eps)
            scale, shift = (copies.get(name, getattr(self.module, name)) for name in ("weight", "bias"))
            result = result if scale is None else result * scale.float()
            return (result if shift is None else result + shift.float()).to(x.dtype)
        with _parameters_replaced(self.module, copies):
            return self.original(x, *arguments, **keywords)

    def finish_batch(self) -> None:
        for name, copies in self._copies.items():
            if copies.grad is not None:
                self.targets[name].add(copies.grad)
        self._copies.clear()


@dataclass
class LoopFisher(ModuleFisher):
    """Any other module whose submodules have no parameters: it is called once for each sample, the rest is not.

    Its layout is the set of arguments, by number or name, that are tensors without a sample dimension.
    """

    @classmethod
    def layouts(
        cls, batch: BatchShape, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Sequence[frozenset[Any]]:
        tensors = {key: value for key, value in _by_key(arguments, keywords).items() if isinstance(value, Tensor)}
        return [frozenset(key for key, value in tensors.items() if not batch.rows_per_sample(value))]

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        (shared,) = self.layouts(self.batch, arguments, keywords) if self.layout is None else [self.layout]
        parts = {
            key: [value] * self.batch.count if key in shared else self.batch.parts(value)
            for key, value in _by_key(arguments, keywords).items()
        }
        results = []
        for n in range(self.batch.count):
            own_arguments = [parts[number][n] for number in range(len(arguments))]
            own_keywords = {name: parts[name][n] for name in keywords}
            with _parameters_replaced(self.module, {name: self._leaf(name) for name in self.targets}):
                results.append(self.original(*own_arguments, **own_keywords))
        return _joined(results)

    def _leaf(self, name: str) -> Tensor:
        leaf, target = self.values(name).requires_grad_(), self.targets[name]

        def accumulate(complete: Tensor) -> None:
            assert complete.grad is not None
            gradient, complete.grad = complete.grad.contiguous(), None
            accumulate_square_(target.fisher, gradient)  # no temporary tensor: it may be as large as all experts
            if target.gradient is not None:
                accumulate_(target.gradient, gradient)

        leaf.register_post_accumulate_grad_hook(accumulate)
        return leaf


def _by_key(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[Any, Any]:
    return {**dict(enumerate(arguments)), **keywords}


def _joined(results: list[Any]) -> Any:
    first = results[0]
    if isinstance(first, Tensor):
        return torch.cat(results)
    if isinstance(first, tuple) and all(isinstance(value, Tensor) for result in results for value in result):
        return tuple(torch.cat(values) for values in zip(*results, strict=True))
    raise UnexpectedCall(f"a result of type {type(first).__name__}")
