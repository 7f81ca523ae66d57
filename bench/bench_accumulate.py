"""Adding a gradient, or its square, to a float32 accumulator: += g and += g².

GB/s count the gradient and the accumulator once as read, and the accumulator once as written.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import perta_fast as pf
from bench.harness.contest import Outcome, replay, replayed
from bench.harness.tables import Row
from bench.inputs.arrays import contest, roles
from perta_fast.dtypes import torch_name


@dataclasses.dataclass(frozen=True)
class Case:
    """The gradient's type, and whether it is squared."""

    gradient: torch.dtype
    squared: bool

    def __str__(self) -> str:
        return f"+= g{'²' if self.squared else ''}, {torch_name(self.gradient)} gradient"


TYPES = (torch.float32, torch.bfloat16)
CASES = [Case(dtype, squared) for squared in (False, True) for dtype in TYPES]


@dataclasses.dataclass
class Measured:
    """The outcomes of one case."""

    case: Case
    moved: int
    outcomes: dict[str, Outcome]


def add_(accumulator: torch.Tensor, gradient: torch.Tensor) -> None:
    """Add with torch."""
    accumulator.add_(gradient)


def add_square_(accumulator: torch.Tensor, gradient: torch.Tensor) -> None:
    """Add the square with torch, in float32."""
    gradient = gradient.float()
    accumulator.addcmul_(gradient, gradient)


@pytest.fixture(scope="module", params=CASES, ids=str)
def measured(request: pytest.FixtureRequest, device: str, elements: int, rounds: int) -> Measured:
    """Measure all contenders on one case."""
    case: Case = request.param
    generator = torch.Generator(device).manual_seed(0)
    values = torch.empty(elements, device=device).normal_(0.0, 1e-3, generator=generator)
    gradient = values.to(case.gradient)
    accumulator = torch.zeros(elements, device=device)
    moved = gradient.nbytes + 2 * accumulator.nbytes
    in_torch = add_square_ if case.squared else add_
    operation = pf.ops.accumulate_square_ if case.squared else pf.ops.accumulate_
    compiled = torch.compile(in_torch)
    outcomes = contest(
        device,
        rounds,
        moved=moved,
        eager=lambda: in_torch(accumulator, gradient),
        compiled=lambda: compiled(accumulator, gradient),
        ours=lambda backend: operation(accumulator, gradient, backend=backend),
    )
    return Measured(case, moved, outcomes)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the contenders that the chosen device has."""
    if "contender" in metafunc.fixturenames:
        metafunc.parametrize("contender", roles(metafunc.config.getoption("--bench-device")))


@replayed
def bench_accumulate(measured: Measured, contender: str, device: str, board: list[Row], benchmark: Any) -> None:
    """Report one contender on one case."""
    row = replay(
        benchmark,
        measured.outcomes[contender],
        group=f"accumulate, {device}: {measured.case}",
        contender=contender,
        role=roles(device)[contender],
        bytes=measured.moved,
    )
    board.append(row)
