"""The CUDA kernels of all operations but fisher, compiled for the CPU, against the reference, bit for bit.

What this cannot show is how the kernels behave on a device: their speed, and threads that run at the same time.
"""

import ctypes
import itertools
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perta_fast import ops
from perta_fast.ops.backends import DTYPE_CODES
from perta_fast.rules import Rescaling
from tests.ops.test_ratio import ratios
from tests.ops.test_rescaled_subtract import DTYPES, SIZES, assert_same_bits, draw
from tests.support.children import run_child

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared"]
# A misaligned 16-byte access ends the process; the sources' own pragmas are nvcc's.
FLAGS += ["-fsanitize=alignment,bounds", "-fno-sanitize-recover=all", "-Wno-unknown-pragmas"]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        pytest.skip("no C++ compiler was found")
    stand_in = ROOT / "tests" / "ops" / "cuda_on_cpu"
    target = tmp_path_factory.mktemp("cuda_on_cpu") / "kernels.so"
    folders = (stand_in, ROOT / "csrc", ROOT / "csrc" / "cuda")
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), stand_in / "entries.cpp"]
    command = [*compiler.split(), *FLAGS, *(f"-I{folder}" for folder in folders), "-x", "c++"]
    done = run_child([*command, *sources, "-o", target])
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(target))
    loaded.rescaled_subtract.restype = loaded.low_rank_subtract.restype = loaded.accumulate.restype = ctypes.c_char_p
    return loaded


def addresses(tensors: Sequence[Sequence[Tensor | None]]) -> ctypes.Array[ctypes.c_uint64]:
    flat = [0 if each is None else each.data_ptr() for arrays in tensors for each in arrays]
    return (ctypes.c_uint64 * len(flat))(*flat)


def codes(tensors: Sequence[Sequence[Tensor | None]]) -> ctypes.Array[ctypes.c_int]:
    flat = [0 if each is None else DTYPE_CODES[each.dtype] for arrays in tensors for each in arrays]
    return (ctypes.c_int * len(flat))(*flat)


def counts(tensors: Sequence[Sequence[Tensor | None]]) -> ctypes.Array[ctypes.c_size_t]:
    return (ctypes.c_size_t * len(tensors))(*(arrays[0].numel() for arrays in tensors))  # type: ignore[union-attr]


class _Rescaling(ctypes.Structure):
    """The struct of csrc/rescale.h."""

    _fields_ = (*((name, ctypes.c_float) for name in ("lam", "p", "alpha", "threshold")), ("masked", ctypes.c_bool))


def struct_of(rescaling: Rescaling) -> Any:
    threshold = rescaling.threshold
    settings = rescaling.lam, rescaling.p, rescaling.alpha, threshold or 0.0, threshold is not None
    return ctypes.byref(_Rescaling(*settings))


def subtract(library: ctypes.CDLL, tensors: Sequence[Sequence[Tensor | None]], rescaling: Rescaling) -> int:
    """Run on lists of (out, theta, tuned, base, forget, retain); return the number of launches."""
    before = library.launch_count()
    error = library.rescaled_subtract(
        ctypes.c_size_t(len(tensors)),
        addresses(tensors),
        codes([arrays[1:] for arrays in tensors]),
        counts(tensors),
        struct_of(rescaling),
    )
    assert error is None
    return int(library.launch_count() - before)


def low_rank_subtract(
    library: ctypes.CDLL, arrays: Sequence[Tensor | None], scale: float, rescaling: Rescaling
) -> None:
    """Run on (out, theta, left, right, forget, retain)."""
    theta, right = arrays[1], arrays[3]
    assert theta is not None and right is not None
    error = library.low_rank_subtract(
        addresses([arrays]),
        codes([arrays[1:]]),
        ctypes.c_size_t(theta.numel()),
        ctypes.c_size_t(len(right)),
        ctypes.c_size_t(theta.shape[1]),
        ctypes.c_float(scale),
        struct_of(rescaling),
    )
    assert error is None


def accumulate(library: ctypes.CDLL, pairs: Sequence[tuple[Tensor, Tensor]], squared: bool) -> int:
    """Run on pairs of (accumulator, gradient); return the number of launches."""
    before = library.launch_count()
    error = library.accumulate(
        ctypes.c_size_t(len(pairs)),
        addresses(pairs),
        codes([pair[1:] for pair in pairs]),
        counts(pairs),
        ctypes.c_bool(squared),
    )
    assert error is None
    return int(library.launch_count() - before)


def reference(arrays: Sequence[Tensor | None], rescaling: Rescaling) -> Tensor:
    how = asdict(rescaling)
    return ops.rescaled_subtract(*arrays, **how, backend="reference")  # type: ignore[arg-type]


def placed(values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """A copy of ``values``, ``offset`` elements after an address that 16 divides, and the buffer around it."""
    buffer = torch.full((len(values) + offset + 16,), 7.0, dtype=values.dtype)
    assert buffer.data_ptr() % 16 == 0
    view = buffer[offset : offset + len(values)]
    view.copy_(values)
    return view, buffer


def untouched_around(buffer: Tensor, offset: int, count: int) -> bool:
    return bool((buffer[:offset] == 7).all()) and bool((buffer[offset + count :] == 7).all())


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=5)))
def test_every_mix_of_types(library: ctypes.CDLL, dtypes: tuple[torch.dtype, ...]) -> None:
    arrays = [draw(333, dtype, seed, special=True) for seed, dtype in enumerate(dtypes)]
    rescaling = Rescaling(0.7, 1.0, 0.8, None)
    expected = reference(arrays, rescaling)
    assert subtract(library, [(arrays[0], *arrays)], rescaling) == 1
    assert_same_bits(arrays[0], expected)


@pytest.mark.parametrize("importance", [None, *DTYPES])
@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("threshold", [None, 0.25])
def test_powers_and_masks(
    library: ctypes.CDLL, weights: torch.dtype, importance: torch.dtype | None, p: float, threshold: float | None
) -> None:
    arrays: list[Tensor | None] = [draw(4100, weights, seed, special=True) for seed in range(3)]
    arrays += [None if importance is None else draw(4100, importance, seed, special=True) for seed in (3, 4)]
    rescaling = Rescaling(1.3, p, 0.8, threshold)
    out = torch.empty(4100, dtype=weights)
    subtract(library, [(out, *arrays)], rescaling)
    assert_same_bits(out, reference(arrays, rescaling))


@pytest.mark.parametrize("p", [0.75, 3.0])
def test_other_powers_within_rounding(library: ctypes.CDLL, p: float) -> None:
    arrays = [draw(4000, torch.float32, seed) for seed in range(5)]
    rescaling = Rescaling(1.0, p, 1.0, None)
    out = torch.empty(4000)
    subtract(library, [(out, *arrays)], rescaling)
    torch.testing.assert_close(out, reference(arrays, rescaling), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [*SIZES, 4096, 4097, 8200, 40_000])
@pytest.mark.parametrize("offset", [0, 1, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_and_common_offsets(library: ctypes.CDLL, n: int, offset: int, dtype: torch.dtype) -> None:
    values = [draw(n, dtype, seed) for seed in range(3)]
    arrays, (buffer, *_) = zip(*(placed(each, offset) for each in values), strict=True)
    subtract(library, [(arrays[0], *arrays, None, None)], Rescaling(1.0, 1.0, 1.0, None))
    assert_same_bits(arrays[0], reference(values, Rescaling(1.0, 1.0, 1.0, None)))
    assert untouched_around(buffer, offset, n)


def test_any_offsets(library: ctypes.CDLL) -> None:
    choose = random.Random(0)
    for _ in range(200):
        n, mix = choose.randrange(5000), choose.choices(DTYPES, k=5)
        values = [draw(n, dtype, choose.randrange(1 << 30)) for dtype in mix]
        offsets = [choose.randrange(9) for _ in mix]
        arrays, buffers = zip(*map(placed, values, offsets), strict=True)
        subtract(library, [(arrays[0], *arrays)], Rescaling(1.0, 2.0, 1.0, None))
        assert_same_bits(arrays[0], reference(values, Rescaling(1.0, 2.0, 1.0, None)))
        assert untouched_around(buffers[0], offsets[0], n)


def test_thousands_of_tensors_in_a_few_launches(library: ctypes.CDLL) -> None:
    choose = random.Random(1)
    sizes = [choose.choice([0, 1, 5, 64, 100, 4096, 9000]) for _ in range(1200)]
    tensors = [[draw(n, torch.bfloat16, 3 * k + seed) for seed in range(3)] for k, n in enumerate(sizes)]
    tensors[700] = [each.float() for each in tensors[700]]
    rescaling = Rescaling(1.0, 1.0, 1.0, None)
    expected = [reference(arrays, rescaling) for arrays in tensors]
    launched = subtract(library, [(arrays[0], *arrays, None, None) for arrays in tensors], rescaling)
    for arrays, wanted in zip(tensors, expected, strict=True):
        assert_same_bits(arrays[0], wanted)
    assert launched <= 4


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_accumulate(library: ctypes.CDLL, squared: bool, offset: int) -> None:
    pairs, expected, around = [], [], []
    add: Callable[..., Tensor] = ops.accumulate_square_ if squared else ops.accumulate_
    for n, dtype in itertools.product((0, 1, 7, 8, 9, 4096, 5000), DTYPES):
        gradient = draw(n, dtype, n, special=True)
        accumulator, buffer = placed(draw(n, torch.float32, n + 1), offset)
        expected.append(add(accumulator.clone(), gradient, backend="reference"))
        pairs.append((accumulator, placed(gradient, 2 * offset)[0]))
        around.append((buffer, offset, n))
    assert accumulate(library, pairs, squared) == len(DTYPES)
    for (accumulator, _), wanted in zip(pairs, expected, strict=True):
        assert_same_bits(accumulator, wanted)
    assert all(itertools.starmap(untouched_around, around))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (13, 3, 8), (40, 16, 129), (5, 4, 4096), (3, 0, 5), (0, 2, 4)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_low_rank(
    library: ctypes.CDLL, dtype: torch.dtype, shape: tuple[int, int, int], weighted: bool, p: float
) -> None:
    rows, rank, columns = shape
    theta = draw(rows * columns, dtype, 1, special=True).view(rows, columns)
    left = draw(rows * rank, torch.float32, 2).view(rows, rank)
    right = draw(rank * columns, torch.float32, 3).view(rank, columns)
    importances = [draw(theta.numel(), torch.bfloat16, seed, special=True).view_as(theta) for seed in (4, 5)]
    chosen: list[Tensor | None] = [*importances] if weighted else [None, None]
    expected = ops.low_rank_subtract_(
        theta.clone(), left, right, *chosen, scale=0.7, lam=1.3, p=p, alpha=0.8, threshold=None, backend="reference"
    )
    out = torch.empty_like(theta)
    low_rank_subtract(library, [out, theta, left, right, *chosen], 0.7, Rescaling(1.3, p, 0.8, None))
    assert_same_bits(out, expected)


def reference_by_ratio(arrays: Sequence[Tensor], rescaling: Rescaling) -> Tensor:
    """Of theta, tuned, base and ratio."""
    how = asdict(rescaling)
    return ops.rescaled_subtract(*arrays[:3], ratio=arrays[3], **how, backend="reference")


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=4)))
def test_by_ratio_every_mix_of_types(library: ctypes.CDLL, dtypes: tuple[torch.dtype, ...]) -> None:
    arrays = [draw(333, dtype, seed, special=True) for seed, dtype in enumerate(dtypes[:3])]
    arrays.append(ratios(333, dtypes[3], 3))
    rescaling = Rescaling(0.7, 1.0, 0.8, None)
    expected = reference_by_ratio(arrays, rescaling)
    assert subtract(library, [(arrays[0], *arrays[:3], None, arrays[3])], rescaling) == 1
    assert_same_bits(arrays[0], expected)


@pytest.mark.parametrize("ratio", DTYPES)
@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("threshold", [None, 0.25])
def test_by_ratio_powers_and_offsets(
    library: ctypes.CDLL, weights: torch.dtype, ratio: torch.dtype, p: float, threshold: float | None
) -> None:
    values = [*(draw(4100, weights, seed, special=True) for seed in range(3)), ratios(4100, ratio, 3)]
    for alpha, offsets in itertools.product((0.0, 1.0, 16.0), ((0, 0, 0, 0), (3, 3, 3, 3), (1, 0, 5, 2))):
        rescaling = Rescaling(1.3, p, alpha, threshold)
        arrays, buffers = zip(*map(placed, values, offsets), strict=True)
        subtract(library, [(arrays[0], *arrays[:3], None, arrays[3])], rescaling)
        assert_same_bits(arrays[0], reference_by_ratio(values, rescaling))
        assert untouched_around(buffers[0], offsets[0], 4100)


def test_by_ratio_another_power_within_rounding(library: ctypes.CDLL) -> None:
    arrays = [*(draw(4000, torch.float32, seed) for seed in range(3)), ratios(4000, torch.bfloat16, 3)]
    rescaling = Rescaling(1.0, 1.7, 1.0, None)
    out = torch.empty(4000)
    subtract(library, [(out, *arrays[:3], None, arrays[3])], rescaling)
    torch.testing.assert_close(out, reference_by_ratio(arrays, rescaling), rtol=1e-6, atol=1e-6)


def test_by_ratio_beside_pairs_and_plain_ones(library: ctypes.CDLL) -> None:
    """One list: each tensor is weighted by what it has."""
    values = [draw(500, torch.bfloat16, seed) for seed in range(3)]
    rho, pair = ratios(500, torch.bfloat16, 3), [draw(500, torch.bfloat16, seed) for seed in (4, 5)]
    rescaling, outs = Rescaling(1.0, 2.0, 1.0, None), [torch.empty(500, dtype=torch.bfloat16) for _ in range(3)]
    lasts: list[list[Tensor | None]] = [[None, rho], [*pair], [None, None]]
    subtract(library, [(out, *values, *last) for out, last in zip(outs, lasts, strict=True)], rescaling)
    assert_same_bits(outs[0], reference_by_ratio([*values, rho], rescaling))
    assert_same_bits(outs[1], reference([*values, *pair], rescaling))
    assert_same_bits(outs[2], reference([*values, None, None], rescaling))


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_by_ratio_low_rank(library: ctypes.CDLL, weights: torch.dtype, p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(7, 3, generator=generator), torch.randn(3, 130, generator=generator)
    rho, rescaling = ratios(910, torch.bfloat16, 3).view(7, 130), Rescaling(1.3, p, 16.0, 0.25)
    theta = draw(910, weights, 5, special=True).view(7, 130)
    how = asdict(rescaling)
    expected = ops.low_rank_subtract_(theta.clone(), left, right, ratio=rho, scale=0.3, **how, backend="reference")
    low_rank_subtract(library, [theta, theta, left, right, None, rho], 0.3, rescaling)
    assert_same_bits(theta, expected)
