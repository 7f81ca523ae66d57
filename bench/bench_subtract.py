"""The rescaled subtraction alone, on arrays in memory, in place.

GB/s count each byte once: five inputs are read (four with the ratio of both importances, three for the plain task
vector) and theta is written. The limit, a copy, moves as many bytes, and half of them are writes. The operation writes
at most a quarter, and writes cost more than reads, so it can be faster than the limit.
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
from perta_fast.ops import reference
from perta_fast.rules import Rescaling

LAM = 1e-3  # small, as theta is updated many times and must stay finite


@dataclasses.dataclass(frozen=True)
class Case:
    """Storage types, and the rule: exponent p, or the plain task vector where p is None.

    by_ratio: with the ratio of both importances in their place.
    """

    weights: torch.dtype
    importance: torch.dtype
    p: float | None
    by_ratio: bool = False

    def __str__(self) -> str:
        weights, importance = torch_name(self.weights), torch_name(self.importance)
        what = "ratio" if self.by_ratio else "importance"
        return f"{weights}, tv" if self.p is None else f"{weights}, {what} {importance}, p={self.p:g}"


STORAGE = ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32))
CASES = [Case(*storage, p) for storage in STORAGE for p in (1.0, 2.0)]
CASES += [Case(torch.bfloat16, torch.bfloat16, p, by_ratio=True) for p in (1.0, 2.0)]
CASES += [Case(dtype, dtype, None) for dtype in (torch.bfloat16, torch.float32)]


@dataclasses.dataclass
class Measured:
    """The outcomes of one case."""

    case: Case
    moved: int
    outcomes: dict[str, Outcome]


@pytest.fixture(scope="module", params=CASES, ids=str)
def measured(request: pytest.FixtureRequest, device: str, elements: int, rounds: int) -> Measured:
    """Measure all contenders on one case."""
    case: Case = request.param
    generator = torch.Generator(device).manual_seed(0)

    def values(dtype: torch.dtype, scale: float) -> torch.Tensor:
        return torch.empty(elements, device=device).normal_(0.0, scale, generator=generator).to(dtype)

    theta, tuned, base = (values(case.weights, 0.02) for _ in range(3))
    forget = retain = ratio = None
    if case.by_ratio:
        ratio = (values(torch.float32, 1.0) / values(torch.float32, 1.0)).abs().to(case.importance)
    elif case.p is not None:
        forget, retain = (values(case.importance, 1e-4) for _ in range(2))
    p = case.p or 1.0
    arrays = [array for array in (theta, tuned, base, forget, retain, ratio) if array is not None]
    moved = theta.nbytes + sum(array.nbytes for array in arrays)
    weighing = (None, ratio) if case.by_ratio else (forget, retain)  # as the reference takes them

    def formula() -> None:
        theta.copy_(reference.rescaled_subtract(theta, tuned, base, *weighing, Rescaling(LAM, p)))

    compiled = torch.compile(formula)

    def ours(backend: str) -> None:
        pf.ops.rescaled_subtract_(theta, tuned, base, forget, retain, ratio=ratio, lam=LAM, p=p, backend=backend)

    outcomes = contest(device, rounds, moved=moved, eager=formula, compiled=compiled, ours=ours)
    return Measured(case, moved, outcomes)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the contenders that the chosen device has."""
    if "contender" in metafunc.fixturenames:
        metafunc.parametrize("contender", roles(metafunc.config.getoption("--bench-device")))


@replayed
def bench_subtract(measured: Measured, contender: str, device: str, board: list[Row], benchmark: Any) -> None:
    """Report one contender on one case."""
    row = replay(
        benchmark,
        measured.outcomes[contender],
        group=f"subtract, {device}: {measured.case}",
        contender=contender,
        role=roles(device)[contender],
        bytes=measured.moved,
    )
    board.append(row)
