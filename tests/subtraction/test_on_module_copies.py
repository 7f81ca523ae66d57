"""The way of live sources to a device: every order that its events allow gives the same result.

Streams and events are simulated: what is put on a stream runs later, at a moment that a seeded draw chooses,
but never before the events it waits for.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from perta_fast import Importance, InputError, apply_to_module_
from perta_fast.subtraction import on_module as live
from perta_fast.subtraction import staging
from tests.support.checkpoints import draw, same_bytes, write_checkpoint, write_importance

# Not torch.device("cpu"), which all tensors here are on: so every array is elsewhere, and is copied.
DEVICE = torch.device("cpu", 0)
Step = Callable[[], bool]  # does its work if it can, and says whether it did


class Event:
    """Reached when the stream that last recorded it has come there."""

    def __init__(self, runtime: "Runtime") -> None:
        self.runtime = runtime
        self.reached = [True]  # never recorded: nothing to wait for

    def record(self, stream: "Stream") -> None:
        self.reached = reached = [False]

        def arrive() -> bool:
            reached[0] = True
            return True

        stream.steps.append(arrive)

    def synchronize(self) -> None:
        while not self.reached[0]:
            self.runtime.advance()


class Stream:
    """Steps that run in order, some time."""

    def __init__(self, runtime: "Runtime") -> None:
        self.steps: deque[Step] = deque()
        runtime.streams.append(self)

    def wait_event(self, event: Event) -> None:
        reached = event.reached
        self.steps.append(lambda: reached[0])

    def wait_stream(self, other: "Stream") -> None:
        assert not other.steps


class Runtime:
    """Stands for torch.cuda."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.streams: list[Stream] = []
        self.current = Stream(self)

    def Stream(self, device: torch.device) -> Stream:
        assert device == DEVICE
        return Stream(self)

    def Event(self) -> Event:
        return Event(self)

    def current_stream(self, device: torch.device) -> Stream:
        assert device == DEVICE
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        with _CopiesOn(stream):
            yield

    def advance(self) -> None:
        """Let some stream go on by a step; one that cannot is passed over."""
        waiting = [stream for stream in self.streams if stream.steps]
        assert waiting, "an event is waited for that nothing will reach"
        for stream in self.draw.sample(waiting, len(waiting)):
            if stream.steps[0]():
                stream.steps.popleft()
                return
        raise AssertionError("the streams wait for each other")

    def finish(self) -> None:
        while any(stream.steps for stream in self.streams):
            self.advance()


class _CopiesOn(TorchDispatchMode):
    """Puts copies on a stream instead of making them."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.put = stream.steps.append

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is not torch.ops.aten.copy_.default:
            return function(*arguments, **keywords or {})
        target, source, non_blocking = arguments
        assert non_blocking

        def copy() -> bool:
            target.copy_(source)
            return True

        self.put(copy)
        return target


def staging_on(runtime: Runtime, size: int) -> staging.Staging:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_device_module", lambda device: runtime)
        return staging.Staging(DEVICE, size)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 2**31), st.floats(0, 1), st.integers(1, 4))
def test_any_order_that_the_events_allow(sizes: list[int], seed: int, pace: float, arrays: int) -> None:
    runtime = Runtime(seed)
    way = staging_on(runtime, arrays * staging.ALIGNMENT)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float32)[:arrays]
    chunks = [[draw((size,), dtype, 10 * k + j) for j, dtype in enumerate(dtypes)] for k, size in enumerate(sizes)]
    expected = [sum(each.float() for each in chunk) for chunk in chunks]
    results = [torch.zeros(size) for size in sizes]
    for chunk, result in zip(chunks, results, strict=True):
        with way.on_device(chunk) as on_device:
            for source in chunk:
                source.fill_(float("nan"))  # it may be changed from here on
            runtime.current.steps.append(lambda sums=result, read=on_device: sums.add_(sum(read)) is sums)
        while runtime.draw.random() < pace and any(stream.steps for stream in runtime.streams):
            runtime.advance()
    runtime.finish()
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted)


def test_the_host_is_two_chunks_ahead_of_the_device() -> None:
    runtime = Runtime(0)
    way = staging_on(runtime, staging.ALIGNMENT)
    runtime.advance = lambda: pytest.fail("the host waits for the device")  # type: ignore[method-assign]
    for _ in range(2):
        with way.on_device([torch.zeros(3)]):
            pass
    with pytest.raises(pytest.fail.Exception, match="the host waits"), way.on_device([torch.zeros(3)]):
        pass


def test_what_is_on_the_device_is_passed_through() -> None:
    here = torch.ones(3)
    way = staging.Staging(torch.device("cpu"), 2 * staging.ALIGNMENT)
    with way.on_device([here, here]) as arrays:
        assert arrays[0] is here
        assert arrays[1] is here


class Model(torch.nn.Module):
    """Parameters of a few chunks, one chunk and none."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor.clone()))


def drawn(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {"large": (70, 30), "exact": (64,), "small": (5,), "none": (0, 3), "scalar": ()}
    return {name: draw(shape, dtype, seed + k) for k, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("staged", [False, True])
def test_chunks_of_a_module_make_the_whole(
    staged: bool, in_memory: bool, weighted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = drawn(0, torch.bfloat16)
    paths = {
        name: write_checkpoint(tmp_path / name, drawn(k, torch.bfloat16)) for k, name in ((10, "base"), (20, "tuned"))
    }
    importances: list[Any] = []
    if weighted:
        for seed, name in ((30, "forget"), (40, "retain")):
            importances.append(write_importance(tmp_path / name, drawn(seed, torch.float32), "grad"))
    if in_memory:
        importances = [
            Importance({name: each.clone() for name, each in loaded.tensors.items()}, loaded.metadata)
            for loaded in map(Importance.load, importances)
        ]
    rule = "grad" if weighted else "tv"
    whole = Model(model)
    apply_to_module_(whole, paths["base"], paths["tuned"], *importances, rule=rule, lam=1.5)
    monkeypatch.setattr(live, "CHUNK", 64)
    if staged:
        monkeypatch.setattr(live, "_staging", lambda device: staging.Staging(DEVICE, 4 * 256))
    chunked = Model(model)
    assert apply_to_module_(chunked, paths["base"], paths["tuned"], *importances, rule=rule, lam=1.5) == 5
    for (name, found), expected in zip(chunked.named_parameters(), whole.parameters(), strict=True):
        assert same_bytes(found.detach(), expected.detach()), name
        assert name == "none" or not torch.equal(found, model[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_module_on_cuda_as_on_the_cpu(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "CHUNK", 1 << 16)
    tensors = [
        {"large": draw((300, 1001), dtype, seed), "small": draw((7,), dtype, seed)}
        for seed, dtype in enumerate([torch.bfloat16] * 3 + [torch.float32] * 2)
    ]
    paths = [write_checkpoint(tmp_path / name, each) for name, each in zip("bt", tensors[1:3], strict=True)]
    paths += [write_importance(tmp_path / name, each, "grad") for name, each in zip("fr", tensors[3:], strict=True)]
    on_cpu, on_cuda = Model(tensors[0]), Model(tensors[0]).cuda()
    apply_to_module_(on_cpu, *paths, rule="grad", lam=1.5)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    apply_to_module_(on_cuda, *paths, rule="grad", lam=1.5, backend=backend)
    assert torch.cuda.max_memory_allocated() - before <= 2 * (16 * live.CHUNK + 2048)
    for found, expected in zip(on_cuda.parameters(), on_cpu.parameters(), strict=True):
        assert same_bytes(found.detach().cpu(), expected.detach())


def test_importance_in_memory_of_a_type_without_arithmetic(tmp_path: Path) -> None:
    tensors = {"small": draw((5,))}
    paths = [write_checkpoint(tmp_path / name, tensors) for name in ("base", "tuned")]
    metadata = Importance.load(write_importance(tmp_path / "importance", tensors, "grad")).metadata
    good, double = (Importance({"small": draw((5,), dtype)}, metadata) for dtype in (torch.float32, torch.float64))
    with pytest.raises(InputError, match=r"small is torch\.float64 in the importance"):
        apply_to_module_(Model(tensors), *paths, good, double, rule="grad")
