"""A streamed run by the default rule that is killed, or loses power, in any phase: the same command finishes it.

It is killed at some of its file calls; with ``PERTA_SOAK=1`` at all.
"""

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import perta_fast as pf
from perta_fast.files.new_directory import PRECONDITIONING_RECORD, scratch_path
from perta_fast.subtraction.unfinished import has_begun
from tests.crash.forks import Forks
from tests.crash.shim import Faults, Point, Shim
from tests.crash.test_power_loss import Recorder
from tests.crash.test_stream import IMPORTED, SOAK, contents, kills, output_in, spread
from tests.support.models import Job

pytestmark = pytest.mark.usefixtures("one_thread")


def arguments(job: Job, out: Path, *more: object) -> list[object]:
    inputs = [f"--{name}={getattr(job, name)}" for name in ("model", "base", "tuned", "forget", "retain")]
    return ["unlearn", *inputs, "--stream", "--lam", "3", "--quiet", "--out", out, *more]


@pytest.fixture(scope="module")
def forks(shim: Shim) -> Iterator[Forks]:
    with Forks(shim.library, (*IMPORTED, "perta_fast.runs.unlearn_preconditioned")) as forks:
        yield forks


@pytest.fixture(scope="module")
def calls(job: Job, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Point], dict[str, bytes]]:
    """The calls of a run that nothing stops, and what it makes."""
    folder = tmp_path_factory.mktemp("whole")
    out = output_in(folder)
    return forks.count(*arguments(job, out), path="/watched/", log=folder / "log"), contents(out.parent)


def finish(job: Job, out: Path, forks: Forks, expected: dict[str, bytes]) -> None:
    """Go on as the commands say."""
    command = ["resume", out, "--quiet"] if has_begun(out) or out.exists() else arguments(job, out)
    done = forks.perta(*command)
    if command[0] == "resume" and "there is no unfinished run to resume" in done.stderr:
        assert out.exists(), done.stderr
    else:
        assert done.returncode == 0, done.stderr
    assert contents(out.parent) == expected


def test_killed(job: Job, forks: Forks, calls: tuple[list[Point], dict[str, bytes]], tmp_path: Path) -> None:
    points, expected = calls
    records = [at for at, point in enumerate(points) if point.target.endswith(PRECONDITIONING_RECORD)]
    assert len(records) == 2  # of two layers
    for number, (then, at) in enumerate(spread(kills(points), 14)):
        out = output_in(tmp_path / str(number))
        done = forks.perta(*arguments(job, out), faults=Faults("/watched/", then=then, at=at))
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        finish(job, out, forks, expected)
        shutil.rmtree(tmp_path / str(number))


def test_killed_while_it_starts_over(
    job: Job, forks: Forks, calls: tuple[list[Point], dict[str, bytes]], tmp_path: Path
) -> None:
    """A walk does not go on after a part of its files has been removed."""
    points, expected = calls
    begun = output_in(tmp_path / "begun")
    (*_, last) = (at for at, point in enumerate(points) if point.target.endswith(PRECONDITIONING_RECORD))
    assert forks.perta(*arguments(job, begun), faults=Faults("/watched/", then="kill after", at=last)).returncode == -9
    assert scratch_path(begun).is_dir()
    for at in range(0, 12, 1 if SOAK else 3):
        out = Path(shutil.copytree(begun.parent, tmp_path / str(at) / "watched")) / begun.name
        forks.perta(*arguments(job, out, "--overwrite"), faults=Faults("/watched/", then="kill before", at=at))
        finish(job, out, forks, expected)


def test_the_power_fails(job: Job, tmp_path: Path) -> None:
    how: dict[str, Any] = {"model": job.model, "stream": True, "batch_size": 3, "progress": False}
    recorder = Recorder(tmp_path / "recorded")
    recorder.folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        recorder.start(patch)
        pf.precondition(job.base, job.tuned, job.retain, recorder.folder / "out", **how)
    expected, draw = contents(recorder.folder / "out"), random.Random(0)
    del expected["perta_precondition.json"]
    for number in range(200 if SOAK else 12):
        folder = tmp_path / str(number)
        folder.mkdir()
        recorder.disk_after_a_crash(draw.choice(recorder.moments), draw, folder)
        if not (folder / "out").exists():
            pf.precondition(job.base, job.tuned, job.retain, folder / "out", **how)
        found = contents(folder / "out")
        del found["perta_precondition.json"]
        assert found == expected
        assert [path.name for path in folder.iterdir()] == ["out"]
