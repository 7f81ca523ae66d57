"""A streamed run that is killed in any phase, or meets a full disk, is finished with the same result.

It is killed at some of its file calls, at more of those before the walk's first record; with ``PERTA_SOAK=1`` at all.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from perta_fast.errors import InputError
from perta_fast.files.durable import read_record, write_record
from perta_fast.files.journal import JOB
from perta_fast.files.new_directory import partial_path
from perta_fast.resuming import resume
from perta_fast.runs.verify import verify
from perta_fast.subtraction.unfinished import STATE, WALK
from tests.crash.forks import Forks
from tests.crash.shim import SIZED, Faults, Point, Shim
from tests.support import forked
from tests.support.children import perta
from tests.support.models import Job, write_job

SOAK = os.environ.get("PERTA_SOAK") == "1"
SOME = 9  # kills in each test, if it is not a soak


IMPORTED = (
    *forked.IMPORTED,
    *("perta_fast._C", "perta_fast.cli", "perta_fast.runs.estimate", "perta_fast.resuming"),
    *("perta_fast.streaming.forecast.choice", "perta_fast.streaming.streamed_run"),
    *("perta_fast.runs.unlearn", "perta_fast.runs.unlearn_streamed"),
)


def arguments(job: Job, out: Path, *more: object) -> list[object]:
    model, base, tuned = job.checkpoints
    return [
        *("unlearn", "--rule=fisher", "--stream", "--model", model, "--base", base, "--tuned", tuned, "--quiet"),
        *("--forget", job.forget, "--retain", job.retain, "--rule", "empirical-fisher", "--lam", "0.7"),
        *("--save-importance", out.parent / "kept", "--out", out, *more),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """The files that every run must write alike: weights, importances, companions."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    apart = ("perta_report.json", "perta_files.b3")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name not in apart}


@pytest.fixture(scope="module")
def expected(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    done = perta(*arguments(job, folder / "result"))
    assert done.returncode == 0, done.stderr
    return contents(folder)


def output_in(folder: Path) -> Path:
    (folder / "watched").mkdir(parents=True)
    return folder / "watched" / "result"


@pytest.fixture(scope="module")
def forks(shim: Shim) -> Iterator[Forks]:
    with Forks(shim.library, IMPORTED) as forks:
        yield forks


def finish(job: Job, out: Path, expected: dict[str, bytes], run: Callable[..., CompletedProcess[str]] = perta) -> bool:
    """Finish a run from what is on the disk; return whether there was a run to resume.

    run: starts the same command again if there was none.
    """
    resumed = True
    try:
        report = resume(out, progress=False)
        assert report.resumed or report.finished
    except InputError as error:
        assert "there is no unfinished run to resume" in str(error)
        resumed = False
        if not out.exists():
            done = run(*arguments(job, out))
            assert done.returncode == 0, done.stderr
    assert contents(out.parent) == expected
    return resumed


@pytest.fixture(scope="module")
def calls(job: Job, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> list[Point]:
    folder = tmp_path_factory.mktemp("count")
    return forks.count(*arguments(job, output_in(folder)), path="/watched/", log=folder / "log")


def steps_recorded(points: list[Point]) -> list[int]:
    return [at for at, point in enumerate(points) if point.kind == "rename" and point.target.endswith(WALK)]


def kills(points: list[Point]) -> list[tuple[str, int]]:
    """Ways to kill the run at each of the calls.

    After a call is the same as before the next, except where a file is created in between; only a soak tries both.
    """
    ways = [("kill before", at) for at in range(len(points))]
    ways += [("torn", at) for at, point in enumerate(points) if point.kind in SIZED]
    return sorted([*ways, *(("kill after", at) for at in range(len(points)) if SOAK)])


def spread(ways: list[tuple[str, int]], number: int = SOME) -> list[tuple[str, int]]:
    """All ways in a soak, else ``number`` of them, evenly spread."""
    return ways if SOAK else [ways[(2 * k + 1) * len(ways) // (2 * number)] for k in range(number)]


@dataclass(frozen=True)
class Struck:
    """A run that is killed many times, each time on a copy of the directory ``before``."""

    forks: Forks
    job: Job
    expected: dict[str, bytes]
    out: Path
    before: Path

    def put(self, directory: Path) -> None:
        """Make the directory around ``out`` a copy of ``directory``."""
        shutil.rmtree(self.out.parent)
        shutil.copytree(directory, self.out.parent)

    def count(self, *command: object) -> list[Point]:
        """The calls that the command makes without faults."""
        self.put(self.before)
        return self.forks.count(*command, path="/watched/", log=self.out.parent.with_name("log"))

    def kill(self, then: str, at: int, *command: object) -> bool:
        """Kill the command once; False if it ended before that call."""
        self.put(self.before)
        done = self.forks.perta(*command, faults=Faults("/watched/", then=then, at=at))
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode != 0

    def finish(self, again: bool) -> bool:
        """Finish the run; ``again``: also by its own command. Returns whether there was a run to resume."""
        struck = self.out.parent.with_name("struck")
        shutil.copytree(self.out.parent, struck)
        resumed = finish(self.job, self.out, self.expected, self.forks.perta)
        if resumed and again:
            self.put(struck)
            done = self.forks.perta(*arguments(self.job, self.out))
            assert done.returncode == 0, done.stderr
            assert contents(self.out.parent) == self.expected
        shutil.rmtree(struck)
        return resumed


@pytest.fixture
def struck(job: Job, expected: dict[str, bytes], forks: Forks, tmp_path: Path) -> Struck:
    (tmp_path / "nothing").mkdir()
    return Struck(forks, job, expected, output_in(tmp_path), tmp_path / "nothing")


def killed_before(struck: Struck, at: int) -> Struck:
    """``struck``, beginning with what a run has written that is killed before its call ``at``."""
    assert struck.kill("kill before", at, *arguments(struck.job, struck.out))
    return replace(struck, before=shutil.copytree(struck.out.parent, struck.out.parent.with_name("before")))


def test_killed_before_the_first_record(calls: list[Point], struck: Struck) -> None:
    """It is resumed from its inputs, or starts over; neither needs --overwrite."""
    command = arguments(struck.job, struck.out)
    begun = next(at for at, point in enumerate(calls) if point.target.endswith(JOB))
    for then, at in spread(kills(calls[: steps_recorded(calls)[0]]), 3 * SOME):
        assert struck.kill(then, at, *command)
        resumed = struck.finish(again=SOAK or then == "kill before")
        assert resumed == (at > begun or (then, at) == ("kill after", begun))


def test_killed_during_the_walk(calls: list[Point], struck: Struck) -> None:
    recorded = steps_recorded(calls)
    layers = sum("hidden-" in point.path and point.kind == "unlink" for point in calls) // 2 - 1
    assert len(recorded) == 2 * layers + 3  # a record after each part, forward and back
    ways = spread([(then, at) for then, at in kills(calls) if at >= recorded[0]])
    killed = 0
    for then, at in ways:
        if struck.kill(then, at, *arguments(struck.job, struck.out)):
            killed += 1
            whole = struck.out.exists()
            assert struck.finish(again=SOAK and not whole) or whole
    assert killed > 0.9 * len(ways)  # threads may make a call or two less


def test_killed_with_its_importances_in_their_place(calls: list[Point], struck: Struck) -> None:
    """The same command finishes the run: the importances there are its own."""
    kept = next(at for at, point in enumerate(calls) if point.target.endswith("/kept"))
    assert struck.kill("kill after", kept, *arguments(struck.job, struck.out))
    assert struck.out.with_name("kept").is_dir() and not struck.out.exists()
    replaced = struck.out.with_name(".kept.perta-replaced")
    replaced.mkdir()  # as if it were killed before it removed an older one
    assert struck.finish(again=True)
    assert not replaced.exists()


def test_killed_while_it_starts_over(calls: list[Point], struck: Struck) -> None:
    """A run is not resumed after a part of its files has been removed."""
    struck = killed_before(struck, steps_recorded(calls)[-2])
    command = arguments(struck.job, struck.out, "--overwrite")
    second = struck.count(*command)
    number = next(at for at, point in enumerate(second) if point.kind == "write")
    for then, at in spread(kills(second[:number])):
        assert struck.kill(then, at, *command)
        struck.finish(again=SOAK)


def test_killed_again_before_the_first_record(calls: list[Point], struck: Struck) -> None:
    struck = killed_before(struck, steps_recorded(calls)[0])
    command = ["resume", struck.out, "--quiet"]
    second = struck.count(*command)
    for then, at in spread(kills(second[: steps_recorded(second)[0]])):
        assert struck.kill(then, at, *command)
        assert struck.finish(again=SOAK)


def test_stopped_by_the_user(job: Job, expected: dict[str, bytes], tmp_path: Path) -> None:
    """The message says how to go on. The same command goes on too, and another one names the unfinished run."""
    out = output_in(tmp_path)
    stop = (
        "import os, signal\nfrom perta_fast.streaming.data_pass import DataPass\noriginal = DataPass.backward\n"
        "def layer(*arguments):\n    os.kill(os.getpid(), signal.SIGINT)\n    return original(*arguments)\n"
        "DataPass.backward = layer\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)"  # ignored where tests run in the background
    )
    done = perta(*arguments(job, out), setup=stop)
    assert done.returncode == 130
    assert f"Finish the run with: perta resume {out}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not out.exists()
    other = perta(*arguments(job, out, "--lam", "0.8"))
    assert other.returncode == 2
    assert f"perta resume {out}" in other.stderr
    again = perta(*arguments(job, out))
    assert again.returncode == 0, again.stderr
    assert contents(out.parent) == expected


def test_a_full_disk(job: Job, expected: dict[str, bytes], calls: list[Point], forks: Forks, tmp_path: Path) -> None:
    """For scratch files and for shards: one line that says what to do, and a run that can be finished."""
    scratch = [at for at, point in enumerate(calls) if point.kind == "write" and "/hidden-" in point.path]
    shards = [at for at, point in enumerate(calls) if point.kind == "write" and point.path.endswith("tensors")]
    for at in (scratch[len(scratch) // 2], shards[-1]):
        out = output_in(tmp_path / str(at))
        faults = Faults("/watched/", kinds=("write",), then="ENOSPC", lasting=True, at=sum_of_writes(calls, at))
        done = forks.perta(*arguments(job, out), faults=faults)
        assert done.returncode == 1
        assert "the disk is full" in done.stderr
        assert done.stderr.count("\n") == 1
        assert finish(job, out, expected)


def sum_of_writes(points: list[Point], at: int) -> int:
    return sum(point.kind == "write" for point in points[:at])


def test_out_of_memory_half_way_back(job: Job, expected: dict[str, bytes], tmp_path: Path) -> None:
    out = output_in(tmp_path)
    starve = (
        "import torch\nfrom perta_fast.streaming.data_pass import DataPass\n"
        "def layer(*arguments):\n    torch.empty(1 << 60, dtype=torch.uint8)\nDataPass.backward = layer"
    )
    done = perta(*arguments(job, out), setup=starve)
    assert done.returncode == 1
    assert "out of memory" in done.stderr and f"perta resume {out}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert finish(job, out, expected)


KILLED_AT_THE_END = """
import os, signal
from perta_fast.streaming.data_pass import DataPass
DataPass.embed_backward = lambda data: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_damaged_before_it_is_resumed(job: Job, tmp_path: Path) -> None:
    out = output_in(tmp_path)
    assert perta(*arguments(job, out), setup=KILLED_AT_THE_END).returncode == -signal.SIGKILL
    files = read_record(partial_path(out) / STATE / WALK)["passes"]["forget"]["files"]
    (gradient,) = (name for name in files if name.startswith("gradient"))
    path = partial_path(out) / STATE / "scratch" / "forget" / gradient
    path.write_bytes(path.read_bytes()[:-1])
    done = perta("resume", out)
    assert done.returncode == 2
    assert f"{path}: is not what the run wrote; start over with --overwrite" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"done": 10_000},
        {"done": -1},
        {"passes": {}},
        {"totals": {"99": {}}},
        {"files": {"../../../../victim": {"dtype": "float32", "shape": [1], "blake3": ""}}},
        {"files": {"hidden-0-0": {"dtype": "nn", "shape": [1], "blake3": ""}}},
    ],
    ids=str,
)
def test_a_record_that_no_run_has_written(change: dict[str, Any], half_done: Path, tmp_path: Path) -> None:
    """It is refused though its hash is right, and no other file is touched."""
    out = tmp_path / "result"
    shutil.copytree(partial_path(half_done), partial_path(out))
    state = partial_path(out) / STATE
    record, job_record = read_record(state / WALK), read_record(state / JOB)
    if "files" in change:
        record["passes"]["forget"] |= change
    else:
        record |= change
    write_record(state / WALK, record)
    write_record(state / JOB, job_record | {"final": str(out), "stream": job_record["stream"] | {"save": ""}})
    (tmp_path / "victim").write_text("precious")
    with pytest.raises(InputError):
        resume(out, progress=False)
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.fixture(scope="module")
def half_done(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = output_in(tmp_path_factory.mktemp("half"))
    assert perta(*arguments(job, out), setup=KILLED_AT_THE_END).returncode == -signal.SIGKILL
    return out


def test_inputs_that_change_meanwhile(tmp_path: Path) -> None:
    """Data files may change, as the run keeps what it has read. Weights may not."""
    job, out = write_job(tmp_path / "job"), output_in(tmp_path)
    assert perta(*arguments(job, out), setup=KILLED_AT_THE_END).returncode == -signal.SIGKILL
    job.forget.unlink()
    job.retain.write_text("no longer JSON")
    shard = next(job.base.glob("*.safetensors"))
    before = shard.stat()
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(InputError, match=f"{shard.name}: has changed since the run began"):
        resume(out, progress=False)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    report = resume(out, progress=False)
    assert report.resumed == 1
    assert report.data["forget"]["samples"] > 0
    assert not verify(out, full=True, progress=False).unchecked[2:]
