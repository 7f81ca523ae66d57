"""The accumulation against the reference, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perta_fast import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACCUMULATES = (ops.accumulate_, ops.accumulate_square_)


def pair(n: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(n, generator=generator)
    if n > 4:
        gradient[:4] = torch.tensor([float("inf"), float("nan"), 1e-42, -0.0])
    return torch.randn(n, generator=generator), gradient.to(dtype)


@pytest.mark.parametrize("n", [0, 1, 15, 17, 1023, 1025, 300_001])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", ACCUMULATES)
def test_cpp(accumulate, dtype: torch.dtype, n: int) -> None:  # type: ignore[no-untyped-def]
    accumulator, gradient = pair(n, dtype, n)
    expected = accumulate(accumulator.clone(), gradient, backend="reference")
    actual = accumulate(accumulator.clone(), gradient, backend="cpp")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n", [0, 1, 1025])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", ACCUMULATES)
def test_triton(accumulate, dtype: torch.dtype, n: int) -> None:  # type: ignore[no-untyped-def]
    if "triton" not in ops.available_backends():
        pytest.skip("triton is not installed, or TRITON_INTERPRET is not 1")
    accumulator, gradient = pair(n, dtype, n)
    expected = accumulate(accumulator.clone(), gradient, backend="reference")
    actual = accumulate(accumulator.clone(), gradient, backend="triton")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", ACCUMULATES)
def test_cuda(accumulate, dtype: torch.dtype, backend: str) -> None:  # type: ignore[no-untyped-def]
    accumulator, gradient = pair(70_001, dtype, 5)
    expected = accumulate(accumulator.clone(), gradient, backend="reference")
    actual = accumulate(accumulator.cuda(), gradient.cuda(), backend=backend).cpu()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize(
    ("accumulate", "accumulate_many"),
    [(ops.accumulate_, ops.accumulate_many_), (ops.accumulate_square_, ops.accumulate_square_many_)],
)
def test_many_as_one_by_one(accumulate, accumulate_many, backend: str) -> None:  # type: ignore[no-untyped-def]
    if backend not in ops.available_backends():
        pytest.skip(f"{backend} is not available")
    pairs = [pair(7 * n, DTYPES[n % 3], n) for n in range(6)]
    expected = [accumulate(accumulator.clone(), gradient, backend="reference") for accumulator, gradient in pairs]
    accumulators, gradients = zip(*pairs, strict=True)
    assert accumulate_many(accumulators, gradients, backend=backend) is None
    for actual, wanted in zip(accumulators, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
    accumulate_many([], [], backend=backend)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_many_on_cuda() -> None:
    pairs = [pair(3 * n, DTYPES[n % 3], n) for n in range(2000)]
    expected = [ops.accumulate_(accumulator.clone(), gradient) for accumulator, gradient in pairs]
    on_device = [[tensor.cuda() for tensor in tensors] for tensors in zip(*pairs, strict=True)]
    ops.accumulate_many_(*on_device, backend="cuda")
    for actual, wanted in zip(on_device[0], expected, strict=True):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000), st.sampled_from(DTYPES), st.integers(0, 2**31), st.data())
def test_splitting_changes_nothing(n: int, dtype: torch.dtype, seed: int, data: st.DataObject) -> None:
    accumulator, gradient = pair(n, dtype, seed)
    cut = data.draw(st.integers(0, n))
    whole = ops.accumulate_square_(accumulator.clone(), gradient)
    for part in (slice(cut), slice(cut, n)):
        ops.accumulate_square_(accumulator[part], gradient[part])
    torch.testing.assert_close(accumulator, whole, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("accumulate", ACCUMULATES)
def test_bad_arguments_are_named(accumulate) -> None:  # type: ignore[no-untyped-def]
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
            accumulate(good, wrong)
    with pytest.raises(TypeError, match="accumulator"):
        accumulate(torch.zeros(12, dtype=torch.bfloat16), good)
    with pytest.raises(ValueError, match="backend"):
        accumulate(torch.zeros(12), good, backend="fast")


def test_many_name_what_is_wrong() -> None:
    whole, other = torch.zeros(12), torch.zeros(6)
    with pytest.raises(ValueError, match="gradients has 1 tensors, accumulators has 2"):
        ops.accumulate_many_([other, whole], [other.clone()])
    with pytest.raises(ValueError, match=r"gradients\[1\] has shape"):
        ops.accumulate_many_([whole, other], [whole.clone(), whole.clone()])
    with pytest.raises(TypeError, match=r"accumulators\[0\] is torch.float16; it must be float32"):
        ops.accumulate_many_([other.half()], [other])
    with pytest.raises(ValueError, match=r"gradients\[1\] shares memory with accumulators\[0\], which is overw"):
        ops.accumulate_many_([whole[:6], other], [torch.zeros(6), whole[5:11]])


def test_counts_as_an_in_place_change_for_autograd() -> None:
    accumulator = torch.ones(4)
    product = (torch.ones(4, requires_grad=True) * accumulator).sum()
    ops.accumulate_(accumulator, torch.ones(4), backend="cpp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
