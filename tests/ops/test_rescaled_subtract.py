"""Every backend of the rescaled subtraction against the reference, bit for bit, and its properties."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perta_fast import compiled, ops
from perta_fast.rules import Rescaling

# The interpreter of Triton computes with numpy, which warns of the special values.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 3, 16, 31, 32, 33, 1023, 1024, 1025, 70_001)
SPECIAL = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    float("inf"),
    float("-inf"),
    float("nan"),
    1e-45,  # smallest float32 denormal
    -1e-40,
    6e-8,  # smallest float16 denormal
    6.1e-5,
    65504.0,
    65519.0,
    65520.0,
    3.4e38,
    1.1754944e-38,
    1.0 + 2**-8,  # ties between two bfloat16 neighbours
    1.0 + 3 * 2**-8,
    1.0 + 2**-11,  # ties between two float16 neighbours
)


def draw(n: int, dtype: torch.dtype, seed: int, special: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * 10 ** torch.empty(n).uniform_(-6, 1, generator=generator)
    if special and n:
        chosen = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (n,), generator=generator)]
        values = torch.where(torch.rand(n, generator=generator) < 0.5, chosen, values)
    return values.to(dtype)


def bits(tensor: Tensor) -> Tensor:
    """The stored bits, all NaNs made one: their payload is not part of the contract."""
    integers = tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
    return torch.where(tensor.isnan(), -1, integers)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    different = (bits(actual) != bits(expected)).nonzero().flatten()
    assert not len(different), (actual[different[:5]], expected[different[:5]])


def run(backend: str, arrays: list[Tensor | None], **how: float | None) -> Tensor:
    theta, *sources = arrays
    assert theta is not None
    return ops.rescaled_subtract_(theta.clone(), *sources, backend=backend, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=5)))
def test_every_mix_of_types(dtypes: tuple[torch.dtype, ...]) -> None:
    arrays = [draw(1337, dtype, seed, special=True) for seed, dtype in enumerate(dtypes)]
    assert_same_bits(run("cpp", arrays, lam=0.7), run("reference", arrays, lam=0.7))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("threshold", [None, 0.25])
def test_sizes_powers_and_masks(
    instruction_set: str, n: int, dtype: torch.dtype, p: float, threshold: float | None
) -> None:
    arrays = [draw(n, dtype, seed, special=True) for seed in range(3)]
    arrays += [draw(n, torch.float32, seed, special=True) for seed in (3, 4)]
    how = {"lam": 1.3, "p": p, "alpha": 0.8, "threshold": threshold}
    assert_same_bits(run("cpp", arrays, **how), run("reference", arrays, **how))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("importance", DTYPES)
def test_types_on_every_instruction_set(instruction_set: str, dtype: torch.dtype, importance: torch.dtype) -> None:
    arrays = [draw(5000, dtype, seed, special=True) for seed in range(3)]
    arrays += [draw(5000, importance, seed, special=True) for seed in (3, 4)]
    assert_same_bits(run("cpp", arrays, lam=2.0), run("reference", arrays, lam=2.0))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_task_vector(instruction_set: str, n: int, dtype: torch.dtype) -> None:
    arrays: list[Tensor | None] = [draw(n, dtype, seed, special=True) for seed in range(3)]
    assert_same_bits(run("cpp", arrays, lam=1.5), run("reference", arrays, lam=1.5))


@pytest.mark.parametrize("p", [0.75, 1.5, 3.0])
def test_other_powers_within_rounding(p: float) -> None:
    arrays = [draw(4000, torch.float32, seed) for seed in range(5)]
    torch.testing.assert_close(
        run("cpp", arrays, lam=1.0, p=p), run("reference", arrays, lam=1.0, p=p), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_unaligned_views(dtype: torch.dtype, offset: int) -> None:
    arrays = [draw(3000 + offset, dtype, seed)[offset:] for seed in range(5)]
    expected = run("reference", arrays, lam=1.0)
    theta = torch.cat([torch.zeros(offset, dtype=dtype), arrays[0]])[offset:]
    ops.rescaled_subtract_(theta, *arrays[1:], lam=1.0, backend="cpp")
    assert_same_bits(theta, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("importance", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("n", [0, 1, 1025])
def test_triton(dtype: torch.dtype, importance: torch.dtype, p: float, threshold: float | None, n: int) -> None:
    if "triton" not in ops.available_backends():
        pytest.skip("triton is not installed, or TRITON_INTERPRET is not 1")
    arrays = [draw(n, dtype, seed, special=True) for seed in range(3)]
    arrays += [draw(n, importance, seed, special=True) for seed in (3, 4)]
    how = {"lam": 1.3, "p": p, "alpha": 0.8, "threshold": threshold}
    assert_same_bits(run("triton", arrays, **how), run("reference", arrays, **how))


def test_triton_plain_task_vector() -> None:
    if "triton" not in ops.available_backends():
        pytest.skip("triton is not installed, or TRITON_INTERPRET is not 1")
    arrays: list[Tensor | None] = [draw(1500, torch.bfloat16, seed, special=True) for seed in range(3)]
    assert_same_bits(run("triton", arrays, lam=1.5), run("reference", arrays, lam=1.5))


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("weighted", [False, True])
def test_new_tensor_as_in_place(backend: str, weighted: bool) -> None:
    if backend not in ops.available_backends():
        pytest.skip(f"{backend} is not available")
    arrays = [draw(1500, torch.bfloat16, seed, special=True) for seed in range(5 if weighted else 3)]
    theta = arrays[0].clone()
    result = ops.rescaled_subtract(*arrays, lam=1.5, backend=backend)
    assert_same_bits(result, run("reference", arrays, lam=1.5))
    assert_same_bits(arrays[0], theta)


def test_new_tensor_from_one_tensor_in_several_roles() -> None:
    theta, tuned = (draw(100, torch.float32, seed) for seed in range(2))
    result = ops.rescaled_subtract(theta, tuned, theta, tuned, tuned, lam=1.0)
    assert_same_bits(result, run("reference", [theta, tuned, theta.clone(), tuned, tuned], lam=1.0))
    assert not ops.rescaled_subtract(theta.requires_grad_(), tuned, theta, lam=1.0).requires_grad


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("weighted", [False, True])
def test_many_as_one_by_one(backend: str, weighted: bool) -> None:
    if backend not in ops.available_backends():
        pytest.skip(f"{backend} is not available")
    mixes = (DTYPES[0], DTYPES[1]) * 3
    tensors = [[draw(n, dtype, n + seed) for seed in range(5)] for n, dtype in enumerate(mixes)]
    lists = list(zip(*tensors, strict=True))[: 5 if weighted else 3]
    expected = [run("reference", [*arrays[: len(lists)]], lam=1.3, p=2.0) for arrays in tensors]
    assert ops.rescaled_subtract_many_(*lists, lam=1.3, p=2.0, backend=backend) is None
    for theta, wanted in zip(lists[0], expected, strict=True):
        assert_same_bits(theta, wanted)


def test_many_of_nothing() -> None:
    ops.rescaled_subtract_many_([], [], [], lam=1.0)


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


@cuda
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [*SIZES, 1_000_003])
def test_cuda(backend: str, dtype: torch.dtype, p: float, n: int) -> None:
    arrays = [draw(n, dtype, seed, special=True) for seed in range(3)]
    arrays += [draw(n, torch.float32, seed, special=True) for seed in (3, 4)]
    expected = run("reference", arrays, lam=1.3, p=p)
    on_device = [array.cuda() for array in arrays]
    assert_same_bits(run(backend, on_device, lam=1.3, p=p).cpu(), expected)
    assert_same_bits(ops.rescaled_subtract(*on_device, lam=1.3, p=p, backend=backend).cpu(), expected)


@cuda
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=5)))
def test_cuda_mixes_and_offsets(dtypes: tuple[torch.dtype, ...]) -> None:
    place = DTYPES.index(dtypes[0])
    arrays = [draw(4099 + place, dtype, seed, special=True) for seed, dtype in enumerate(dtypes)]
    expected = run("reference", [array[place:] for array in arrays], lam=0.7)
    on_device = [array.cuda()[place:] for array in arrays]
    ops.rescaled_subtract_(*on_device, lam=0.7, backend="cuda")
    assert_same_bits(on_device[0].cpu(), expected)


@cuda
def test_cuda_many() -> None:
    tensors = [[draw(7 * n, DTYPES[n % 2], 5 * n + seed) for seed in range(5)] for n in range(1500)]
    expected = [run("reference", [*arrays], lam=1.3) for arrays in tensors]
    lists = [[tensor.cuda() for tensor in each] for each in zip(*tensors, strict=True)]
    ops.rescaled_subtract_many_(*lists, lam=1.3, backend="cuda")
    for theta, wanted in zip(lists[0], expected, strict=True):
        assert_same_bits(theta.cpu(), wanted)


@cuda
def test_cuda_runs_in_the_order_of_the_current_stream() -> None:
    arrays = [draw(100_000, torch.float32, seed) for seed in range(3)]
    theta, tuned, base = (array.cuda() for array in arrays)
    late = torch.zeros_like(tuned)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # cycles: longer than a launch on another stream would take to overtake
        late.copy_(tuned)
        ops.rescaled_subtract_(theta, late, base, lam=1.0, backend="cuda")
    torch.cuda.synchronize()
    assert_same_bits(theta.cpu(), run("reference", [*arrays], lam=1.0))


sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(DTYPES)
strengths = st.floats(0, 8, width=32)


def five(n: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    return [draw(n, dtype, seed + k) for k in range(3)] + [draw(n, torch.float32, seed + k) for k in (3, 4)]


@settings(max_examples=60, deadline=None)
@given(sizes, dtypes, seeds)
def test_zero_strength_is_the_identity(n: int, dtype: torch.dtype, seed: int) -> None:
    arrays = five(n, dtype, seed)
    assert_same_bits(run("cpp", arrays, lam=0.0), arrays[0])


@settings(max_examples=60, deadline=None)
@given(sizes, dtypes, seeds, strengths)
def test_full_weight_is_the_plain_task_vector(n: int, dtype: torch.dtype, seed: int, lam: float) -> None:
    theta, tuned, base, forget, _ = five(n, dtype, seed)
    forget = forget.abs() + 1e-3
    weighted = run("cpp", [theta, tuned, base, forget, torch.zeros(n)], lam=lam)
    assert_same_bits(weighted, run("cpp", [theta, tuned, base], lam=lam))


@settings(max_examples=60, deadline=None)
@given(sizes, dtypes, seeds, strengths, st.data())
def test_splitting_changes_nothing(n: int, dtype: torch.dtype, seed: int, lam: float, data: st.DataObject) -> None:
    arrays = five(n, dtype, seed)
    cut = data.draw(st.integers(0, n))
    parts = [run("cpp", [array[part] for array in arrays], lam=lam) for part in (slice(cut), slice(cut, n))]
    assert_same_bits(torch.cat(parts), run("cpp", arrays, lam=lam))


@settings(max_examples=60, deadline=None)
@given(sizes, seeds)
def test_swapping_forget_and_retain_gives_the_complement(n: int, seed: int) -> None:
    forget, retain = (draw(n, torch.float32, seed + k) for k in range(2))
    forget[::7] = retain[::7] = 0
    zeros, ones = torch.zeros(n), torch.ones(n)
    w = -run("cpp", [zeros, ones, zeros, forget, retain], lam=1.0)
    swapped = -run("cpp", [zeros, ones, zeros, retain, forget], lam=1.0)
    evidence = (forget != 0) | (retain != 0)
    torch.testing.assert_close(w + swapped, evidence.float(), rtol=0, atol=2**-23)
    assert bool(((w >= 0) & (w <= 1)).all())


@settings(max_examples=60, deadline=None)
@given(sizes, dtypes, seeds, strengths)
def test_result_lies_between_theta_and_the_whole_step(n: int, dtype: torch.dtype, seed: int, lam: float) -> None:
    arrays = five(n, dtype, seed)
    whole = run("cpp", arrays[:3], lam=lam)
    result = run("cpp", arrays, lam=lam)
    assert bool((torch.minimum(arrays[0], whole) <= result).all())
    assert bool((result <= torch.maximum(arrays[0], whole)).all())


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(0, 400_000), st.integers(1, 4))
def test_statistics(seed: int, n: int, threads: int) -> None:
    theta, tuned, base, forget, retain = five(n % 9000, torch.bfloat16, seed)
    n = len(theta)
    out = torch.empty_like(theta)
    arrays = [theta, tuned, base, forget, retain]
    found = compiled.kernels().rescaled_subtract(
        out.data_ptr(), *[a.data_ptr() for a in arrays], (1, 1, 1, 0, 0), n, Rescaling(1.0), threads, True
    )
    expected = run("reference", arrays, lam=1.0)
    assert_same_bits(out, expected)
    change = (expected.double() - theta.double()).square().sum()
    assert found["changed"] == int((expected != theta).sum())
    assert found["sum_squared_change"] == pytest.approx(float(change), rel=1e-4, abs=1e-30)
    assert found["nonzero_task"] == bool((tuned != base).any())
    assert found["nonfinite_out"] == found["nonfinite_forget"] == found["nonfinite_retain"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 1023, 1024, 4999])
def test_statistics_count_what_is_not_finite(dtype: torch.dtype, place: int) -> None:
    code = ops.backends.DTYPE_CODES[dtype]
    arrays = [draw(5000, dtype, seed) for seed in range(5)]
    arrays[3][place], arrays[4][place // 2] = float("inf"), float("nan")
    out = torch.empty_like(arrays[0])
    found = compiled.kernels().rescaled_subtract(
        out.data_ptr(), *[a.data_ptr() for a in arrays], (code,) * 5, 5000, Rescaling(1.0), 2, True
    )
    assert found["nonfinite_forget"] == 1
    assert found["nonfinite_retain"] == 1
    assert found["nonfinite_out"] == int((~out.isfinite()).sum()) > 0


def test_tensors_of_any_shape() -> None:
    arrays = [draw(60, torch.float32, seed).view(3, 4, 5) for seed in range(5)]
    result = run("cpp", arrays, lam=1.0)
    assert result.shape == (3, 4, 5)
    assert_same_bits(result.flatten(), run("reference", [a.flatten() for a in arrays], lam=1.0))


def test_counts_as_an_in_place_change_for_autograd() -> None:
    theta, tuned, base = (draw(8, torch.float32, seed) for seed in range(3))
    weight = torch.ones(8, requires_grad=True)
    product = (weight * theta).sum()
    ops.rescaled_subtract_(theta, tuned, base, lam=1.0, backend="cpp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def good() -> dict[str, Tensor]:
    names = ("theta", "tuned", "base", "forget_importance", "retain_importance")
    return {name: draw(12, torch.float32, seed) for seed, name in enumerate(names)}


@pytest.mark.parametrize("name", list(good()))
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_bad_arguments_are_named(name: str, backend: str) -> None:
    for wrong, error in (
        (torch.zeros(11), ValueError),
        (torch.zeros(12, dtype=torch.float64), TypeError),
        (torch.zeros(24)[::2], ValueError),
        (torch.zeros(12, device="meta"), ValueError),
        ([0.0] * 12, TypeError),
    ):
        if name == "theta" and error is ValueError and not (isinstance(wrong, Tensor) and not wrong.is_contiguous()):
            continue  # the others are measured against theta
        with pytest.raises(error, match=name):
            ops.rescaled_subtract_(**good() | {name: wrong}, lam=1.0, backend=backend)


@pytest.mark.parametrize("wrong", ["thetas", "tuneds", "bases", "forget_importances"])
def test_many_names_what_is_wrong(wrong: str) -> None:
    names = ("thetas", "tuneds", "bases", "forget_importances", "retain_importances")

    def lists() -> dict[str, list[Tensor]]:
        return {name: [draw(12, torch.float32, 5 * k + seed) for k in range(4)] for seed, name in enumerate(names)}

    for change, error, message in (
        (lambda every: every | {wrong: every[wrong][:3]}, ValueError, rf"{wrong} has 3"),
        (lambda every: every | {wrong: torch.zeros(4, 12)}, TypeError, rf"{wrong} must be a list or tuple"),
        (
            lambda every: every | {wrong: [*every[wrong][:2], torch.zeros(24)[::2], every[wrong][3]]},
            ValueError,
            rf"{wrong}\[2\] is not contiguous",
        ),
        (
            lambda every: every | {wrong: [*every[wrong][:3], every["thetas"][1]]},
            ValueError,
            r"shares memory with thetas\[.\], which is overwritten",
        ),
    ):
        with pytest.raises(error, match=message):
            ops.rescaled_subtract_many_(**change(lists()), lam=1.0)


def test_many_on_one_device_only() -> None:
    thetas = [torch.zeros(3), torch.zeros(3, device="meta")]
    with pytest.raises(ValueError, match=r"thetas\[1\] is on meta"):
        ops.rescaled_subtract_many_(thetas, thetas, thetas, lam=1.0)


@pytest.mark.parametrize("name", [name for name in good() if name != "theta"])
def test_aliases_of_theta_are_refused(name: str) -> None:
    arrays = good()
    whole = torch.zeros(20)
    arrays |= {"theta": whole[:12], name: whole[8:]}
    with pytest.raises(ValueError, match=name):
        ops.rescaled_subtract_(**arrays, lam=1.0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lam", float("nan")),
        ("lam", float("inf")),
        ("p", 0.0),
        ("p", -1.0),
        ("p", float("inf")),
        ("alpha", -0.1),
        ("alpha", float("nan")),
        ("threshold", 1.0),
        ("threshold", -0.1),
        ("backend", "fast"),
    ],
)
def test_bad_settings_are_named(setting: str, value: object) -> None:
    how: dict[str, object] = {"lam": 1.0} | {setting: value}
    with pytest.raises(ValueError, match=setting):
        ops.rescaled_subtract_(**good(), **how)  # type: ignore[arg-type]


def test_one_importance_alone_is_refused() -> None:
    arrays = good()
    del arrays["retain_importance"]
    with pytest.raises(ValueError, match="retain_importance"):
        ops.rescaled_subtract_(**arrays, lam=1.0)
