"""The Triton per-sample Fisher against products in float64; interpreted where there is no GPU."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perta_fast import ops

if "triton" not in ops.available_backends("cuda" if torch.cuda.is_available() else "cpu"):
    pytest.skip("triton is not installed, or TRITON_INTERPRET is not 1", allow_module_level=True)

from perta_fast.kernels import fisher as kernel
from triton.runtime.errors import PTXASError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N, T, d_out, d_in: nothing, one of each, odd, more than one tile and block.
SHAPES = (
    (0, 4, 3, 5),
    (2, 0, 3, 5),
    (2, 3, 0, 5),
    (2, 3, 3, 0),
    (1, 1, 1, 1),
    (3, 7, 5, 9),
    (4, 16, 16, 32),
    (5, 33, 17, 70),
)
Case = tuple[Tensor, Tensor, Tensor]


def draw(
    shape: tuple[int, int, int, int],
    first: torch.dtype = torch.float32,
    second: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Activations, output gradients and lengths; what lies beyond a length is NaN."""
    count, tokens, d_out, d_in = shape
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(count, tokens, d_in, generator=generator).to(first)
    deltas = torch.randn(count, tokens, d_out, generator=generator).to(second)
    lengths = torch.randint(tokens + 1, (count,), generator=generator)
    outside = torch.arange(tokens) >= lengths[:, None]
    activations[outside] = float("nan")
    deltas[outside] = float("nan")
    return activations.to(DEVICE), deltas.to(DEVICE), lengths


def expected(case: Case, start: float) -> tuple[Tensor, Tensor]:
    """Fisher and mean gradient by the formula, in float64, on the CPU."""
    activations, deltas, lengths = case
    fisher = torch.full((deltas.shape[-1], activations.shape[-1]), start, dtype=torch.float64)
    total = fisher.clone()
    for a, delta, length in zip(activations.cpu().double(), deltas.cpu().double(), lengths.tolist(), strict=True):
        gradient = delta[:length].T @ a[:length]
        fisher += gradient**2
        total += gradient
    return fisher, total


def accumulators(case: Case, start: float) -> tuple[Tensor, Tensor]:
    shape = (case[1].shape[-1], case[0].shape[-1])
    return torch.full(shape, start, device=DEVICE), torch.full(shape, start, device=DEVICE)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert found.isfinite().all()
    assert float((found.cpu() - wanted).norm()) <= tolerance * float(wanted.norm())


def rows_of(case: Case) -> kernel.Rows:
    tokens = case[0].shape[1]
    return tuple((n * tokens, n * tokens + length) for n, length in enumerate(case[2].tolist()) if length)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_shapes(shape: tuple[int, int, int, int], with_gradient: bool) -> None:
    case = draw(shape)
    fisher, gradient = accumulators(case, 0.5)
    result = ops.accumulate_squared_gradients_(
        fisher, *case[:2], lengths=case[2], gradient=gradient if with_gradient else None, backend="triton"
    )
    assert result is fisher
    wanted = expected(case, 0.5)
    assert_close(fisher, wanted[0])
    assert_close(gradient, wanted[1] if with_gradient else torch.full_like(wanted[1], 0.5))


@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
def test_types(first: torch.dtype, second: torch.dtype) -> None:
    case = draw((3, 20, 18, 35), first, second)
    fisher, gradient = accumulators(case, 0.0)
    ops.accumulate_squared_gradients_(fisher, *case[:2], lengths=case[2], gradient=gradient, backend="triton")
    wanted = expected(case, 0.0)
    assert_close(fisher, wanted[0])
    assert_close(gradient, wanted[1])


def test_rows_without_padding() -> None:
    activations, deltas, lengths = case = draw((4, 19, 18, 35))
    inside = torch.arange(19) < lengths[:, None]
    fisher, _ = accumulators(case, 0.0)
    ops.accumulate_squared_gradients_(fisher, activations[inside], deltas[inside], lengths=lengths, backend="triton")
    assert_close(fisher, expected(case, 0.0)[0])


@settings(max_examples=25, deadline=None)
@given(st.tuples(st.integers(0, 5), st.integers(0, 40), st.integers(1, 40), st.integers(1, 70)), st.integers(0, 2**31))
def test_any_shape(shape: tuple[int, int, int, int], seed: int) -> None:
    case = draw(shape, seed=seed)
    fisher, _ = accumulators(case, 0.25)
    ops.accumulate_squared_gradients_(fisher, *case[:2], lengths=case[2], backend="triton")
    assert_close(fisher, expected(case, 0.25)[0])


@pytest.mark.parametrize("programs", [1, 2, 3, 7])
def test_programs_that_share_a_tile(programs: int) -> None:
    case = draw((5, 33, 17, 70), seed=3)
    fisher, gradient = accumulators(case, 0.5)
    rows = rows_of(case)
    kernel._launch(
        fisher, gradient, *(each.flatten(0, 1) for each in case[:2]), rows, kernel.INTERPRETED_TILE, programs
    )
    wanted = expected(case, 0.5)
    assert_close(fisher, wanted[0])
    assert_close(gradient, wanted[1])


@pytest.mark.parametrize("programs", [1, 3])
def test_a_launch_that_is_only_timed_writes_nothing(programs: int) -> None:
    case = draw((5, 33, 17, 70))
    fisher, gradient = accumulators(case, 0.5)
    kernel._launch(
        fisher,
        gradient,
        *(each.flatten(0, 1) for each in case[:2]),
        rows_of(case),
        kernel.INTERPRETED_TILE,
        programs,
        kept=False,
    )
    assert bool((fisher == 0.5).all())
    assert bool((gradient == 0.5).all())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.sampled_from([16, 32, 64]), st.integers(1, 25))
def test_the_plan_deals_whole_samples(lengths: list[int], block: int, programs: int) -> None:
    rows, begin = [], 5
    for length in lengths:
        rows.append((begin, begin + length))
        begin += length + 3
    blocks, shares = kernel._plan(tuple(rows), block, programs, torch.device("cpu"), None)
    pairs = blocks.view(-1, 2).tolist()
    covered = [row for first, end in pairs for row in range(first, min(first + block, end))]
    assert covered == [row for first, end in rows for row in range(first, end)]
    bounds = shares.tolist()
    assert len(bounds) == programs + 1
    assert bounds[0] == 0
    assert bounds[-1] == len(pairs)
    for first, last in pairwise(bounds):
        assert first <= last
        if first < last:  # a share begins with a sample's first block, so it ends with a sample's last one
            assert pairs[first][0] in [begin for begin, _ in rows]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 300), st.sampled_from([1, 16, 108, 132]))
def test_tiles_are_shared_where_they_are_few(tiles: int, samples: int, processors: int) -> None:
    programs = kernel.programs_a_tile(tiles, samples, processors)
    assert 1 <= programs <= samples

    def busy(number: int) -> float:
        return tiles * number / (math.ceil(tiles * number / processors) * processors)

    assert busy(programs) >= busy(1)
    if tiles >= 4 * processors:
        assert programs == 1
    if tiles * samples <= processors:
        assert programs == samples


def test_the_fastest_tile_is_chosen_once_for_like_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[dict[str, int]] = []

    def launch(tile: kernel.triton.Config, kept: bool) -> None:
        assert not kept
        timed.append(tile.kwargs)

    def milliseconds(run, device: torch.device) -> float:  # type: ignore[no-untyped-def]
        run()
        return 1.0 if timed[-1]["BLOCK_IN"] == 128 else 2.0

    monkeypatch.setattr(kernel, "_milliseconds", milliseconds)
    monkeypatch.setattr(kernel, "_fastest", {})
    fisher = torch.zeros(64, 300)
    inputs = torch.zeros(9, 300, dtype=torch.bfloat16), torch.zeros(9, 64, dtype=torch.bfloat16)
    for rows in [((0, 9),), ((0, 8), (8, 9)), ((0, 9),)]:
        tile = kernel._fastest_tile(fisher, None, *inputs, rows, launch)
        assert tile.kwargs["BLOCK_IN"] == 128
    assert all(kwargs["BLOCK_OUT"] < 2 * 64 for kwargs in timed)
    assert len(timed) == 2 * len([t for t in kernel.TENSOR_CORE_TILES if t.kwargs["BLOCK_OUT"] <= 64])


@pytest.mark.parametrize(
    "error", [kernel.triton.OutOfResources(1, 0, "registers"), PTXASError("too much shared data")], ids=repr
)
def test_a_tile_that_is_too_large_is_never_the_fastest(error: Exception) -> None:
    def fail(error: Exception) -> None:
        raise error

    assert kernel._milliseconds(lambda: fail(error), torch.device(DEVICE)) == math.inf
    with pytest.raises(ZeroDivisionError):
        kernel._milliseconds(lambda: fail(ZeroDivisionError()), torch.device(DEVICE))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 256, 512, 1024), (7, 100, 1000, 333), (64, 16, 96, 4096)])
def test_every_tile_on_cuda(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    case = draw(shape, dtype, dtype)
    wanted = expected(case, 0.0)
    tiles = kernel.FLOAT32_TILES if dtype == torch.float32 else kernel.TENSOR_CORE_TILES
    for tile in tiles:
        for programs in (1, 4):
            fisher, gradient = accumulators(case, 0.0)
            flat = [each.flatten(0, 1) for each in case[:2]]
            try:
                kernel._launch(fisher, gradient, *flat, rows_of(case), tile, programs)
            except kernel.UNFIT:
                continue  # a device with less shared memory
            tolerance = 1e-5 if dtype == torch.float32 else 1e-4  # tensor cores do not round to nearest
            assert_close(fisher, wanted[0], tolerance)
            assert_close(gradient, wanted[1], tolerance)
