"""A forward walk over two ranks scores what one process scores, and goes on whichever of them dies."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast.distributed.ranks import Ranks
from perta_fast.rules import Rescaling
from perta_fast.streaming.forward import score_walk
from perta_fast.streaming.forward.sample_set import SampleSet
from perta_fast.streaming.forward.version import Version, VersionScores
from perta_fast.subtraction.inputs import Sources
from tests.distributed.launch import on_ranks
from tests.streaming.forward.test_score_walk import SETS, assert_equal, scored
from tests.support.models import Job, write_job

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return write_job(tmp_path_factory.mktemp("job"), torch.float32, num_hidden_layers=3)


def versions(job: Job) -> list[Version]:
    return [Version("as it is"), Version("half", Sources.open(*job.checkpoints), Rescaling(0.5))]


def walk(group: Any, job: Job, folder: Path, dying: int = -1, step: int = 0, sets: list[SampleSet] = SETS) -> Any:
    """On one rank. dying: the rank that is killed, as soon as it has recorded ``step`` steps."""
    torch.set_num_threads(1)
    ranks = Ranks.of(group)
    record = score_walk.record_step

    def recording(path: Path, state: Any, *others: Any) -> None:
        record(path, state, *others)
        if ranks.rank == dying and state["done"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    score_walk.record_step = recording
    return scored(job.model, versions(job), folder, sets, resumable=True, ranks=ranks)


def test_the_same_scores(job: Job, tmp_path: Path) -> None:
    alone = scored(job.model, versions(job), tmp_path / "alone")
    for found in on_ranks(2, walk, job, tmp_path / "walk"):
        assert_equal(alone, found)


def test_fewer_batches_than_ranks(job: Job, tmp_path: Path) -> None:
    sets = [SampleSet(of_set.name, of_set.samples[:1], of_set.detailed, of_set.hidden) for of_set in SETS]
    alone = scored(job.model, versions(job), tmp_path / "alone", sets)
    for found in on_ranks(2, walk, job, tmp_path / "walk", -1, 0, sets):
        assert_equal(alone, found)


@pytest.mark.parametrize(("dying", "step"), [(0, 1), (1, 1), (1, 6), (0, 10)])
def test_one_dies_and_all_go_on(dying: int, step: int, job: Job, tmp_path: Path) -> None:
    """The others may have recorded the step, or not yet."""
    outcomes = on_ranks(2, walk, job, tmp_path / "walk", dying, step)
    assert outcomes[dying] is None
    assert isinstance(outcomes[1 - dying], Exception)
    alone = scored(job.model, versions(job), tmp_path / "alone")
    for found in on_ranks(2, walk, job, tmp_path / "walk"):
        assert_equal(alone, found)


def test_an_error_on_one_rank_ends_all(job: Job, tmp_path: Path) -> None:
    outcomes = on_ranks(2, failing, job, tmp_path / "walk")
    assert [type(error).__name__ for error in outcomes] == ["OSError", "RunError"]
    assert str(outcomes[1]).startswith("rank 0: the disk is full")


def failing(group: Any, job: Job, folder: Path) -> list[VersionScores]:
    """The first rank's disk is full in the middle."""
    from perta_fast.streaming import scratch_files

    ranks, write = Ranks.of(group), scratch_files.write_fully

    def full(descriptor: int, data: memoryview, offset: int) -> None:
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if ranks.first and "hidden-2" in name:
            raise OSError(28, "No space left on device")
        write(descriptor, data, offset)

    scratch_files.write_fully = full
    return walk(group, job, folder)  # type: ignore[no-any-return]
