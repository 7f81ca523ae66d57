"""A streamed sweep over two ranks: what one process finds, whichever of them dies."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import InputError, Sweep, resume, sweep
from perta_fast.distributed.ranks import Ranks
from perta_fast.streaming.forward import score_walk
from tests.distributed.launch import on_ranks, perta_on_ranks
from tests.support.checkpoints import read_checkpoint, same_bytes
from tests.support.models import Job, write_job

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return write_job(tmp_path_factory.mktemp("job"), torch.float32)


def run(group: Any, job: Job, folder: Path, changes: dict[str, Any], dying: int = -1, step: int = 0) -> Any:
    """On one rank. dying: the rank that is killed, as soon as it has recorded ``step`` steps of a walk for settings."""
    torch.set_num_threads(1)
    ranks, record = Ranks.of(group), score_walk.record_step

    def recording(path: Path, state: Any, *others: Any) -> None:
        record(path, state, *others)
        if ranks.rank == dying and "walks" in path.parts and state["done"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    score_walk.record_step = recording
    how: dict[str, Any] = {"rule": "tv", "lams": [4, 16], "target_retain_loss": 100.0, "stream": True, "batch_size": 2}
    how |= {"out": folder / "out", "checkpoint": folder / "chosen", "progress": False, "threads": 1, "group": group}
    return sweep(*job.checkpoints, job.forget, job.retain, **how | changes)


def rows(found: Sweep) -> list[Any]:
    return [replace(row, seconds=0.0) for row in found.rows]


def assert_same_checkpoint(first: Path, second: Path) -> None:
    one, other = read_checkpoint(first), read_checkpoint(second)
    assert one.keys() == other.keys() and all(same_bytes(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def alone(job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Path]:
    folder = tmp_path_factory.mktemp("alone")
    return run(None, job, folder, {}), folder / "chosen"


def test_the_same_sweep(job: Job, alone: tuple[Sweep, Path], tmp_path: Path) -> None:
    for found in on_ranks(2, run, job, tmp_path, {}):
        assert rows(found) == rows(alone[0])
    assert Sweep.read(tmp_path / "out" / "sweep.json").rows == found.rows
    assert_same_checkpoint(tmp_path / "chosen", alone[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chosen", "out"]


def test_rules_that_need_data(job: Job, tmp_path: Path) -> None:
    """Importances are sums over both ranks; one of them makes θ_f."""
    changes = {"rule": ["fisher", "preconditioned"], "gold": job.tuned, "select": "closest"}
    first, second = on_ranks(2, run, job, tmp_path / "two", changes)
    found = run(None, job, tmp_path / "one", changes)
    assert rows(first) == rows(second)
    for one, other in zip(rows(first), rows(found), strict=True):
        assert one.retain_loss == pytest.approx(other.retain_loss, rel=1e-5)
    assert first.gold.forget == found.gold.forget


@pytest.mark.parametrize(
    ("dying", "step"), [(0, 2), (1, 3)]
)  # of at least four, however the estimate of costs lays the walks out
def test_one_dies_and_all_go_on(dying: int, step: int, job: Job, alone: tuple[Sweep, Path], tmp_path: Path) -> None:
    outcomes = on_ranks(2, run, job, tmp_path, {}, dying, step)
    assert outcomes[dying] is None and isinstance(outcomes[1 - dying], Exception)
    if dying:
        ended = perta_on_ranks(2, "resume", tmp_path / "out", "--quiet")
        assert [each.status for each in ended] == [0, 0], ended
    else:
        on_ranks(2, run, job, tmp_path, {})
    assert rows(Sweep.read(tmp_path / "out" / "sweep.json")) == rows(alone[0])
    assert_same_checkpoint(tmp_path / "chosen", alone[1])


def test_as_many_processes_as_began_it(job: Job, tmp_path: Path) -> None:
    on_ranks(2, run, job, tmp_path, {}, 1, 3)
    with pytest.raises(
        InputError, match="the sweep was begun by 2 processes, this is a run of 1; finish it with: torchrun"
    ):
        resume(tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": False}, "a sweep on a model in memory is done by one process"),
        ({"in_place": True, "checkpoint": None}, "changed in place by one process alone; start it without torchrun"),
        ({"lams": [0]}, "lams has no strength to try"),
        ({"target_retain_loss": 0.1}, "cannot be chosen against"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, job: Job, tmp_path: Path) -> None:
    for error in on_ranks(2, run, job, tmp_path, changes):
        assert isinstance(error, InputError) and message in str(error)
    assert list(tmp_path.iterdir()) == []
