"""The reference of the per-sample Fisher against autograd, one sample at a time."""

import pytest
import torch

from perta_fast import ops


def test_equals_squared_weight_gradients() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3, bias=False)
    inputs = torch.randn(4, 7, 5)
    expected = torch.zeros(3, 5)
    deltas = torch.randn(4, 7, 3)
    for a, delta in zip(inputs, deltas, strict=True):
        (gradient,) = torch.autograd.grad(layer(a), layer.weight, delta)
        expected += gradient**2
    fisher = ops.accumulate_squared_gradients_(torch.zeros(3, 5), inputs, deltas)
    torch.testing.assert_close(fisher, expected)


@pytest.mark.parametrize(
    ("fisher", "activations", "deltas", "named"),
    [
        ((3, 5), (4, 7, 6), (4, 7, 3), "activations"),
        ((3, 5), (4, 7, 5), (4, 6, 3), "output_gradients"),
        ((3,), (4, 7, 5), (4, 7, 3), "fisher"),
    ],
)
def test_bad_shapes_are_named(
    fisher: tuple[int, ...], activations: tuple[int, ...], deltas: tuple[int, ...], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        ops.accumulate_squared_gradients_(torch.zeros(fisher), torch.zeros(activations), torch.zeros(deltas))
