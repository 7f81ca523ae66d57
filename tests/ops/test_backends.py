"""Which backend serves a call, and what is said where none can."""

import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perta_fast import compiled, ops
from perta_fast.errors import RunError
from perta_fast.ops import backends
from perta_fast.rules import Rescaling

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    backends._available.cache_clear()
    yield
    backends._available.cache_clear()


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ImportError("perta_fast/_C.so: undefined symbol: accumulate")
    monkeypatch.setattr(compiled, "_load", lambda: error)


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """An extension that was built with CUDA or without."""
    module = SimpleNamespace(build_info=lambda: {"cuda": request.param})
    monkeypatch.setattr(compiled, "_load", lambda: module)


@pytest.mark.parametrize(
    ("device", "extension", "interpreted", "found"),
    [
        ("cpu", True, "0", ("cpp", "reference")),
        ("cpu", True, "1", ("cpp", "triton", "reference")),
        ("cuda", True, "0", ("cuda", "triton", "reference")),
        ("cuda", False, "0", ("triton", "reference")),
        ("xpu", True, "0", ("triton", "reference")),
        ("mps", True, "1", ("reference",)),
    ],
    indirect=["extension"],
)
def test_available(
    device: str, extension: None, interpreted: str, found: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    if importlib.util.find_spec("triton") is None:
        found = tuple(name for name in found if name != "triton")
    assert ops.available_backends(device) == found
    assert backends.choose("auto", torch.device(device)) == found[0]
    assert backends.choose("auto", torch.device(device), serving=("reference",)) == "reference"
    for name in found:
        assert backends.choose(name, torch.device(device)) == name


def test_the_wrong_device_is_named() -> None:
    with pytest.raises(ValueError, match="backend cuda cannot serve tensors on cpu: it serves CUDA tensors only"):
        backends.choose("cuda", CPU)
    with pytest.raises(ValueError, match="backend cpp cannot serve tensors on cuda: it serves CPU tensors only"):
        backends.choose("cpp", CUDA)
    with pytest.raises(ValueError, match="backend triton cannot serve tensors on mps: Triton does not serve such"):
        backends.choose("triton", torch.device("mps"))


def test_an_extension_that_does_not_load_says_why(no_extension: None) -> None:
    for backend, device in (("cpp", CPU), ("cuda", CUDA)):
        with pytest.raises(
            ValueError, match=r"undefined symbol: accumulate; install a C\+\+ compiler.*available: .*ref"
        ):
            backends.choose(backend, device)
    assert backends.choose("auto", CPU, serving=("cpp", "reference")) == "reference"
    with pytest.raises(RunError, match="undefined symbol: accumulate"):
        compiled.kernels()


@pytest.mark.parametrize("extension", [False], indirect=True)
def test_an_extension_without_cuda_says_so(extension: None) -> None:
    with pytest.raises(ValueError, match="built without CUDA; put nvcc on PATH"):
        backends.choose("cuda", CUDA)


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"triton is not installed; run: pip install 'perta-fast\[triton\]'"):
        backends.choose("triton", CUDA)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_on_the_cpu_must_be_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="on the CPU it needs TRITON_INTERPRET=1"):
        backends.choose("triton", CPU)


def test_an_operation_without_such_a_kernel() -> None:
    with pytest.raises(ValueError, match="this operation has no such kernel; available: reference"):
        backends.choose("cpp", CPU, serving=("reference",))


@pytest.mark.parametrize("p", [3.0, 0.75])
def test_a_power_that_triton_lacks_goes_to_another_backend(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that has Triton and the reference alone, unless Triton is asked for."""
    monkeypatch.setattr(backends, "_available", lambda kind, interpreted: ("triton", "reference"))
    theta, *others = (torch.rand(7) for _ in range(5))
    left, right = torch.rand(7, 2), torch.rand(2, 1)
    for backend in ("auto", "reference"):
        assert backends.choose_for_power(backend, CPU, p) == "reference"
    assert backends.choose_for_power("auto", CPU, 2.0) == "triton"
    found = ops.rescaled_subtract(theta, *others, lam=1.0, p=p)
    assert torch.equal(found, ops.rescaled_subtract(theta, *others, lam=1.0, p=p, backend="reference"))
    ops.low_rank_subtract_(theta.view(7, 1), left, right, scale=1.0, lam=1.0, p=p)
    if importlib.util.find_spec("triton") is not None:
        with pytest.raises(ValueError, match="backend triton has no exact power"):
            ops.rescaled_subtract(theta, *others, lam=1.0, p=p, backend="triton")


class Recorder:
    """Stands for the extension on a machine with a GPU: keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def cuda_rescaled_subtract(self, *arguments: Any) -> None:
        self.calls.append(arguments)

    def cuda_accumulate(self, *arguments: Any) -> None:
        self.calls.append(arguments)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """The operations take CPU tensors for CUDA ones, and call the recorder on stream 77."""
    made = Recorder()
    monkeypatch.setattr(compiled, "kernels", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    for module in (backends.choose_for_power, ops.accumulate_):
        monkeypatch.setitem(module.__globals__, "choose", lambda backend, device, serving=(): "cuda")
    return made


def test_what_the_cuda_subtraction_is_given(recorder: Recorder) -> None:
    theta, tuned, base = torch.zeros(3), torch.zeros(3).bfloat16(), torch.zeros(3).half()
    forget, retain = torch.zeros(3), torch.zeros(3).bfloat16()
    addresses = [tensor.data_ptr() for tensor in (theta, tuned, base, forget, retain)]
    ops.rescaled_subtract_(theta, tuned, base, forget, retain, lam=1.0, p=2.0, alpha=3.0, threshold=0.5)
    out = ops.rescaled_subtract(theta, tuned, base, lam=1.0)
    ops.rescaled_subtract_many_([theta, tuned], [base.float(), base], [forget, forget.half()], lam=1.0)
    whole, plain, many = recorder.calls
    assert whole == ([(addresses[0], *addresses, (0, 1, 2, 0, 1), 3)], Rescaling(1.0, 2.0, 3.0, 0.5), 77)
    assert plain[0] == [(out.data_ptr(), *addresses[:3], 0, 0, (0, 1, 2, 0, 0), 3)]
    assert plain[1] == Rescaling(1.0)
    assert [(entry[0], entry[6], entry[7]) for entry in many[0]] == [
        (addresses[0], (0, 0, 0, 0, 0), 3),
        (addresses[1], (1, 2, 2, 0, 0), 3),
    ]


def test_what_the_cuda_accumulation_is_given(recorder: Recorder) -> None:
    accumulators = [torch.zeros(3), torch.zeros(4)]
    gradients = [torch.zeros(3).bfloat16(), torch.zeros(4).half()]

    def entry(k: int) -> tuple[int, int, int, int]:
        return accumulators[k].data_ptr(), gradients[k].data_ptr(), k + 1, 3 + k

    ops.accumulate_(accumulators[0], gradients[0])
    ops.accumulate_square_many_(accumulators, gradients)
    assert recorder.calls == [([entry(0)], False, 77), ([entry(0), entry(1)], True, 77)]


def test_tensors_side_by_side_are_apart() -> None:
    whole, other = torch.zeros(9), torch.zeros(5)
    written = {"first": whole[:3], "second": whole[3:6]}
    backends.check_apart(written, {"read": whole[6:], "once": other, "again": other, "empty": whole[:0]})


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (1, 2), (2, 4), (5, 9), (0, 9)])
def test_tensors_that_overlap_are_named(begin: int, end: int) -> None:
    whole = torch.zeros(9)
    for written in ({"first": whole[:3], "second": whole[3:6]}, {"second": whole[3:6], "first": whole[:3]}):
        with pytest.raises(ValueError, match=r"read shares memory with (first|second), which is overwritten"):
            backends.check_apart(written, {"apart": torch.zeros(2), "read": whole[begin:end]})
    with pytest.raises(ValueError, match=r"shares memory with (first|other), which is overwritten"):
        backends.check_apart({"first": whole[begin:end], "other": whole[end - 1 :]}, {})
