"""Weights from the ratio of both importances: every backend against the reference, and the reference itself."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perta_fast import compiled, ops
from perta_fast.ops import reference
from perta_fast.ops.backends import DTYPE_CODES
from perta_fast.rules import Rescaling
from tests.ops.test_low_rank_subtract import SHAPES, arrays_of
from tests.ops.test_rescaled_subtract import DTYPES, SIZES, assert_same_bits, cuda, draw

# The interpreter of Triton computes with numpy, which warns of the special values.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

INFINITY = float("inf")
EDGES = (0.0, -0.0, INFINITY, 1e-45, 1e-40, 1.1754944e-38, 6e-8, 1.0, 1.0 + 2**-8, 65504.0, 1e30, 3.3e38, 3.4028235e38)
ALPHAS = (0.0, 1.0, 16.0)
POWERS = (1.0, 2.0, 0.5)
THRESHOLDS = (None, 0.25)


def ratios(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Valid ratios, half of them on an edge."""
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** torch.empty(n).uniform_(-8, 8, generator=generator)
    edges = torch.tensor(EDGES)[torch.randint(len(EDGES), (n,), generator=generator)]
    return torch.where(torch.rand(n, generator=generator) < 0.5, edges, values).to(dtype)


def four(n: int, dtype: torch.dtype, ratio: torch.dtype, special: bool = True) -> list[Tensor]:
    """Theta, tuned, base and ratio."""
    return [draw(n, dtype, seed, special) for seed in range(3)] + [ratios(n, ratio, 3)]


def run(backend: str, arrays: list[Tensor], **how: float | None) -> Tensor:
    theta, tuned, base, ratio = arrays
    return ops.rescaled_subtract(theta, tuned, base, ratio=ratio, backend=backend, **how)  # type: ignore[arg-type]


def needs(backend: str) -> None:
    if backend not in ops.available_backends():
        pytest.skip(f"{backend} is not available")


@pytest.mark.parametrize(
    ("ratio", "p", "alpha", "w"),
    [
        (0.0, 1.0, 1.0, 1.0),
        (1.0, 1.0, 1.0, 0.5),
        (3.0, 1.0, 1.0, 0.25),
        (3.0, 2.0, 1.0, 0.1),
        (9.0, 0.5, 1.0, 0.25),
        (2.0, 3.0, 2.0, 1 / 17),
        (1.0, 1.0, 16.0, 1 / 17),
        (INFINITY, 1.0, 1.0, 0.0),
        (INFINITY, 2.0, 0.0, 0.0),  # no forget importance: no weight, whatever alpha
        (3.4e38, 1.0, 0.0, 1.0),
        (3.4e38, 2.0, 0.0, 1.0),  # its square is infinite
        (1e30, 2.0, 16.0, 0.0),
        (1e-45, 0.5, 0.0, 1.0),
    ],
)
def test_the_formula(ratio: float, p: float, alpha: float, w: float) -> None:
    for dtype in (torch.float32, torch.float64):
        found = reference.weights_of_ratio(torch.tensor([ratio], dtype=dtype), Rescaling(1.0, p, alpha))
        assert found.item() == pytest.approx(w, rel=1e-6, abs=1e-30)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([*POWERS, 1.7]), st.sampled_from([*ALPHAS, 3e38]))
def test_weights_are_in_zero_and_one(seed: int, p: float, alpha: float) -> None:
    ratio = ratios(500, torch.float32, seed)
    w = reference.weights_of_ratio(ratio, Rescaling(1.0, p, alpha))
    assert bool(((w >= 0) & (w <= 1)).all())
    assert bool((w[ratio.isinf()] == 0).all())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([*POWERS, 1.7]), st.sampled_from([0.25, 1.0, 16.0]))
def test_as_the_pair_gives(seed: int, p: float, alpha: float) -> None:
    """The ratio in float32 gives the pair's weights up to its own rounding; no evidence and no forgetting are exact."""
    generator = torch.Generator().manual_seed(seed)
    forget, retain = (10 ** torch.empty(500).uniform_(-6, 2, generator=generator) for _ in range(2))
    forget[::5] = retain[::7] = 0
    ratio = torch.where(forget == 0, INFINITY, retain / forget)
    how = Rescaling(1.0, p, alpha)
    expected, found = reference.weights(forget, retain, how), reference.weights_of_ratio(ratio, how)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-12)
    assert bool((found[::5] == 0).all())
    assert bool((found[::7] == expected[::7]).all())


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=4)))
def test_every_mix_of_types(dtypes: tuple[torch.dtype, ...]) -> None:
    arrays = [draw(1337, dtype, seed, special=True) for seed, dtype in enumerate(dtypes[:3])]
    arrays.append(ratios(1337, dtypes[3], 3))
    assert_same_bits(run("cpp", arrays, lam=0.7), run("reference", arrays, lam=0.7))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [torch.bfloat16, torch.float32])
def test_cpp(instruction_set: str, n: int, dtype: torch.dtype, ratio: torch.dtype) -> None:
    arrays = four(n, dtype, ratio)
    for p, alpha, threshold in itertools.product(POWERS, ALPHAS, THRESHOLDS):
        how = {"lam": 1.3, "p": p, "alpha": alpha, "threshold": threshold}
        assert_same_bits(run("cpp", arrays, **how), run("reference", arrays, **how))


def test_another_power_within_rounding() -> None:
    arrays = four(4000, torch.float32, torch.bfloat16, special=False)
    for alpha in ALPHAS:
        found, expected = (run(backend, arrays, lam=1.0, p=1.7, alpha=alpha) for backend in ("cpp", "reference"))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", DTYPES)
@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_views(dtype: torch.dtype, ratio: torch.dtype, offset: int) -> None:
    arrays = four(3000 + offset, dtype, ratio)
    expected = run("reference", [array[offset:] for array in arrays], lam=1.0)
    theta, tuned, base, rho = (array[offset:] for array in arrays)
    ops.rescaled_subtract_(theta, tuned, base, ratio=rho, lam=1.0, backend="cpp")
    assert_same_bits(theta, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_triton(dtype: torch.dtype, ratio: torch.dtype, p: float, alpha: float, threshold: float | None) -> None:
    needs("triton")
    arrays = four(1025, dtype, ratio)
    how = {"lam": 1.3, "p": p, "alpha": alpha, "threshold": threshold}
    assert_same_bits(run("triton", arrays, **how), run("reference", arrays, **how))


def low_rank(backend: str, arrays: list[Tensor], ratio: Tensor, **how: float | None) -> Tensor:
    theta, left, right = arrays[:3]
    return ops.low_rank_subtract_(theta.clone(), left, right, ratio=ratio, backend=backend, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", DTYPES)
def test_low_rank(backend: str, shape: tuple[int, int, int], ratio: torch.dtype) -> None:
    needs(backend)
    rows, rank, columns = shape
    if backend == "triton" and not torch.cuda.is_available():
        rows = min(rows, 2)  # the interpreter takes one block after another
    rho = ratios(rows * columns, ratio, 9).view(rows, columns)
    for dtype, p, threshold in itertools.product(DTYPES, POWERS, THRESHOLDS):
        arrays = arrays_of((rows, rank, columns), dtype)
        how = {"scale": 0.3, "lam": 1.3, "p": p, "alpha": 16.0, "threshold": threshold}
        assert_same_bits(low_rank(backend, arrays, rho, **how), low_rank("reference", arrays, rho, **how))


@cuda
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", DTYPES)
@pytest.mark.parametrize("n", [1, 1025, 1_000_003])
def test_cuda(backend: str, dtype: torch.dtype, ratio: torch.dtype, n: int) -> None:
    arrays = four(n, dtype, ratio)
    on_device = [array.cuda() for array in arrays]
    for p, alpha, threshold in itertools.product(POWERS, ALPHAS, THRESHOLDS):
        how = {"lam": 1.3, "p": p, "alpha": alpha, "threshold": threshold}
        assert_same_bits(run(backend, on_device, **how).cpu(), run("reference", arrays, **how))


@cuda
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_low_rank_on_cuda(backend: str, shape: tuple[int, int, int]) -> None:
    rows, _, columns = shape
    rho = ratios(rows * columns, torch.bfloat16, 9).view(rows, columns)
    arrays, how = arrays_of(shape, torch.bfloat16), {"scale": 0.3, "lam": 1.3, "p": 2.0}
    found = low_rank(backend, [array.cuda() for array in arrays], rho.cuda(), **how)
    assert_same_bits(found.cpu(), low_rank("reference", arrays, rho, **how))


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_many_as_one_by_one(backend: str) -> None:
    needs(backend)
    tensors = [four(n, DTYPES[n % 2], torch.bfloat16) for n in range(6)]
    expected = [run("reference", arrays, lam=1.3, p=2.0) for arrays in tensors]
    thetas, tuneds, bases, rhos = map(list, zip(*tensors, strict=True))
    ops.rescaled_subtract_many_(thetas, tuneds, bases, ratios=rhos, lam=1.3, p=2.0, backend=backend)
    for theta, wanted in zip(thetas, expected, strict=True):
        assert_same_bits(theta, wanted)


def statistics(arrays: list[Tensor], how: Rescaling) -> dict[str, float]:
    theta, tuned, base, ratio = arrays
    out = torch.empty_like(theta)
    addresses = [array.data_ptr() for array in (out, theta, tuned, base)]
    codes = tuple(DTYPE_CODES[array.dtype] for array in (theta, tuned, base, ratio, ratio))
    found: dict[str, float] = compiled.kernels().rescaled_subtract(
        *addresses, 0, ratio.data_ptr(), codes, len(theta), how, 2, True
    )
    return found


@pytest.mark.parametrize("ratio", DTYPES)
@pytest.mark.parametrize("p", POWERS)
def test_statistics(instruction_set: str, ratio: torch.dtype, p: float) -> None:
    arrays, how = four(5000, torch.bfloat16, ratio, special=False), Rescaling(1.0, p)
    found = statistics(arrays, how)
    expected = run("reference", arrays, lam=1.0, p=p)
    w = reference.weights_of_ratio(arrays[3], how)
    assert found["sum_weight"] == pytest.approx(float(w.double().sum()), rel=1e-5)
    assert found["changed"] == int((expected != arrays[0]).sum())
    assert found["invalid_ratio"] == found["nonfinite_retain"] == found["nonfinite_forget"] == 0
    assert found["nonfinite_out"] == 0


@pytest.mark.parametrize("ratio", DTYPES)
@pytest.mark.parametrize("place", [0, 1023, 1024, 4999])
def test_statistics_count_what_is_no_ratio(ratio: torch.dtype, place: int) -> None:
    arrays = four(5000, torch.bfloat16, ratio, special=False)
    arrays[3][place], arrays[3][place // 2 + 1] = math.nan, -1.0
    assert statistics(arrays, Rescaling(1.0))["invalid_ratio"] == 2


def test_a_ratio_stands_alone() -> None:
    theta, tuned, base, ratio = four(12, torch.float32, torch.float32, special=False)
    with pytest.raises(ValueError, match="ratio takes the place of forget_importance and retain_importance"):
        ops.rescaled_subtract_(theta, tuned, base, ratio, ratio, ratio=ratio, lam=1.0)
    with pytest.raises(ValueError, match="ratios takes the place"):
        ops.rescaled_subtract_many_([theta], [tuned], [base], [ratio], [ratio], ratios=[ratio], lam=1.0)
    with pytest.raises(ValueError, match=r"ratio has shape \(11,\)"):
        ops.rescaled_subtract_(theta, tuned, base, ratio=ratio[:11], lam=1.0)
    with pytest.raises(TypeError, match=r"ratio must be a torch\.Tensor or None"):
        ops.rescaled_subtract(theta, tuned, base, ratio=1.0, lam=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ratio shares memory with theta"):
        ops.rescaled_subtract_(theta, tuned, base, ratio=theta, lam=1.0)
