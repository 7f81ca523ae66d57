"""A run of ``perta apply`` that is killed, or whose file calls fail, leaves its inputs intact and can be finished.

With ``PERTA_SOAK=1`` it is struck at every file call in every way and at many random instants, else at some of them.
"""

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from blake3 import blake3

from perta_fast.errors import InputError
from perta_fast.records.file_hashes import read_hashes
from perta_fast.resuming import resume
from perta_fast.subtraction import compute as subtraction
from perta_fast.subtraction import in_place
from perta_fast.subtraction.journal_directory import is_open
from tests.crash.forks import Forks
from tests.crash.shim import CHANGES, SIZED, Faults, Point, Shim
from tests.support.children import perta
from tests.support.inputs import BF16, F32, write_inputs

SOAK = os.environ.get("PERTA_SOAK") == "1"
SMALL = """
from perta_fast.subtraction import compute, in_place
compute.CHUNK, in_place.SEGMENT = 64, 700
"""
IMPORTED = (
    *("numpy", "blake3", "perta_fast._C", "perta_fast.cli", "perta_fast.cli.inspect", "perta_fast.runs.apply"),
    *("perta_fast.subtraction.in_place", "perta_fast.subtraction.to_directory", "perta_fast.resuming"),
)
CONFIG = {"model_type": "llama", "hidden_size": 5}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks and many segments, in this process too."""
    monkeypatch.setattr(subtraction, "CHUNK", 64)
    monkeypatch.setattr(in_place, "SEGMENT", 700)


@dataclass(frozen=True)
class World:
    """The inputs of a run, its kind ("out" or "in-place"), where it is forked, and what it must write."""

    inputs: Path
    kind: str
    forks: Forks
    expected: dict[str, bytes]  # shards and companions, by name

    @property
    def original(self) -> dict[str, bytes]:
        """The files of the model."""
        return {path.name: path.read_bytes() for path in (self.inputs / "model").iterdir()}

    def prepare(self, folder: Path) -> Path:
        """Make a directory ``watched`` for one run; returns the directory that the run makes or changes."""
        watched = folder / "watched"
        watched.mkdir(parents=True)
        if self.kind == "in-place":
            shutil.copytree(self.inputs / "model", watched / "result")
        return watched / "result"

    def arguments(self, result: Path) -> list[object]:
        model = self.inputs / "model" if self.kind == "out" else result
        destination = ["--out", result] if self.kind == "out" else ["--in-place"]
        return [
            *("apply", "--model", model, "--base", self.inputs / "base", "--tuned", self.inputs / "tuned"),
            *("--forget-importance", self.inputs / "forget", "--retain-importance", self.inputs / "retain"),
            *("--rule", "fisher", "--lam", "0.7", "--threads", "2", "--quiet", *destination),
        ]

    def count(self, folder: Path, kinds: tuple[str, ...] = CHANGES) -> list[Point]:
        """The file calls of a run without faults. folder: where it runs."""
        result = self.prepare(folder / "count")
        return self.forks.count(*self.arguments(result), path="/watched/", log=folder / "log", kinds=kinds)

    def finish(self, result: Path) -> None:
        """Finish the run from what is on the disk, and check its result."""
        if self.kind == "in-place" and is_open(result):
            assert self.forks.perta("inspect", result).returncode == 2  # no command takes it for a model
        try:
            resume(result, progress=False)
        except InputError as error:
            assert "there is no unfinished run to resume" in str(error)
            assert not (result / ".perta-journal").exists()
            if self.kind == "out":  # nothing is visible, or all of it
                assert not result.exists() or (result / "perta_report.json").exists()
            if not (result / "perta_report.json").exists():
                if self.kind == "in-place":
                    files = {path.name: path.read_bytes() for path in result.iterdir() if path.is_file()}
                    assert files == self.original
                done = self.forks.perta(*self.arguments(result))
                assert done.returncode == 0, done.stderr
        self.check(result)

    def check(self, result: Path) -> None:
        assert [path.name for path in result.parent.iterdir()] == ["result"]
        assert not (result / ".perta-journal").exists()
        files = {path.name: path.read_bytes() for path in result.iterdir() if path.is_file()}
        del files["perta_files.b3"]
        assert read_hashes(result) == {name: blake3(content).hexdigest() for name, content in files.items()}
        report = json.loads(files.pop("perta_report.json"))
        assert report["finished"] and len(report["tensors"]) == 9
        assert files.pop("README.md").count(b"## Unlearned with perta_fast") == 1
        assert files == self.expected


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crash")
    write_inputs(folder, (BF16, BF16, BF16, F32, F32), shards=2)
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def forks(shim: Shim) -> Iterator[Forks]:
    with Forks(shim.library, IMPORTED, SMALL) as forks:
        yield forks


@pytest.fixture(scope="module", params=["out", "in-place"])
def world(
    request: pytest.FixtureRequest, inputs: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> World:
    world = World(inputs, "out", forks, {})
    result = world.prepare(tmp_path_factory.mktemp("whole"))
    done = perta(*world.arguments(result))
    assert done.returncode == 0, done.stderr
    apart = ("README.md", "perta_report.json", "perta_files.b3")
    names = [path.name for path in result.iterdir() if path.name not in apart]
    return World(inputs, request.param, forks, {name: (result / name).read_bytes() for name in names})


def share(points: list[tuple[str, int]], number: int) -> list[tuple[str, int]]:
    """All points in a soak, else ``number`` of them, evenly spread: the same every time."""
    if SOAK or len(points) <= number:
        return points
    return [points[(2 * k + 1) * len(points) // (2 * number)] for k in range(number)]


def test_killed_at_any_point(world: World, tmp_path: Path) -> None:
    """Before and after every file call, and in the middle of those that move bytes."""
    counted = world.count(tmp_path)
    assert {"write", "fsync", "rename"} <= {point.kind for point in counted}
    ways = [(then, at) for at in range(len(counted)) for then in ("kill before", "kill after")]
    ways += [("torn", at) for at, point in enumerate(counted) if point.kind in SIZED]
    statuses = []
    for then, at in share(sorted(ways), 45):
        result = world.prepare(tmp_path / f"{then} {at}")
        done = world.forks.perta(*world.arguments(result), faults=Faults("/watched/", then=then, at=at))
        assert done.returncode in (0, -9), done.stderr  # threads may make a call or two less
        world.finish(result)
        statuses.append(done.returncode)
    assert statuses.count(-9) > len(statuses) * 0.9


def test_killed_again_while_it_is_finished(world: World, tmp_path: Path) -> None:
    counted = len(world.count(tmp_path))
    draw = random.Random(0)
    for number in range(200 if SOAK else 8):
        result = world.prepare(tmp_path / str(number))
        command = world.arguments(result)
        for _ in range(3):
            faults = Faults("/watched/", then="kill before", at=draw.randrange(counted))
            done = world.forks.perta(*command, faults=faults)
            assert done.returncode in (0, 2, -9), done.stderr  # 2: there was nothing to resume
            command = ["resume", result, "--quiet"]
        world.finish(result)


def test_killed_at_any_instant(world: World, tmp_path: Path) -> None:
    """Not at a file call, but some time after one."""

    def killed(number: str, dots: int) -> CompletedProcess[str]:
        result = world.prepare(tmp_path / number)
        done = world.forks.perta(*world.arguments(result), dots=dots)
        world.finish(result)
        return done

    whole = killed("whole", 1 << 20)
    dots = len(whole.stdout)
    assert whole.returncode == 0 and dots > 50
    draw = random.Random(1)
    statuses = [killed(str(number), draw.randrange(dots)).returncode for number in range(1000 if SOAK else 12)]
    assert statuses.count(-9) > len(statuses) / 2


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EROFS"])
def test_struck_by_an_error(error: str, world: World, tmp_path: Path) -> None:
    """Exit status 1, one line that says what to do, and a run that can be finished."""
    kinds = CHANGES[:-1]  # removing files works
    counted = world.count(tmp_path, kinds)
    for _, at in share([(error, at) for at in range(len(counted))], 8):
        result = world.prepare(tmp_path / str(at))
        faults = Faults("/watched/", then=error, at=at, lasting=True, kinds=kinds)
        done = world.forks.perta(*world.arguments(result), faults=faults)
        assert done.returncode in (0, 1), done.stderr
        if done.returncode == 1:
            assert done.stderr.startswith("perta: error: ")
            assert done.stderr.count("\n") == 1
            if world.kind == "in-place" and is_open(result):
                assert f"perta resume {result}" in done.stderr
        world.finish(result)


def test_short_writes_change_nothing(world: World, tmp_path: Path) -> None:
    result = world.prepare(tmp_path / "short")
    faults = Faults("/watched/", then="short", lasting=True)
    done = world.forks.perta(*world.arguments(result), faults=faults)
    assert done.returncode == 0, done.stderr
    world.check(result)


def test_an_input_that_cannot_be_read(world: World, tmp_path: Path) -> None:
    """The disk with an input fails: the message names the file, and the run can be finished when the disk works."""
    for at in (0, 1, 9, 30):
        result = world.prepare(tmp_path / str(at))
        faults = Faults("/tuned/", kinds=("read",), then="EIO", at=at, lasting=True)
        done = world.forks.perta(*world.arguments(result), faults=faults)
        assert done.returncode in (1, 2)
        assert "/tuned" in done.stderr
        assert "Input/output error" in done.stderr
        assert done.stderr.count("\n") == 1
        world.finish(result)
