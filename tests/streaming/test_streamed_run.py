"""A streamed run gives what importances on disk and a subtraction after them give, however it is scheduled."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perta_fast import Importance, InputError, RunError, resume, unlearn, verify
from perta_fast.errors import NotFiniteError
from perta_fast.records.report import Report
from perta_fast.rules import RULES
from perta_fast.streaming import write_behind
from perta_fast.streaming.data_pass import DataPass
from perta_fast.streaming.forecast import choice as planning
from perta_fast.streaming.schedule import Schedule
from perta_fast.streaming.scratch_files import ScratchFiles, StepFiles
from perta_fast.streaming.walk import Step, steps_of, steps_per_sample
from perta_fast.streaming.write_behind import WriteBehind
from tests.support.checkpoints import read_checkpoint
from tests.support.models import Job, write_job

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULES = [
    Schedule(2, overlap=False),
    Schedule(2, every=2),
    Schedule(2, every=3),
    Schedule(2, every=9, overlap=False),
    Schedule(2, groups=2),
    Schedule(2, every=2, groups=3),
    Schedule(2, groups=5, overlap=False),  # more groups than batches
]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Five layers."""
    return write_job(tmp_path_factory.mktemp("deep"), torch.float32, num_hidden_layers=5)


@pytest.fixture
def scheduled(monkeypatch: pytest.MonkeyPatch) -> Callable[[Schedule], None]:
    def choose(schedule: Schedule) -> None:
        monkeypatch.setattr(planning, "schedule_for", lambda *_: schedule)

    return choose


def run(job: Job, out: Path, **settings: object) -> Report:
    given: dict[str, Any] = {
        "rule": "fisher",
        "lam": 0.7,
        "batch_size": 2,
        "check": False,
        "progress": False,
    } | settings
    return unlearn(*job.checkpoints, job.forget, job.retain, out=out, **given)


def assert_same_weights(first: Path, second: Path) -> None:
    expected, found = read_checkpoint(first), read_checkpoint(second)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("at", ["base", "model"])
def test_the_same_bits(rule: str, at: str, job: Job, tmp_path: Path) -> None:
    for name, stream in (("memory", False), ("stream", True)):
        run(job, tmp_path / name, rule=rule, at=at, stream=stream)
    assert_same_weights(tmp_path / "memory", tmp_path / "stream")


@pytest.mark.parametrize("rule", ["grad", "empirical-fisher"])
def test_every_schedule(rule: str, deep: Job, scheduled: Callable[[Schedule], None], tmp_path: Path) -> None:
    run(deep, tmp_path / "memory", rule=rule)
    for number, schedule in enumerate(SCHEDULES):
        scheduled(schedule)
        run(deep, tmp_path / "streamed" / str(number), rule=rule, stream=True)
        assert_same_weights(tmp_path / "memory", tmp_path / "streamed" / str(number))
    assert {path.name for path in tmp_path.iterdir()} == {"memory", "streamed"}
    assert len(list((tmp_path / "streamed").iterdir())) == len(SCHEDULES)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_is_written_when_the_device_has_done_it(
    overlap: bool, job: Job, scheduled: Callable[[Schedule], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the writing thread has a stream of its own."""
    log: list[str] = []
    write = WriteBehind._write

    def written(writing: WriteBehind, means: list[Any]) -> None:
        log.append("written")
        write(writing, means)

    monkeypatch.setattr(WriteBehind, "_write", written)
    done = SimpleNamespace(synchronize=lambda: log.append("done"))
    monkeypatch.setattr(write_behind, "_work_given_to", lambda device: done)
    scheduled(Schedule(2, overlap=overlap))
    run(job, tmp_path / "out", stream=True)
    assert "written" in log
    assert all(log[k - 1] == "done" for k, entry in enumerate(log) if entry == "written")


def test_what_a_gpu_was_given_is_an_event_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    assert write_behind._work_given_to(torch.device("cpu")) is None
    recorded: list[object] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=recorded.append))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    assert write_behind._work_given_to(torch.device("cuda:1")) is not None
    assert recorded == ["the stream of cuda:1"]


@pytest.mark.parametrize("rule", ["grad", "empirical-fisher"])
def test_what_a_record_names_is_not_written_again(
    rule: str, job: Job, scheduled: Callable[[Schedule], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed while it writes has every file of the record as it was."""
    end_step, write = ScratchFiles.end_step, ScratchFiles._write
    named: dict[ScratchFiles, set[str]] = {}
    written = []

    def ended(scratch: ScratchFiles) -> StepFiles:
        files = end_step(scratch)
        named[scratch] = set(files.files)
        return files

    def checked(scratch: ScratchFiles, name: str, *rest: Any) -> None:
        assert name not in named.get(scratch, ()), name
        written.append(name)
        write(scratch, name, *rest)

    monkeypatch.setattr(ScratchFiles, "end_step", ended)
    monkeypatch.setattr(ScratchFiles, "_write", checked)
    scheduled(Schedule(2, every=2, groups=3))
    run(job, tmp_path / "out", rule=rule, stream=True)
    assert "probe-0" in written and len(named) == 2


@pytest.mark.parametrize("schedule", [Schedule(2), Schedule(2, groups=3)], ids=str)
@pytest.mark.parametrize("rule", ["grad", "empirical-fisher"])
def test_a_tied_head(schedule: Schedule, rule: str, scheduled: Callable[[Schedule], None], tmp_path: Path) -> None:
    """Its sum is taken in another order: to 1e-6 of the largest change."""
    job = write_job(tmp_path / "job", torch.float32, tie_word_embeddings=True)
    run(job, tmp_path / "memory", rule=rule, save_importance=tmp_path / "kept memory")
    scheduled(schedule)
    run(job, tmp_path / "stream", rule=rule, stream=True, save_importance=tmp_path / "kept stream")
    for role in ("forget", "retain"):
        expected, found = (Importance.load(tmp_path / f"kept {way}" / role) for way in ("memory", "stream"))
        assert expected.tensors.keys() == found.tensors.keys()
        for name, tensor in expected.tensors.items():
            error = (found.tensors[name] - tensor).norm() / tensor.norm()
            assert error <= (1e-6 if name == "model.embed_tokens.weight" else 0), name


@pytest.mark.parametrize("schedule", [Schedule(2), Schedule(2, every=2, groups=2)], ids=str)
def test_importances_that_are_kept(
    schedule: Schedule, deep: Job, scheduled: Callable[[Schedule], None], tmp_path: Path
) -> None:
    run(deep, tmp_path / "memory", save_importance=tmp_path / "kept memory")
    scheduled(schedule)
    report = run(deep, tmp_path / "stream", stream=True, save_importance=tmp_path / "kept stream")
    for role in ("forget", "retain"):
        folders = [tmp_path / f"kept {way}" / role for way in ("memory", "stream")]
        first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
        assert first == second
    assert {"forget_importance", "retain_importance"} <= report.inputs.keys()
    result = verify(tmp_path / "stream", full=True, progress=False)
    assert not result.problems and not result.unchecked
    assert result.recomputed == len(report.tensors)


def test_what_the_report_says(job: Job, tmp_path: Path) -> None:
    expected = run(job, tmp_path / "memory", rule="empirical-fisher")
    report = run(job, tmp_path / "stream", rule="empirical-fisher", stream=True)
    assert report.settings == expected.settings | {"stream": True, "schedule": asdict(Schedule(2))}
    assert report.data == expected.data
    assert report.counts == expected.counts
    assert report.importance == expected.importance
    for found, row in zip(report.tensors, expected.tensors, strict=True):
        assert (found.name, found.action, found.changed) == (row.name, row.action, row.changed)
    seconds = report.overlap
    assert all(value >= 0 for value in seconds.values())
    for kind in ("read", "write"):
        assert seconds[f"{kind}_hidden_seconds"] <= seconds[f"{kind}_seconds"]
    assert "hidden" in report.summary()


def test_in_place(job: Job, tmp_path: Path) -> None:
    """The importances are on disk before the model is touched, and gone afterwards."""
    run(job, tmp_path / "out", rule="empirical-fisher")
    shutil.copytree(job.model, tmp_path / "model")
    report = unlearn(
        *(tmp_path / "model", job.base, job.tuned, job.forget, job.retain),
        rule="empirical-fisher",
        lam=0.7,
        batch_size=2,
        in_place=True,
        stream=True,
        progress=False,
    )
    assert report.settings["stream"] is True
    assert_same_weights(tmp_path / "out", tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "model"}


def test_too_little_memory(job: Job, tmp_path: Path) -> None:
    """Refused before anything is written, with the memory that it needs, which is then enough."""
    with pytest.raises(InputError, match=r"it needs at least ([0-9]+) bytes") as caught:
        run(job, tmp_path / "out", stream=True, memory=1 << 20)
    assert list(tmp_path.iterdir()) == []
    least = int(re.search("at least ([0-9]+) bytes", str(caught.value))[1])  # type: ignore[index]
    run(job, tmp_path / "out", stream=True, memory=least + (16 << 20))  # the process has grown meanwhile
    run(job, tmp_path / "memory")
    assert_same_weights(tmp_path / "memory", tmp_path / "out")


def test_what_a_run_will_take_is_said_before(job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(job, tmp_path / "out", stream=True, progress=True)
    said = capfd.readouterr().err
    for line in ("memory: ", "disk: ", "arithmetic: ", "time: about ", "schedule: batches of 2"):
        assert f"\n{line}" in f"\n{said}"


def test_links_are_refused(job: Job, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave link_unchanged out"):
        run(job, tmp_path / "out", stream=True, link_unchanged=True)


def test_a_result_that_is_not_finite(tmp_path: Path) -> None:
    """It comes last of all; nothing is left, as a run that goes on would end the same way."""
    job = write_job(tmp_path / "job", torch.float32, max_shard_size="1GB")
    tensors = load_file(job.tuned / "model.safetensors")
    tensors["model.embed_tokens.weight"].fill_(3e38)
    save_file(tensors, job.tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotFiniteError, match=r"model.embed_tokens.weight: the result would hold NaN or infinite"):
        run(job, tmp_path / "out", lam=9, stream=True)
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [("model.layers.1.mlp.down_proj.weight", "what layer 1 makes of it"), ("lm_head.weight", "the loss of sample")],
)
def test_numbers_that_are_not_finite(tensor: str, message: str, tmp_path: Path) -> None:
    """On the way forward, or at the head with half of the work done: named, and nothing is left."""
    job = write_job(tmp_path / "job", torch.float32, max_shard_size="1GB")
    tensors = load_file(job.base / "model.safetensors")
    tensors[tensor].fill_(float("nan"))
    save_file(tensors, job.base / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotFiniteError, match=message):
        run(job, tmp_path / "out", stream=True)
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_a_shard_cut_short_meanwhile(role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error with its name, not a signal; with the shard put back the run is finished."""
    job = write_job(tmp_path / "job", max_shard_size="1GB")
    run(job, tmp_path / "whole")
    shard = job.model.parent / role / "model.safetensors"
    content, before = shard.read_bytes(), shard.stat()
    original = DataPass.head

    def head(data: DataPass) -> object:
        os.truncate(shard, len(content) // 2)
        return original(data)

    monkeypatch.setattr(DataPass, "head", head)
    with pytest.raises(RunError, match=f"{role}/model.safetensors"):
        run(job, tmp_path / "out", stream=True)
    monkeypatch.undo()
    with pytest.raises(InputError, match=f"{role}/model.safetensors: is truncated"):
        resume(tmp_path / "out", progress=False)
    shard.write_bytes(content)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    resume(tmp_path / "out", progress=False)
    assert_same_weights(tmp_path / "whole", tmp_path / "out")


def test_another_run_to_the_same_place(job: Job, tmp_path: Path) -> None:
    run(job, tmp_path / "out", stream=True)
    with pytest.raises(InputError, match="is not empty"):
        run(job, tmp_path / "out", stream=True)
    run(job, tmp_path / "out", stream=True, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# The order of the steps.


def kinds(steps: list[Step]) -> list[tuple[str, int]]:
    return [(step.kind, step.layer) for step in steps]


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5, 6, 7])
def test_steps_of_a_walk(every: int) -> None:
    """Each layer once forward and once back, and what a layer is given is on disk when its turn comes."""
    held, forward, back = set(), [], []
    for kind, layer in kinds(steps_of(5, Schedule(every=every))):
        if kind == "embed":
            held = {0}
        elif kind in ("forward", "recompute"):
            assert layer in held
            held.add(layer + 1)
            if kind == "forward":
                forward.append(layer)
                if layer % every:
                    held.remove(layer)
        elif kind == "head":
            held.remove(5)
            assert held == set(range(0, 5, every))
        elif kind == "backward":
            back.append(layer)
            held.remove(layer)
    assert forward == list(reversed(back)) == list(range(5))
    assert not held


def test_groups_walk_one_after_the_other() -> None:
    one = kinds(steps_of(4, Schedule(every=2)))
    steps = steps_of(4, Schedule(every=2, groups=3))
    assert kinds(steps) == one * 3
    assert [step.group for step in steps] == [group for group in range(3) for _ in one]
    assert steps_per_sample(4, Schedule(every=2, groups=3)) == len(one)
