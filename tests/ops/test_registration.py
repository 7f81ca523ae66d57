"""The operations under torch.compile, on fake tensors and as operators, against plain eager calls."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from perta_fast import ops

Inputs = list[Tensor]


def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 7, generator=generator) for _ in range(5)]


def subtract_(x: Inputs) -> Tensor:
    theta = x[0] * 2  # made by the program itself, so that the compiler may reuse its memory
    ops.rescaled_subtract_(theta, *x[1:], lam=1.0, p=2.0, threshold=0.25)
    return theta + x[0]


def subtract_from_an_input_(x: Inputs) -> Tensor:
    return ops.rescaled_subtract_(x[0], x[1], x[2], lam=1).sum()


def subtract(x: Inputs) -> Tensor:
    return ops.rescaled_subtract(*x, lam=1.0) * x[0]


def subtract_by_ratio(x: Inputs) -> Tensor:
    return ops.rescaled_subtract(*x[:3], ratio=x[3], lam=1.0, p=2.0) * x[4]


def subtract_many_(x: Inputs) -> Tensor:
    ops.rescaled_subtract_many_(x[:2], x[2:4], [x[4], x[4]], lam=1.0)
    return x[0] - x[1]


def low_rank_subtract_(x: Inputs) -> Tensor:
    left, right = torch.ones(5, 2, device=x[0].device), torch.ones(2, 7, device=x[0].device)
    ops.low_rank_subtract_(x[0], left, right, x[3], x[4], scale=0.5, lam=1.0, p=2.0)
    return x[0] * 1


def accumulate_(x: Inputs) -> Tensor:
    ops.accumulate_square_(x[0], x[1])
    return ops.accumulate_(x[1], x[2]) + x[0]


def accumulate_many_(x: Inputs) -> Tensor:
    ops.accumulate_many_(x[:2], x[2:4])
    ops.accumulate_square_many_([x[4]], [x[0]])
    return x[4] * 1


def fisher_(x: Inputs) -> Tensor:
    fisher = torch.zeros(7, 7, device=x[0].device)
    return ops.accumulate_squared_gradients_(fisher, torch.stack(x[:2]), torch.stack(x[2:4])) + x[0].sum()


PROGRAMS = (
    subtract_,
    subtract_from_an_input_,
    subtract,
    subtract_by_ratio,
    subtract_many_,
    low_rank_subtract_,
    accumulate_,
    accumulate_many_,
    fisher_,
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_compiled_as_eager(program: Callable[[Inputs], Tensor]) -> None:
    torch.compiler.reset()
    eager, compiled = inputs(), inputs()
    expected = program(eager)
    result = torch.compile(program, fullgraph=True, backend="aot_eager")(compiled)
    assert torch.equal(result, expected)
    for changed, wanted in zip(compiled, eager, strict=True):
        assert torch.equal(changed, wanted)


@pytest.mark.parametrize("program", PROGRAMS)
def test_fake_tensors(program: Callable[[Inputs], Tensor]) -> None:
    shape = program(inputs()).shape
    with FakeTensorMode():
        fakes = [torch.empty(5, 7, device="cuda") for _ in range(5)]
        result = program(fakes)
    assert isinstance(result, FakeTensor)
    assert result.shape == shape
    assert result.device.type == "cuda"


@pytest.mark.parametrize("program", PROGRAMS)
def test_meta_tensors(program: Callable[[Inputs], Tensor]) -> None:
    assert program([each.to("meta") for each in inputs()]).is_meta


def test_wrong_fake_tensors_are_named() -> None:
    with FakeTensorMode():
        good, short = torch.empty(3), torch.empty(2)
        for call, name in (
            (lambda: ops.rescaled_subtract_(good, short, good, lam=1.0), "tuned"),
            (lambda: ops.rescaled_subtract(good, good, short, lam=1.0), "base"),
            (lambda: ops.rescaled_subtract_many_([good], [good], [short], lam=1.0), r"bases\[0\]"),
            (lambda: ops.accumulate_(good, short), "gradient"),
            (lambda: ops.accumulate_many_([good], [short]), r"gradients\[0\]"),
            (lambda: ops.accumulate_squared_gradients_(*map(torch.empty, ((3, 5), (4, 7, 6), (4, 7, 3)))), "activ"),
        ):
            with pytest.raises(ValueError, match=f"{name}.* has shape"):
                call()


FISHER = torch.tensor([1, 3]), torch.zeros(5, 7)  # lengths, mean gradient
HOW = (1.0, 1.0, 1.0, None, "auto")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rescaled_subtract_", lambda x: (*x, None, *HOW)),
        ("rescaled_subtract_", lambda x: (*x[:3], None, None, x[3].abs(), *HOW)),
        ("rescaled_subtract", lambda x: (*x[:3], None, None, None, *HOW)),
        ("rescaled_subtract_many_", lambda x: (x[:1], x[1:2], x[2:3], x[3:4], x[4:], None, *HOW)),
        ("accumulate_", lambda x: (x[0], x[1], True, "auto")),
        ("accumulate_many_", lambda x: (x[:2], x[2:4], False, "auto")),
        ("accumulate_squared_gradients_", lambda x: (x[0], x[1][:4], x[2][:4, :5].contiguous(), *FISHER, "auto")),
    ],
)
def test_operators_keep_the_rules_of_torch(name: str, arguments: Callable[[Inputs], tuple[Any, ...]]) -> None:
    torch.library.opcheck(getattr(torch.ops.perta_fast, name).default, arguments(inputs()))


def test_operators_check_what_they_are_given() -> None:
    theta, tuned, base = inputs()[:3]
    with pytest.raises(ValueError, match="tuned has shape"):
        torch.ops.perta_fast.rescaled_subtract_(theta, tuned[:2], base, None, None, None, *HOW)
    with pytest.raises(ValueError, match="base shares memory with theta"):
        torch.ops.perta_fast.rescaled_subtract_(theta, tuned, theta, None, None, None, *HOW)


def test_parameters_that_require_gradients() -> None:
    eager, compiled = nn.Parameter(inputs()[0]), nn.Parameter(inputs()[0])

    def program(theta: Tensor) -> None:
        with torch.no_grad():
            ops.rescaled_subtract_(theta, *inputs()[1:], lam=1.0)

    before = eager.detach().clone()
    program(eager)
    assert not torch.equal(eager, before)
    torch.compiler.reset()
    torch.compile(program, backend="aot_eager")(compiled)
    assert torch.equal(compiled, eager)
