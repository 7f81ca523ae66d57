"""A deletion request of a tenth of the rows: from the importance of all, and with the retain rows estimated again.

The limit is the same run without any estimate of retained rows: the retain importance lies there already.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import perta_fast as pf
from bench.harness.contest import Outcome, alternate, replay, replayed
from bench.harness.tables import Row
from bench.inputs.arrays import timed
from bench.inputs.stream_models import write_stream_job

GROUP = "deletion request: 128 rows of 1,280"
CONTENDERS = {"forget rows, subtraction": "limit", "retain rows estimated again": "peer", "ours": "ours"}
RETAINED, FORGOTTEN, WORDS = 1152, 128, 32
SETTINGS: dict[str, Any] = {"batch_size": 8, "dtype": torch.float32, "progress": False, "overwrite": True}
STRENGTH: dict[str, Any] = {"rule": "empirical-fisher", "lam": 1.0}


@pytest.fixture(scope="module")
def folder(workspace: Path) -> Iterator[Path]:
    """A Llama of 5 M parameters, run in float32, with the importances of all rows and of those to retain."""
    made = workspace / "requests"
    write_stream_job(made, 256, 4, RETAINED, WORDS)
    lines = [line for role in ("forget", "retain") for line in (made / f"{role}.jsonl").read_text().splitlines(True)]
    (made / "forget.jsonl").write_text("".join(lines[:FORGOTTEN]))
    (made / "whole.jsonl").write_text("".join([*lines[:FORGOTTEN], *lines[RETAINED:]]))
    for name in ("whole", "retain"):
        data = made / f"{name}.jsonl"
        pf.estimate_importance(made / "base", data, "empirical-fisher", out=made / f"{name} importance", **SETTINGS)
    yield made
    shutil.rmtree(made)


def works(folder: Path) -> dict[str, Callable[[], object]]:
    """What each contender does."""
    model, base, tuned = (folder / name for name in ("model", "base", "tuned"))
    forget, retain, out = folder / "forget.jsonl", folder / "retain.jsonl", folder / "out"

    def limit() -> None:
        estimated = pf.estimate_importance(base, forget, "empirical-fisher", out=folder / "estimated", **SETTINGS)
        kept = folder / "retain importance"
        pf.apply(model, base, tuned, estimated, kept, out=out, progress=False, overwrite=True, **STRENGTH)

    def again() -> None:
        pf.unlearn(model, base, tuned, forget, retain, out=out, check=False, **STRENGTH, **SETTINGS)

    def ours() -> None:
        whole = folder / "whole importance"
        pf.unlearn(model, base, tuned, forget, whole_importance=whole, out=out, check=False, **STRENGTH, **SETTINGS)

    return dict(zip(CONTENDERS, (limit, again, ours), strict=True))


@pytest.fixture(scope="module")
def outcomes(folder: Path, rounds: int) -> Mapping[str, Outcome]:
    """The outcomes by contender."""
    return alternate({name: timed(work, "cpu") for name, work in works(folder).items()}, rounds)


@replayed
@pytest.mark.parametrize("contender", CONTENDERS)
def bench_requests(contender: str, outcomes: Mapping[str, Outcome], board: list[Row], benchmark: Any) -> None:
    """Report one contender."""
    board.append(replay(benchmark, outcomes[contender], group=GROUP, contender=contender, role=CONTENDERS[contender]))
