"""The folds against the reference, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perta_fast import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FOLDS = (ops.accumulate_, ops.accumulate_square_)


def pair(n: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(n, generator=generator)
    if n > 4:
        gradient[:4] = torch.tensor([float("inf"), float("nan"), 1e-42, -0.0])
    return torch.randn(n, generator=generator), gradient.to(dtype)


@pytest.mark.parametrize("n", [0, 1, 15, 17, 1023, 1025, 300_001])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fold", FOLDS)
def test_cpp(fold, dtype: torch.dtype, n: int) -> None:  # type: ignore[no-untyped-def]
    accumulator, gradient = pair(n, dtype, n)
    expected = fold(accumulator.clone(), gradient, backend="reference")
    actual = fold(accumulator.clone(), gradient, backend="cpp")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n", [0, 1, 1025])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fold", FOLDS)
def test_triton(fold, dtype: torch.dtype, n: int) -> None:  # type: ignore[no-untyped-def]
    if "triton" not in ops.available_backends():
        pytest.skip("triton is not installed, or TRITON_INTERPRET is not 1")
    accumulator, gradient = pair(n, dtype, n)
    expected = fold(accumulator.clone(), gradient, backend="reference")
    actual = fold(accumulator.clone(), gradient, backend="triton")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fold", FOLDS)
def test_cuda(fold, dtype: torch.dtype, backend: str) -> None:  # type: ignore[no-untyped-def]
    accumulator, gradient = pair(70_001, dtype, 5)
    expected = fold(accumulator.clone(), gradient, backend="reference")
    actual = fold(accumulator.cuda(), gradient.cuda(), backend=backend).cpu()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000), st.sampled_from(DTYPES), st.integers(0, 2**31), st.data())
def test_splitting_changes_nothing(n: int, dtype: torch.dtype, seed: int, data: st.DataObject) -> None:
    accumulator, gradient = pair(n, dtype, seed)
    cut = data.draw(st.integers(0, n))
    whole = ops.accumulate_square_(accumulator.clone(), gradient)
    for part in (slice(cut), slice(cut, n)):
        ops.accumulate_square_(accumulator[part], gradient[part])
    torch.testing.assert_close(accumulator, whole, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fold", FOLDS)
def test_bad_arguments_are_named(fold) -> None:  # type: ignore[no-untyped-def]
    good = torch.zeros(12)
    for wrong, error in (
        (torch.zeros(11), ValueError),
        (torch.zeros(12, dtype=torch.float64), TypeError),
        (torch.zeros(24)[::2], ValueError),
        (torch.zeros(12, device="meta"), ValueError),
        ([0.0], TypeError),
        (good, ValueError),
    ):
        with pytest.raises(error, match="gradient"):
            fold(good, wrong)
    with pytest.raises(TypeError, match="accumulator"):
        fold(torch.zeros(12, dtype=torch.bfloat16), good)
    with pytest.raises(ValueError, match="backend"):
        fold(torch.zeros(12), good, backend="fast")


def test_counts_as_an_in_place_change_for_autograd() -> None:
    accumulator = torch.ones(4)
    product = (torch.ones(4, requires_grad=True) * accumulator).sum()
    ops.accumulate_(accumulator, torch.ones(4), backend="cpp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
