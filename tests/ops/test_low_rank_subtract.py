"""The subtraction of a task vector given by its factors: every backend against the reference, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perta_fast import ops
from perta_fast.ops import reference
from tests.ops.test_rescaled_subtract import DTYPES, assert_same_bits, cuda, draw

# The interpreter of Triton computes with numpy, which warns of the special values.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

SHAPES = (  # rows, rank, columns
    (1, 1, 1),
    (7, 3, 5),  # rows shorter than a block and than a vector
    (3, 16, 1024),
    (2, 5, 1025),
    (5, 4, 3000),
    (300, 33, 257),
    (4, 0, 9),
    (0, 2, 9),
    (9, 2, 0),
)


def arrays_of(
    shape: tuple[int, int, int], dtype: torch.dtype, importance: torch.dtype = torch.float32, special: bool = True
) -> list[Tensor]:
    """Theta, the two factors, and two importances."""
    rows, rank, columns = shape
    sizes = ((rows, columns), (rows, rank), (rank, columns), (rows, columns), (rows, columns))
    dtypes = (dtype, torch.float32, torch.float32, importance, importance)
    return [
        draw(a * b, each, seed, special).view(a, b)
        for seed, ((a, b), each) in enumerate(zip(sizes, dtypes, strict=True))
    ]


def run(backend: str, arrays: list[Tensor], **how: float | None) -> Tensor:
    theta, *sources = arrays
    return ops.low_rank_subtract_(theta.clone(), *sources, backend=backend, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("threshold", [None, 0.25])
def test_cpp(
    instruction_set: str, shape: tuple[int, int, int], dtype: torch.dtype, p: float, threshold: float | None
) -> None:
    arrays = arrays_of(shape, dtype, torch.bfloat16)
    how = {"scale": 0.3, "lam": 1.3, "p": p, "alpha": 0.8, "threshold": threshold}
    assert_same_bits(run("cpp", arrays, **how), run("reference", arrays, **how))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_task_vector(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    arrays = arrays_of(shape, dtype)[:3]
    assert_same_bits(run("cpp", arrays, scale=2.0, lam=1.5), run("reference", arrays, scale=2.0, lam=1.5))


@pytest.mark.parametrize("shape", [(7, 3, 5), (2, 5, 1025), (4, 0, 9), (0, 2, 9)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_triton(shape: tuple[int, int, int], dtype: torch.dtype, weighted: bool) -> None:
    if "triton" not in ops.available_backends():
        pytest.skip("triton is not installed, or TRITON_INTERPRET is not 1")
    arrays = arrays_of(shape, dtype)[: 5 if weighted else 3]
    how = {"scale": 0.3, "lam": 1.3, "p": 2.0}
    assert_same_bits(run("triton", arrays, **how), run("reference", arrays, **how))


@cuda
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    arrays = arrays_of(shape, dtype, torch.bfloat16)
    how = {"scale": 0.3, "lam": 1.3, "p": 2.0, "threshold": 0.25}
    found = run(backend, [array.cuda() for array in arrays], **how)
    assert_same_bits(found.cpu(), run("reference", arrays, **how))


@given(
    rows=st.integers(0, 12),
    rank=st.integers(0, 9),
    columns=st.integers(0, 70),
    scale=st.floats(-4, 4, width=32),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_as_the_product_of_the_factors(rows: int, rank: int, columns: int, scale: float, seed: int) -> None:
    """Against a matrix product in double precision, handed to the subtraction of whole tensors."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(rows, columns, generator=generator)
    left = torch.randn(rows, rank, generator=generator)
    right = torch.randn(rank, columns, generator=generator)
    task_vector = (scale * (left.double() @ right.double())).float()
    importances = [torch.rand(rows, columns, generator=generator) for _ in range(2)]
    whole = ops.rescaled_subtract_(theta.clone(), task_vector, torch.zeros_like(theta), *importances, lam=0.9)
    ops.low_rank_subtract_(theta, left, right, *importances, scale=scale, lam=0.9)
    torch.testing.assert_close(theta, whole, rtol=1e-5, atol=1e-5)


def test_reference_reads_as_the_formula() -> None:
    left, right = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0, 7.0], [8.0, 9.0, 10.0]])
    expected = torch.tensor([[10.5, 12.0, 13.5], [23.5, 27.0, 30.5]])
    assert torch.equal(reference.low_rank_task_vector(left, right, 0.5), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": float("inf")}, "scale is inf"),
        ({"left": torch.ones(3, 2)}, "does not have theta's shape"),
        ({"right": torch.ones(3, 5)}, "does not have theta's shape"),
        ({"left": torch.ones(4, 2, dtype=torch.bfloat16)}, "left is a 2-D torch.bfloat16"),
        ({"right": torch.ones(5, 2).T}, "right is not contiguous"),
        ({"theta": torch.ones(20)}, "a matrix is needed"),
        ({"forget_importance": torch.ones(4, 5)}, "go together"),
        ({"lam": float("nan")}, "lam"),
    ],
)
def test_bad_arguments(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "theta": torch.ones(4, 5),
        "left": torch.ones(4, 2),
        "right": torch.ones(2, 5),
        "scale": 1.0,
        "lam": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        ops.low_rank_subtract_(**{**arguments, **changes})  # type: ignore[arg-type]


def test_shared_memory_is_refused() -> None:
    memory = torch.ones(4, 4)
    with pytest.raises(ValueError, match="left shares memory with theta"):
        ops.low_rank_subtract_(memory, memory, torch.ones(4, 4), scale=1.0, lam=1.0)
