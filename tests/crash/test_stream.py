"""A streamed run that is killed in any phase, or meets a full disk, is finished as if nothing had been.

``PERTA_SOAK=1`` kills at every file call; otherwise at a share of them.
"""

import os
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from perta_fast.errors import InputError
from perta_fast.files.durable import read_record, write_record
from perta_fast.files.journal import JOB
from perta_fast.files.new_directory import partial_path
from perta_fast.resuming import resume
from perta_fast.runs.verify import verify
from perta_fast.subtraction.unfinished import STATE, WALK
from tests.crash.shim import Faults, Point, Shim
from tests.support.children import perta
from tests.support.models import Job, write_job

SOAK = os.environ.get("PERTA_SOAK") == "1"
KILLS = 1000 if SOAK else 9


def arguments(job: Job, out: Path, *more: object) -> list[object]:
    model, base, tuned = job.checkpoints
    return [
        *("unlearn", "--stream", "--model", model, "--base", base, "--tuned", tuned, "--quiet"),
        *("--forget", job.forget, "--retain", job.retain, "--rule", "empirical-fisher", "--lam", "0.7"),
        *("--save-importance", out.parent / "kept", "--out", out, *more),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """All that must be the same from run to run: weights, importances, companions."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "perta_report.json"
    }


@pytest.fixture(scope="module")
def expected(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    place = tmp_path_factory.mktemp("whole")
    done = perta(*arguments(job, place / "result"))
    assert done.returncode == 0, done.stderr
    return contents(place)


def place_in(folder: Path) -> Path:
    (folder / "place").mkdir(parents=True)
    return folder / "place" / "result"


def finish(job: Job, out: Path, expected: dict[str, bytes]) -> bool:
    """Finish whatever a run has left; return whether there was something to take up again."""
    resumed = True
    try:
        report = resume(out, progress=False)
        assert report.resumed or report.finished
    except InputError as error:
        assert "there is no unfinished run to resume" in str(error)
        resumed = False
        if not out.exists():
            shutil.rmtree(out.parent)
            out.parent.mkdir()
            assert perta(*arguments(job, out)).returncode == 0
    assert contents(out.parent) == expected
    return resumed


@pytest.fixture(scope="module")
def calls(job: Job, shim: Shim, tmp_path_factory: pytest.TempPathFactory) -> list[Point]:
    out = place_in(tmp_path_factory.mktemp("count"))
    return shim.count(*arguments(job, out), path="/place/")


def steps_recorded(points: list[Point]) -> list[int]:
    return [at for at, point in enumerate(points) if point.kind == "rename" and point.target.endswith(WALK)]


def test_killed_in_every_phase(
    job: Job, expected: dict[str, bytes], calls: list[Point], shim: Shim, tmp_path: Path
) -> None:
    recorded = steps_recorded(calls)
    layers = sum("hidden-" in point.path and point.kind == "unlink" for point in calls) // 2 - 1
    assert len(recorded) == 2 * layers + 3  # a record after each part, forward and back
    ways = [(then, at) for at in range(len(calls)) for then in ("kill before", "kill after", "torn")]
    begin = random.Random(time.strftime("%Y%m%d")).random()
    step = max(1.0, len(ways) / KILLS)
    chosen = [ways[int((begin + k) * step)] for k in range(int(len(ways) / step))]

    one_at_a_time = threading.Lock()

    def strike(way: tuple[str, int]) -> tuple[int, bool]:
        then, at = way
        out = place_in(tmp_path / f"{then} {at}")
        done = shim.perta(*arguments(job, out), faults=Faults("/place/", then=then, at=at))
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        with one_at_a_time:  # transformers sets torch's default type while it builds a model
            resumed = finish(job, out, expected)
        shutil.rmtree(tmp_path / f"{then} {at}")
        return done.returncode, resumed or at < recorded[0]

    with ThreadPoolExecutor(2) as pool:
        statuses = list(pool.map(strike, chosen))
    assert [status for status, _ in statuses].count(-signal.SIGKILL) > 0.9 * len(statuses)
    assert all(taken_up for status, taken_up in statuses if status)


def test_stopped_by_the_user(job: Job, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Ctrl-C says how to go on; the same command again goes on too, and another one is told about the first."""
    out = place_in(tmp_path)
    stop = (
        "import os, signal\nfrom perta_fast.streaming.data_pass import DataPass\noriginal = DataPass.layer\n"
        "def layer(*arguments):\n    os.kill(os.getpid(), signal.SIGINT)\n    return original(*arguments)\n"
        "DataPass.layer = layer\n"
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


def test_a_full_disk(
    job: Job, expected: dict[str, bytes], calls: list[Point], shim: Shim, tmp_path: Path
) -> None:
    """In the spill and in the shards: one line that says what to do, then the run can be finished."""
    spilled = [at for at, point in enumerate(calls) if point.kind == "write" and "/hidden-" in point.path]
    shards = [at for at, point in enumerate(calls) if point.kind == "write" and point.path.endswith("tensors")]
    for at in (spilled[len(spilled) // 2], shards[-1]):
        out = place_in(tmp_path / str(at))
        faults = Faults("/place/", kinds=("write",), then="ENOSPC", lasting=True, at=sum_of_writes(calls, at))
        done = shim.perta(*arguments(job, out), faults=faults)
        assert done.returncode == 1
        assert "the disk is full" in done.stderr
        assert done.stderr.count("\n") == 1
        assert finish(job, out, expected)


def sum_of_writes(points: list[Point], at: int) -> int:
    return sum(point.kind == "write" for point in points[:at])


def test_out_of_memory_half_way_back(job: Job, expected: dict[str, bytes], tmp_path: Path) -> None:
    out = place_in(tmp_path)
    starve = (
        "import torch\nfrom perta_fast.streaming.data_pass import DataPass\n"
        "def layer(*arguments):\n    torch.empty(1 << 60, dtype=torch.uint8)\nDataPass.layer = layer"
    )
    done = perta(*arguments(job, out), setup=starve)
    assert done.returncode == 1
    assert "out of memory" in done.stderr and f"perta resume {out}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert finish(job, out, expected)


KILLED_AT_THE_END = """
import os, signal
from perta_fast.streaming.data_pass import DataPass
DataPass.end = lambda data: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_damaged_before_it_is_resumed(job: Job, tmp_path: Path) -> None:
    out = place_in(tmp_path)
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
    """Refused, whoever wrote it and its hash; nothing outside is touched."""
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
    out = place_in(tmp_path_factory.mktemp("half"))
    assert perta(*arguments(job, out), setup=KILLED_AT_THE_END).returncode == -signal.SIGKILL
    return out


def test_inputs_that_change_meanwhile(tmp_path: Path) -> None:
    """Data files may: what was read of them is kept. Weights may not."""
    job, out = write_job(tmp_path / "job"), place_in(tmp_path)
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
