"""Streamed sweeps that were stopped: nothing is done twice, and the outcome is that of one run."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from perta_fast import InputError, Interrupted, RunError, Sweep, cli, resume, sweep
from perta_fast.files.durable import read_record, write_record
from perta_fast.files.new_directory import PRECONDITIONING_RECORD, PRECONDITIONING_STATE, SWEEP_STATE, partial_path
from perta_fast.preconditioning.record import Preconditioning
from perta_fast.preconditioning.unfinished import Begun
from perta_fast.runs import estimate, making_tuned
from perta_fast.streaming import scratch_files
from perta_fast.streaming.forward import score_walk
from perta_fast.streaming.kept_walk import KeptWalk
from perta_fast.subtraction import in_place
from perta_fast.sweeping import chosen_checkpoint, unfinished
from perta_fast.sweeping import run as sweeping_run
from tests.support.checkpoints import fingerprint, read_checkpoint, same_bytes
from tests.support.children import perta, signal_at
from tests.support.models import RETAIN, Job, llama, write_job, write_lines
from tests.sweeping.test_streamed import plain

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {
    "rule": ["fisher", "preconditioned"],
    "mu": [1, 10],
    "lams": [2, 8],
    "target_retain_loss": 100.0,
    "batch_size": 4,
    "stream": True,
    "progress": False,
}
PARTS = 4  # embedding, two layers, head
VERSIONS = 1 + 3 * 2  # the model as it is, and two strengths on three curves
STEPS = PARTS * (1 + VERSIONS)  # the model as it is has a walk of its own, then does not walk again


class DiskUsage(NamedTuple):
    """As shutil has it."""

    total: int
    used: int
    free: int


class Killed(BaseException):
    """In place of a signal: nothing that catches errors catches it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_job(folder, torch.float32)
    return folder


@pytest.fixture
def home(place: Path, tmp_path: Path) -> Job:
    """A copy that a test may change."""
    folder = Path(shutil.copytree(place, tmp_path / "home"))
    return Job(*(folder / name for name in ("model", "base", "tuned", "forget.jsonl", "retain.jsonl")))


def run(job: Job, **changes: Any) -> Sweep:
    folder = job.model.parent.parent
    places = {"out": folder / "out", "checkpoint": folder / "chosen"}
    return sweep(*job.checkpoints, job.forget, job.retain, **SETTINGS | places | changes)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Path]:
    """What is found without a stop, and the checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    job = Job(*(place / name for name in ("model", "base", "tuned", "forget.jsonl", "retain.jsonl")))
    return run(job, out=folder / "out", checkpoint=folder / "chosen"), folder / "chosen"


def assert_same(found: Sweep, whole: tuple[Sweep, Path], checkpoint: Path) -> None:
    """The outcome of an uninterrupted sweep, but for times, in memory and on the disk."""
    expected, made = whole
    out = checkpoint.parent.parent / "out" if checkpoint.name == "model" else checkpoint.parent / "out"
    assert [replace(row, seconds=0.0) for row in found.rows] == [replace(row, seconds=0.0) for row in expected.rows]
    assert Sweep.read(out / "sweep.json").rows == found.rows
    one, other = read_checkpoint(checkpoint), read_checkpoint(made)
    assert one.keys() == other.keys() and all(same_bytes(one[name], other[name]) for name in one)
    assert [path.name for path in out.iterdir()] == ["sweep.json"]
    assert not [path for path in checkpoint.parent.rglob(".*perta*") if path.name != ".perta-hashes"]


class Doings:
    """Counts what is done, and stops at one point: ``stop_at`` is a kind and how many of it are done first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = {"estimate": 0, "make": 0, "step": 0}
        self.stop_at: tuple[str, int] | None = None
        self.error: BaseException = Killed()
        watched: dict[str, tuple[Any, str]] = {
            "estimate": (estimate, "estimate_on"),
            "make": (making_tuned.Making, "run"),
            "step": (score_walk._ScoreWalk, "record"),
        }
        for kind, (owner, name) in watched.items():
            monkeypatch.setattr(owner, name, self._counted(kind, getattr(owner, name)))

    def _counted(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **settings: Any) -> Any:
            if self.stop_at == (kind, self.counts[kind]):
                raise self.error
            result = call(*arguments, **settings)
            self.counts[kind] += 1
            return result

        return counted

    def again(self) -> dict[str, int]:
        """What was done; from now on as in a new process."""
        done, self.stop_at = dict(self.counts), None
        self.counts.update(dict.fromkeys(self.counts, 0))
        return done


@pytest.fixture
def doings(monkeypatch: pytest.MonkeyPatch) -> Doings:
    return Doings(monkeypatch)


def resumed(out: Path) -> Sweep:
    found = resume(out, progress=False)
    assert isinstance(found, Sweep)
    return found


def add(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {kind: one[kind] + other[kind] for kind in one}


ALL = {"estimate": 2, "make": 2, "step": STEPS - PARTS}


POINTS = [("step", 1), ("estimate", 0), ("estimate", 1), ("make", 0), ("make", 1)]
POINTS += [("step", PARTS + k) for k in range(1, STEPS - 2 * PARTS, 8)]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_killed_at_any_step(point: tuple[str, int], home: Job, whole: tuple[Sweep, Path], doings: Doings) -> None:
    before = fingerprint(home.model.parent)
    doings.stop_at = point
    with pytest.raises(Killed):
        run(home)
    done = doings.again()
    folder = home.model.parent.parent
    found = run(home) if point[1] % 2 else resumed(folder / "out")
    assert add(done, doings.counts) == ALL
    assert_same(found, whole, folder / "chosen")
    assert fingerprint(home.model.parent) == before


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [3, 17])
def test_killed_by_a_signal(earlier: int, home: Job, whole: tuple[Sweep, Path], doings: Doings) -> None:
    """That no process can catch, while a step is recorded."""
    folder = home.model.parent.parent
    setup = 'import sys\nsys.modules["matplotlib.figure"] = None\n'
    setup += signal_at("SIGKILL", "streaming.forward.score_walk.record_step", earlier=earlier)
    done = perta(*arguments(home, folder), setup=setup)
    assert done.returncode == -9, done.stderr
    assert cli.main(["resume", str(folder / "out"), "--quiet"]) == 0
    assert 0 < doings.counts["step"] <= ALL["step"] - earlier
    assert_same(Sweep.read(folder / "out" / "sweep.json"), whole, folder / "chosen")


def walk_stopped(home: Job, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep that was stopped in the walk for its second θ_f; returns where that walk has kept its state."""
    keep, seen = KeptWalk.keep, list[float]()

    def stop_later(kept: KeptWalk, begun: Any) -> None:
        keep(kept, begun)
        seen.append(begun.settings["‹mu›"])
        if len(seen) == 3:
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(KeptWalk, "keep", stop_later)
        run(home)
    assert seen == [1, 1, 10]
    state = partial_path(home.model.parent.parent / "out") / SWEEP_STATE / "tuned.partial" / PRECONDITIONING_STATE
    assert Begun.load(state) is not None
    return state


@pytest.mark.parametrize("damage", ["", "record", "layer", "other"])
def test_stopped_in_the_walk_for_a_vector(
    damage: str, home: Job, whole: tuple[Sweep, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on at its layer; a walk whose files are damaged, or of other work, begins again."""
    state, kept = walk_stopped(home, monkeypatch), list[int]()
    if damage == "record":
        (state / PRECONDITIONING_RECORD).write_text("{}")
    elif damage == "layer":
        next(state.parent.glob("mu-*/model-00000.safetensors")).write_bytes(b"")
    elif damage == "other":
        record = read_record(state / PRECONDITIONING_RECORD)
        write_record(state / PRECONDITIONING_RECORD, record | {"day": "2020-01-01"})
    keep = KeptWalk.keep

    def counted(walk: KeptWalk, begun: Any) -> None:
        kept.append(begun.done)
        keep(walk, begun)

    monkeypatch.setattr(KeptWalk, "keep", counted)
    folder = home.model.parent.parent
    assert_same(resumed(folder / "out"), whole, folder / "chosen")
    assert kept == ([1, 2] if damage else [2])


def arguments(job: Job, folder: Path) -> list[object]:
    return [
        *("sweep", "--model", job.model, "--base", job.base, "--tuned", job.tuned, "--forget", job.forget),
        *("--retain", job.retain, "--rules", "fisher,preconditioned", "--mus", "1,10", "--lams", "2,8"),
        *("--target-retain-loss", 100, "--batch-size", 4, "--stream"),
        *("--out", folder / "out", "--checkpoint", folder / "chosen", "--quiet"),
    ]


def test_interrupted(home: Job, whole: tuple[Sweep, Path], doings: Doings) -> None:
    doings.stop_at, doings.error = ("step", PARTS + 3), KeyboardInterrupt()
    with pytest.raises(Interrupted, match=r"what was scored is kept\. Go on with: perta resume .*/out$"):
        run(home)
    doings.again()
    folder = home.model.parent.parent
    assert_same(resumed(folder / "out"), whole, folder / "chosen")


def test_a_full_disk(home: Job, whole: tuple[Sweep, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """When hidden states are written: what is done stays, and the sweep goes on where there is room."""
    write = scratch_files.write_fully

    def full(descriptor: int, data: memoryview, offset: int) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if "walks" in path and "hidden-2" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor, data, offset)

    message = r"the disk is full.*finish it with: perta resume"
    with monkeypatch.context() as patched, pytest.raises(RunError, match=message):
        patched.setattr(scratch_files, "write_fully", full)
        run(home)
    doings = Doings(monkeypatch)
    folder = home.model.parent.parent
    found = resumed(folder / "out")
    assert doings.counts["estimate"] == doings.counts["make"] == 0
    assert 0 < doings.counts["step"] < PARTS * (VERSIONS - 1)
    assert_same(found, whole, folder / "chosen")


def test_too_small_a_disk_is_said_before(home: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10**6, 10**6, 1000))
    with pytest.raises(InputError, match=r"the disk has 950 B for the result .* scratch files of at least"):
        run(home, rule="tv", mu=None)
    assert sorted(path.name for path in home.model.parent.parent.iterdir()) == ["home"]


def other_rows(job: Job) -> None:
    write_lines(job.retain, RETAIN[1:])


def other_weights(job: Job) -> None:
    llama(5).save_pretrained(job.tuned, max_shard_size="40KB")


@pytest.mark.parametrize("change", [other_rows, other_weights])
@pytest.mark.parametrize("way", ["call", "resume"])
def test_changed_inputs_are_refused(change: Callable[[Job], None], way: str, home: Job, doings: Doings) -> None:
    doings.stop_at = ("step", PARTS + 9)
    with pytest.raises(Killed):
        run(home)
    doings.again()
    change(home)
    before = fingerprint(home.model.parent.parent)
    with pytest.raises(InputError, match="has changed since the sweep began; put the old file back"):
        run(home) if way == "call" else resume(home.model.parent.parent / "out", progress=False)
    assert fingerprint(home.model.parent.parent) == before
    assert not any(doings.counts.values())


def test_an_input_that_goes_meanwhile(home: Job, whole: tuple[Sweep, Path], doings: Doings) -> None:
    """What was done is no less true."""
    doings.stop_at, doings.error = ("step", PARTS + 9), InputError("tuned: no such directory")
    with pytest.raises(RunError, match=r"tuned: no such directory\. What was scored is kept; go on with: perta resume"):
        run(home)
    doings.again()
    assert_same(run(home), whole, home.model.parent.parent / "chosen")
    assert 0 < doings.counts["step"] < ALL["step"]


# In place.


def stop(*arguments: Any, **settings: Any) -> None:
    raise Killed


@pytest.mark.parametrize("stream", [True, False])
def test_in_place(stream: bool, home: Job, whole: tuple[Sweep, Path]) -> None:
    """The model becomes what the checkpoint would have been, and its report says by which sweep."""
    found = run(home, checkpoint=None, in_place=True, stream=stream)
    report = json.loads((home.model / "perta_report.json").read_text())
    assert report["in_place"] and report["settings"]["sweep"] == str(home.model.parent.parent / "out")
    if stream:
        assert_same(found, whole, home.model)
    else:
        assert list(map(plain, found.rows)) == list(map(plain, whole[0].rows))


IN_PLACE: dict[str, tuple[Any, str]] = {
    "before the record": (unfinished.Record, "save"),
    "before the run": (chosen_checkpoint, "apply_sources"),
    "rehearsing": (in_place, "_rehearse"),
    "before the change": (in_place, "_change"),
    "before the end": (in_place, "write_model_card"),
    "after the run": (sweeping_run.OutputDirectory, "commit"),
}
WAYS = [(where, "call") for where in IN_PLACE]
WAYS += [("before the change", "resume"), ("before the end", "resume"), ("after the run", "resume")]
WAYS += [("before the end", "model first")]


@pytest.mark.parametrize(("where", "way"), WAYS)
def test_stopped_while_the_model_is_changed(
    where: str, way: str, home: Job, whole: tuple[Sweep, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep is finished, and nothing is scored again."""
    owner, name = IN_PLACE[where]
    folder = home.model.parent.parent
    with monkeypatch.context() as patched, pytest.raises(Killed):
        if where == "before the record":
            save = unfinished.Record.save
            patched.setattr(owner, name, lambda record: stop() if record.begun.applying else save(record))
        elif where == "after the run":
            commit = owner.commit
            patched.setattr(owner, name, lambda made: stop() if made.final.name == "out" else commit(made))
        else:
            patched.setattr(owner, name, stop)
        run(home, checkpoint=None, in_place=True)
    assert not (folder / "out").exists()
    doings = Doings(monkeypatch)
    if way == "model first" and in_place.is_open(home.model):
        resume(home.model, progress=False)
    found = run(home, checkpoint=None, in_place=True) if way == "call" else resumed(folder / "out")
    assert not any(doings.counts.values())
    assert_same(found, whole, home.model)


def test_a_model_that_another_run_has_changed(home: Job, doings: Doings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for the sweep's own."""
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(chosen_checkpoint, "apply_sources", stop)
        run(home, checkpoint=None, in_place=True)
    shutil.rmtree(home.model)
    llama(5).save_pretrained(home.model, max_shard_size="40KB")
    with pytest.raises(InputError, match="has changed since the sweep began"):
        run(home, checkpoint=None, in_place=True)


@pytest.mark.parametrize("where", ["before the record", "before the run", "rehearsing"])
def test_a_record_alone_changes_no_model(where: str, home: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come from elsewhere: the command that began the sweep has to be given again."""
    owner, name = IN_PLACE[where]
    before = fingerprint(home.model)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        save = unfinished.Record.save
        later = (
            (lambda record: stop() if record.begun.applying else save(record)) if owner is unfinished.Record else stop
        )
        patched.setattr(owner, name, later)
        run(home, checkpoint=None, in_place=True)
    with pytest.raises(
        InputError, match=r"to change .*model in place, and has not begun to; go on with the command that"
    ):
        resume(home.model.parent.parent / "out")
    assert {name: known for name, known in fingerprint(home.model).items() if name in before} == before


def test_links_are_refused_before_anything_is_scored(home: Job, doings: Doings) -> None:
    shard = next(home.model.glob("*.safetensors"))
    shard.rename(shard.with_suffix(".away"))
    shard.symlink_to(shard.with_suffix(".away"))
    with pytest.raises(InputError, match="is a link to a file that others may use"):
        run(home, checkpoint=None, in_place=True)
    assert not any(doings.counts.values())


@pytest.mark.parametrize("result", ["checkpoint", "in place"])
def test_an_input_that_changes_while_settings_are_scored(
    result: str, home: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is made of bytes that were not scored."""
    shard = sorted(home.tuned.glob("*.safetensors"))[-1]
    score, before = sweeping_run._score, fingerprint(home.model)

    def changing(*arguments: Any) -> Any:
        found = score(*arguments)
        os.utime(shard, ns=(1, 1))
        return found

    monkeypatch.setattr(sweeping_run, "_score", changing)
    with pytest.raises(RunError, match=f"{shard.name}: has changed during the run"):
        run(home, **({} if result == "checkpoint" else {"checkpoint": None, "in_place": True}))
    assert fingerprint(home.model) == before
    assert sorted(path.name for path in home.model.parent.parent.iterdir() if path.name in ("out", "chosen")) == []


def test_no_setting_is_better(home: Job) -> None:
    before = fingerprint(home.model)
    with pytest.raises(RunError, match="model: not changed: nothing that was tried keeps the bound"):
        run(
            home,
            checkpoint=None,
            in_place=True,
            target_retain_loss=None,
            max_retain_rise=0.0,
            lams=[16],
            rule="tv",
            mu=None,
        )
    assert fingerprint(home.model) == before
    assert (home.model.parent.parent / "out" / "sweep.json").exists()


def test_a_theta_f_is_made_once(home: Job, doings: Doings) -> None:
    """One mu at a time: each is kept as soon as it is there."""
    doings.stop_at = ("make", 1)
    with pytest.raises(Killed):
        run(home)
    made = list((home.model.parent.parent / ".out.perta-partial" / ".perta-sweep" / "tuned").iterdir())
    assert [Preconditioning.read(path).in_report().mu for path in made] == [1.0]
