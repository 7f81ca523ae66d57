"""The per-sample Fisher of a linear map: the reference against autograd, backends against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perta_fast import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N, T, d_out, d_in: nothing, one of each, odd, at a tile's edges, more than one block, a sample beyond a batch.
SHAPES = (
    (0, 4, 3, 5),
    (2, 0, 3, 5),
    (2, 3, 0, 5),
    (2, 3, 3, 0),
    (1, 1, 1, 1),
    (3, 7, 5, 9),
    (4, 16, 8, 48),
    (2, 5, 9, 49),
    (3, 2, 200, 800),
    (2, 600, 17, 50),
    (70, 16, 24, 96),
)


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(
    backend: str, activations: Tensor, deltas: Tensor, lengths: Tensor | None = None, start: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Fisher and mean gradient, accumulated onto ``start``."""
    shape = (deltas.shape[-1], activations.shape[-1])
    fisher, gradient = torch.full(shape, start), torch.full(shape, start)
    ops.accumulate_squared_gradients_(fisher, activations, deltas, lengths=lengths, gradient=gradient, backend=backend)
    return fisher, gradient


def assert_agree(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for found, wanted in zip(actual, expected, strict=True):
        assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm())


def test_equals_autograd_one_sample_at_a_time() -> None:
    layer = torch.nn.Linear(5, 3, bias=False)
    inputs, deltas = draw((4, 7, 5)), draw((4, 7, 3), seed=1)
    expected, total = torch.zeros(3, 5), torch.zeros(3, 5)
    for a, delta in zip(inputs, deltas, strict=True):
        (gradient,) = torch.autograd.grad(layer(a), layer.weight, delta)
        expected += gradient**2
        total += gradient
    fisher, gradient = run("reference", inputs, deltas, start=0.0)
    torch.testing.assert_close(fisher, expected)
    torch.testing.assert_close(gradient, total)


@pytest.mark.parametrize("shape", SHAPES)
def test_cpp(instruction_set: str, shape: tuple[int, int, int, int]) -> None:
    count, tokens, d_out, d_in = shape
    inputs = draw((count, tokens, d_in)), draw((count, tokens, d_out), seed=1)
    assert_agree(run("cpp", *inputs), run("reference", *inputs))


@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
def test_cpp_types(instruction_set: str, first: torch.dtype, second: torch.dtype) -> None:
    inputs = draw((5, 9, 70), first), draw((5, 9, 30), second, seed=1)
    assert_agree(run("cpp", *inputs), run("reference", *inputs))


def test_cpp_without_the_mean_gradient_gives_the_same() -> None:
    inputs = draw((5, 9, 70)), draw((5, 9, 30), seed=1)
    fisher = ops.accumulate_squared_gradients_(torch.full((30, 70), 0.5), *inputs, backend="cpp")
    assert torch.equal(fisher, run("cpp", *inputs)[0])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_padding_is_not_read(backend: str) -> None:
    activations, deltas = draw((4, 6, 5)), draw((4, 6, 3), seed=1)
    lengths = torch.tensor([6, 0, 2, 5])
    inside = torch.arange(6) < lengths[:, None]
    expected = run(backend, activations * inside[..., None], deltas * inside[..., None])
    activations[~inside] = float("nan")
    deltas[~inside] = float("inf")
    assert_agree(run(backend, activations, deltas, lengths), expected)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_rows_without_padding(backend: str) -> None:
    activations, deltas = draw((4, 6, 5)), draw((4, 6, 3), seed=1)
    lengths = torch.tensor([6, 0, 2, 5])
    inside = torch.arange(6) < lengths[:, None]
    flat = run(backend, activations[inside], deltas[inside], lengths)
    assert_agree(flat, run(backend, activations, deltas, lengths))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6), st.integers(0, 40), st.integers(1, 40), st.integers(1, 120), st.integers(0, 2**31), st.data())
def test_cpp_on_any_shape(count: int, tokens: int, d_out: int, d_in: int, seed: int, data: st.DataObject) -> None:
    inputs = draw((count, tokens, d_in), seed=seed), draw((count, tokens, d_out), seed=seed + 1)
    lengths = torch.tensor(
        data.draw(st.lists(st.integers(0, tokens), min_size=count, max_size=count)), dtype=torch.int64
    )
    assert_agree(run("cpp", *inputs, lengths), run("reference", *inputs, lengths))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 20), st.integers(0, 2**31))
def test_samples_apart_sum_to_samples_together(count: int, tokens: int, seed: int) -> None:
    activations, deltas = draw((count, tokens, 33), seed=seed), draw((count, tokens, 11), seed=seed + 1)
    together = run("cpp", activations, deltas, start=0.0)
    apart = (torch.zeros(11, 33), torch.zeros(11, 33))
    for n in range(count):
        part = run("cpp", activations[n : n + 1], deltas[n : n + 1], start=0.0)
        for total, more in zip(apart, part, strict=True):
            total.add_(more)
    assert_agree(together, apart)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**31))
def test_one_token_gives_the_outer_product_of_squares(count: int, seed: int) -> None:
    activations, deltas = draw((count, 1, 21), seed=seed), draw((count, 1, 13), seed=seed + 1)
    fisher, _ = run("cpp", activations, deltas, start=0.0)
    expected = deltas[:, 0].square().T @ activations[:, 0].square()
    torch.testing.assert_close(fisher, expected, rtol=1e-4, atol=1e-6)


def test_one_thread_or_more_give_the_same_bits() -> None:
    inputs = draw((6, 20, 900)), draw((6, 20, 500), seed=1)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(run("cpp", *inputs)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


GOOD = {"fisher": torch.zeros(3, 5), "activations": torch.zeros(4, 7, 5), "output_gradients": torch.zeros(4, 7, 3)}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("fisher", [0.0], TypeError),
        ("fisher", torch.zeros(3), ValueError),
        ("fisher", torch.zeros(3, 5, dtype=torch.bfloat16), ValueError),
        ("fisher", torch.zeros(5, 3).T, ValueError),
        ("gradient", torch.zeros(5, 3), ValueError),
        ("gradient", torch.zeros(3, 5, device="meta"), ValueError),
        ("activations", torch.zeros(4, 7, 6), ValueError),
        ("activations", torch.zeros(4, 7, 5, dtype=torch.float64), TypeError),
        ("activations", torch.zeros(4, 7, 10)[..., ::2], ValueError),
        ("activations", torch.zeros(5), ValueError),
        ("output_gradients", torch.zeros(4, 6, 3), ValueError),
        ("output_gradients", torch.zeros(4, 7, 3, device="meta"), ValueError),
        ("lengths", [7, 7, 7, 7], TypeError),
        ("lengths", torch.tensor([7.0] * 4), ValueError),
        ("lengths", torch.tensor([7, 7, 7]), ValueError),
        ("lengths", torch.tensor([7, 7, 7, 8]), ValueError),
        ("lengths", torch.tensor([7, 7, 7, -1]), ValueError),
        ("backend", "fast", ValueError),
        ("backend", "cuda", ValueError),
    ],
)
def test_bad_arguments_are_named(name: str, value: object, error: type[Exception]) -> None:
    arguments: dict[str, object] = GOOD | {name: value}
    with pytest.raises(error, match=name):
        ops.accumulate_squared_gradients_(**arguments)  # type: ignore[arg-type]


def test_flat_rows_need_lengths_that_sum_to_their_number() -> None:
    rows, deltas = torch.zeros(9, 5), torch.zeros(9, 3)
    with pytest.raises(ValueError, match="lengths"):
        ops.accumulate_squared_gradients_(torch.zeros(3, 5), rows, deltas)
    with pytest.raises(ValueError, match="sum to 9"):
        ops.accumulate_squared_gradients_(torch.zeros(3, 5), rows, deltas, lengths=torch.tensor([4, 4]))


def test_shared_memory_is_refused() -> None:
    whole = torch.zeros(40)
    fisher = whole[:15].view(3, 5)
    with pytest.raises(ValueError, match="gradient shares memory with fisher, which is overwritten"):
        ops.accumulate_squared_gradients_(
            fisher, torch.zeros(1, 7, 5), torch.zeros(1, 7, 3), gradient=whole[10:25].view(3, 5)
        )
    with pytest.raises(ValueError, match="activations shares memory with fisher, which is overwritten"):
        ops.accumulate_squared_gradients_(fisher, whole[5:40].view(1, 7, 5), torch.zeros(1, 7, 3))


def test_counts_as_an_in_place_change_for_autograd() -> None:
    fisher = torch.ones(3, 5)
    product = (torch.ones(3, 5, requires_grad=True) * fisher).sum()
    ops.accumulate_squared_gradients_(fisher, torch.ones(4, 7, 5), torch.ones(4, 7, 3), backend="cpp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
