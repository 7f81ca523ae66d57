"""Models that are no plain chain of layers are refused, each with its reason."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perta_fast.errors import InputError
from perta_fast.streaming.model.partial_forward import PartialForward

IDS, MASK = torch.tensor([[3, 1, 2]]), torch.ones((1, 3), dtype=torch.int64)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, mask: Any = None, extra: Any = None) -> Tensor:
        return hidden_states + self.linear(hidden_states)


class TupleLayer(Layer):
    def forward(self, hidden_states: Tensor, mask: Any = None, extra: Any = None) -> Any:
        return super().forward(hidden_states), None


class Chain(nn.Module):
    """Embedding, three layers and a head; subclasses do one thing differently."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(4, 5)

    def forward(
        self, input_ids: Any = None, inputs_embeds: Any = None, attention_mask: Any = None, use_cache: bool = False
    ) -> Any:
        start = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        return SimpleNamespace(logits=self.head(self.through(start, attention_mask)))

    def through(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden


class FirstOfTuples(Chain):
    """As BLOOM, Falcon and MPT do it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TupleLayer() for _ in range(3))

    def through(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            outputs = layer(hidden, mask)
            hidden = outputs[0]
        return hidden


class ScaledInPlace(Chain):
    """As CTRL does it."""

    def through(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden *= 3
        return super().through(hidden, mask)


class LayerLeftOut(Chain):
    def through(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](hidden, mask), mask)


class Between(Chain):
    def through(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(2 * hidden, mask)
        return hidden


class OtherOrder(Chain):
    def through(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            hidden = layer(hidden, mask)
        return hidden


class FirstHiddenAtTheSide(Chain):
    def through(self, hidden: Tensor, mask: Tensor) -> Tensor:
        start = hidden
        for layer in self.layers:
            hidden = layer(hidden, mask, extra=start)
        return hidden


class SharedTable(Chain):
    def through(self, hidden: Tensor, mask: Tensor) -> Tensor:
        shared: dict[str, Tensor] = {}
        for layer in self.layers:
            hidden = layer(hidden, mask, extra=shared)
        return hidden


class Uncalled(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Bilinear(2, 2, 2)


class NoHiddenStates(Chain):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, use_cache: bool = False) -> Any:
        return super().forward(input_ids, None, attention_mask)


def check(model: Any) -> None:
    partial_forward = PartialForward(model, model.layers, "model")
    inside = {part for layer in model.layers for part in layer.modules()}
    outside = [p for p in model.modules() if p not in inside and list(p.parameters(recurse=False))]
    with partial_forward.installed():
        partial_forward.check(IDS, MASK, outside)
    assert all("forward" not in layer.__dict__ for layer in model.layers)


@pytest.mark.parametrize("kind", [Chain, FirstOfTuples])
def test_a_chain_is_accepted(kind: type[Chain]) -> None:
    check(kind())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (LayerLeftOut, "calls 2 of 3 layers"),
        (Between, "a layer does not take what the one before it gives"),
        (OtherOrder, "a layer does not take what the one before it gives"),
        (FirstHiddenAtTheSide, "layer 0 is given more than hidden states, masks and positions"),
        (SharedTable, "layer 0 is given more than hidden states, masks and positions"),
        (Uncalled, "Bilinear has parameters, and is neither before nor after the layers"),
        (NoHiddenStates, "unexpected keyword argument 'inputs_embeds'"),
    ],
)
def test_others_are_refused(kind: type[Chain], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        check(kind())
    assert str(caught.value).startswith("model: ")


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", [Chain, FirstOfTuples, ScaledInPlace])
def test_parts_make_the_whole(kind: type[Chain], count: int) -> None:
    """The logits, and the gradient with respect to what the last layer gives."""
    model = kind()
    model.layers = model.layers[:count]
    partial_forward = PartialForward(model, model.layers, "model")
    expected = model(input_ids=IDS, attention_mask=MASK).logits
    with partial_forward.installed():
        hidden = partial_forward.before_layers(IDS, MASK)
        assert torch.equal(hidden, (3 if kind is ScaledInPlace else 1) * model.embedding(IDS))
        for number in range(count):
            hidden = partial_forward.layer(number, hidden, MASK)
        hidden = hidden.detach().requires_grad_()
        assert torch.equal(partial_forward.after_layers(hidden, MASK).logits, expected)
        found = partial_forward.after_layers(hidden, MASK, IDS).logits
        assert torch.equal(found, expected)
        found.sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, model.head.weight.sum(0).expand(1, 3, 4))
