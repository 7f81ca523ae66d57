"""A streamed walk that preconditions, stopped after any layer: it goes on there, with the bits of one at once."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import perta_fast as pf
from perta_fast import cli
from perta_fast.data import chat
from perta_fast.errors import NotFiniteError
from perta_fast.files.durable import read_record, write_record
from perta_fast.files.new_directory import (
    PRECONDITIONING_RECORD,
    PRECONDITIONING_STATE,
    OutputDirectory,
    partial_path,
    scratch_path,
)
from perta_fast.preconditioning.unfinished import Begun
from perta_fast.runs import making_tuned, unlearn_preconditioned
from perta_fast.streaming.kept_walk import KeptWalk
from perta_fast.streaming.model.partial_forward import PartialForward
from tests.distributed.launch import perta_on_ranks
from tests.support.checkpoints import fingerprint
from tests.support.children import perta, signal_at
from tests.support.models import CHAT_TEMPLATE, RETAIN, Job, tokenizer, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 3
Make = Callable[..., object]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """With an adapter, too, in the directory ``adapter``."""
    folder = tmp_path_factory.mktemp("given")
    job = write_job(folder, torch.float32, num_hidden_layers=LAYERS)
    pf.tune(job.base, job.forget, folder / "adapter", rank=3, epochs=2, lr=1e-2, progress=False)
    return job


@pytest.fixture
def job(given: Job, tmp_path: Path) -> Job:
    """A copy that a test may change."""
    folder = Path(shutil.copytree(given.model.parent, tmp_path / "job"))
    return Job(*(folder / name for name in ("model", "base", "tuned", "forget.jsonl", "retain.jsonl")))


def adapted(job: Job) -> Job:
    return replace(job, tuned=job.tuned.with_name("adapter"))


def unlearn(job: Job, out: Path | None, **settings: Any) -> pf.Report:
    data: dict[str, Any] = {"forget": job.forget, "retain": job.retain, "out": out, "progress": False}
    return pf.unlearn(*job.checkpoints, **data | {"lam": 3.0, "stream": True, "batch_size": 2} | settings)


def precondition(job: Job, out: Path, **settings: Any) -> pf.Preconditioning:
    how: dict[str, Any] = {"model": job.model, "stream": True, "batch_size": 2, "progress": False}
    return pf.precondition(job.base, job.tuned, job.retain, out, **how | settings)


def has_values(tensor: torch.Tensor) -> bool:
    """Whether it is none of an estimate."""
    return type(tensor) is torch.Tensor and not tensor.is_meta


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that are run, one number for each batch."""
    seen: list[int] = []
    layer = PartialForward.layer

    def counted(forward: PartialForward, number: int, hidden: torch.Tensor, *more: Any) -> Any:
        if has_values(hidden):
            seen.append(number)
        return layer(forward, number, hidden, *more)

    monkeypatch.setattr(PartialForward, "layer", counted)
    return seen


def stopped(make: Make, after: int, *arguments: Any, error: BaseException | None = None, **settings: Any) -> str:
    """What is said where ``make`` is stopped once so many layers are recorded."""
    keep = KeptWalk.keep

    def stop(kept: KeptWalk, begun: Begun) -> None:
        if begun.done > after:
            raise error or KeyboardInterrupt
        keep(kept, begun)

    with pytest.MonkeyPatch.context() as patched, pytest.raises((KeyboardInterrupt, pf.RunError)) as raised:
        patched.setattr(KeptWalk, "keep", stop)
        make(*arguments, **settings)
    assert after == 0 or isinstance(raised.value, pf.Interrupted | pf.RunError)
    return str(raised.value)


def contents(folder: Path) -> dict[str, bytes]:
    """All but what says when and how long."""
    apart = ("perta_report.json", "perta_precondition.json", "perta_files.b3", "README.md")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in apart}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("after", range(1, LAYERS + 1))
@pytest.mark.parametrize("is_adapter", [False, True])
def test_it_goes_on_at_its_layer(is_adapter: bool, after: int, job: Job, tmp_path: Path, layers: list[int]) -> None:
    job, before = adapted(job) if is_adapter else job, fingerprint(job.model.parent)
    how: dict[str, Any] = {"save_tuned": tmp_path / "expected tuned"}
    expected = unlearn(job, tmp_path / "expected", **how)
    once = len(layers) // LAYERS
    layers.clear()
    if after < LAYERS:
        said = stopped(unlearn, after, job, tmp_path / "out")
        assert said == "interrupted; the layers that were done are kept. Go on with: the same command"
    else:
        with pytest.MonkeyPatch.context() as patched, pytest.raises(pf.Interrupted, match="the same command"):
            patched.setattr(unlearn_preconditioned, "apply_sources", interrupt)
            unlearn(job, tmp_path / "out")
    assert names(tmp_path) == ["..out.perta-importance.perta-partial", "expected", "expected tuned", "job"]
    layers.clear()
    report = unlearn(job, tmp_path / "out")
    assert layers == sorted([*range(after, LAYERS)] * once)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert names(tmp_path) == ["expected", "expected tuned", "job", "out"]
    assert report.preconditioned == expected.preconditioned
    assert fingerprint(job.model.parent) == before


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("is_adapter", [False, True])
def test_what_is_kept_is_the_same_too(is_adapter: bool, job: Job, tmp_path: Path) -> None:
    job = adapted(job) if is_adapter else job
    for place in ("expected", "made"):
        if place == "made":
            stopped(precondition, 1, job, tmp_path / place)
            stopped(precondition, 2, job, tmp_path / place)
        record = precondition(job, tmp_path / place)
    first = pf.Preconditioning.read(tmp_path / "expected")
    assert contents(tmp_path / "made") == contents(tmp_path / "expected")
    assert (record.kept, record.linear_maps, record.settings) == (first.kept, first.linear_maps, first.settings)
    assert names(tmp_path) == ["expected", "job", "made"]
    stopped(unlearn, 1, job, tmp_path / "out", save_tuned=tmp_path / "kept")
    unlearn(job, tmp_path / "out", save_tuned=tmp_path / "kept")
    assert contents(tmp_path / "kept") == contents(tmp_path / "expected")
    assert not pf.verify(tmp_path / "out", full=True, progress=False).problems


def test_after_what_is_kept_has_its_name(job: Job, tmp_path: Path) -> None:
    unlearn(job, tmp_path / "expected")
    for stream in (True, False):
        with pytest.MonkeyPatch.context() as patched, pytest.raises(pf.Interrupted, match=r"complete, in .*/kept, and"):
            patched.setattr(unlearn_preconditioned, "apply_sources", interrupt)
            unlearn(job, tmp_path / "out", save_tuned=tmp_path / "kept", stream=stream)
        assert names(tmp_path) == ["expected", "job", "kept"]
        pf.apply(job.model, job.base, tmp_path / "kept", rule="tv", lam=3.0, out=tmp_path / "out", progress=False)
        assert contents(tmp_path / "out") == contents(tmp_path / "expected")
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "kept")


def test_in_place(job: Job, tmp_path: Path) -> None:
    unlearn(job, tmp_path / "out")
    assert "the same command" in stopped(unlearn, 2, job, None, in_place=True)
    other = r"other values of mu; finish it with the command that began it, or start over with overwrite$"
    with pytest.raises(pf.InputError, match=other):
        unlearn(job, None, in_place=True, mu=2.0)
    with pytest.raises(pf.InputError, match="another run to this place was stopped; finish it with the command"):
        unlearn(job, None, in_place=True, stream=False)
    unlearn(job, None, in_place=True)
    shards = {name: data for name, data in contents(tmp_path / "out").items() if name.endswith("tensors")}
    assert shards.items() <= contents(job.model).items()
    assert not [name for name in names(job.model.parent) if name.startswith(".")]


def test_before_the_first_layer_nothing_is_kept(job: Job, tmp_path: Path) -> None:
    for make in (unlearn, precondition):
        assert stopped(make, 0, job, tmp_path / "out") == ""
        assert names(tmp_path) == ["job"]


def test_another_strength_goes_on(job: Job, tmp_path: Path, layers: list[int]) -> None:
    unlearn(job, tmp_path / "expected", lam=1.5)
    stopped(unlearn, 2, job, tmp_path / "out")
    layers.clear()
    unlearn(job, tmp_path / "out", lam=1.5, memory=1 << 40)
    assert set(layers) == {LAYERS - 1}
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_strength_that_is_too_large_does_not_lose_the_walk(job: Job, tmp_path: Path, layers: list[int]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NotFiniteError("the result is not finite")

    with pytest.MonkeyPatch.context() as patched, pytest.raises(NotFiniteError):
        patched.setattr(unlearn_preconditioned, "apply_sources", fail)
        unlearn(job, tmp_path / "out", lam=100.0)
    layers.clear()
    unlearn(job, tmp_path / "out", lam=1.5)
    assert layers == []


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "mu": ({"mu": 3.0}, "mu"),
    "retain": ({"retain": "other.jsonl"}, "retain"),
    "batch": ({"batch_size": 3}, "batch_size"),
    "length": ({"max_length": 30}, "max_length"),
    "at": ({"at": "base"}, "the model whose inputs are seen"),
    "type": ({"dtype": torch.bfloat16}, "dtype"),
    "several": ({"device": "cpu", "mu": 2.0}, "device, mu"),
    "fields": ({"fields": {"question": "question", "answer": "answer"}}, "fields"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_work_is_refused(case: str, job: Job, tmp_path: Path) -> None:
    changed, what = OTHERS[case]
    if "retain" in changed:
        changed = {"retain": write_lines(tmp_path / "job/other.jsonl", RETAIN[1:])}
    stopped(unlearn, 1, job, tmp_path / "out")
    before = fingerprint(tmp_path)
    other = f"out: another run to this place was stopped, with other values of {what}; finish it with the command that"
    with pytest.raises(pf.InputError, match=other):
        unlearn(job, tmp_path / "out", **changed)
    assert fingerprint(tmp_path) == before
    unlearn(job, tmp_path / "out", overwrite=True, **changed)
    assert names(tmp_path) == ["job", "out"]


@pytest.mark.parametrize("name", ["model", "base", "tuned"])
def test_an_input_that_has_changed_is_refused(name: str, job: Job, tmp_path: Path) -> None:
    stopped(unlearn, 1, job, tmp_path / "out")
    shard = next((job.model.parent / name).glob("*.safetensors"))
    before = shard.stat()
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    reason = rf"{shard}: has changed since the run began; put the old file back, .* or start over with overwrite"
    with pytest.raises(pf.InputError, match=reason):
        unlearn(job, tmp_path / "out")
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    unlearn(job, tmp_path / "out")


def test_a_layer_of_an_input_that_changes_meanwhile_is_not_kept(job: Job, tmp_path: Path) -> None:
    shard, layers = next(job.tuned.glob("*.safetensors")), PartialForward.layer

    def change(forward: PartialForward, number: int, *more: Any) -> Any:
        if number == 1:
            os.utime(shard, ns=(0, 0))
        return layers(forward, number, *more)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(pf.RunError, match="has changed during the run"):
        patched.setattr(PartialForward, "layer", change)
        unlearn(job, tmp_path / "out")
    begun = Begun.load(scratch_path(tmp_path / "out") / PRECONDITIONING_STATE)
    assert begun is not None and begun.done == 1


def apply(job: Job, out: Path, **more: Any) -> object:
    return pf.apply(*job.checkpoints, rule="tv", lam=1.0, out=out, progress=False, **more)


def fisher(job: Job, out: Path, **more: Any) -> object:
    return unlearn(job, out, **{"rule": "fisher", "stream": False, "check": False} | more)


def in_memory(job: Job, out: Path, **more: Any) -> object:
    return unlearn(job, out, stream=False, check=False, **more)


def in_memory_alone(job: Job, out: Path, **more: Any) -> object:
    return precondition(job, out, stream=False, **more)


@pytest.mark.parametrize("other", [apply, fisher, in_memory, precondition, in_memory_alone])
@pytest.mark.parametrize("make", [unlearn, precondition])
def test_other_commands_to_the_same_place(make: Make, other: Make, job: Job, tmp_path: Path) -> None:
    if make is other:
        return
    stopped(make, 1, job, tmp_path / "out")
    before = fingerprint(tmp_path)
    with pytest.raises(pf.InputError, match="out: another run to this place was stopped; finish it with the command"):
        other(job, tmp_path / "out")
    with pytest.raises(pf.InputError, match="run the same command again, which goes on with it"):
        pf.resume(tmp_path / "out")
    assert fingerprint(tmp_path) == before
    other(job, tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["job", "out"]


def test_overwrite_starts_over(job: Job, tmp_path: Path, layers: list[int]) -> None:
    for make in (unlearn, precondition):
        stopped(make, 2, job, tmp_path / "out")
        layers.clear()
        make(job, tmp_path / "out", overwrite=True)
        assert set(layers) == set(range(LAYERS))
        assert names(tmp_path) == ["job", "out"]
        shutil.rmtree(tmp_path / "out")


def test_overwrite_gives_up_a_subtraction_too(job: Job, tmp_path: Path, layers: list[int]) -> None:
    """It has begun with a θ_f that is not there any more."""
    unlearn(job, tmp_path / "expected", mu=2.0)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(pf.Interrupted, match="perta resume"):
        patched.setattr("perta_fast.subtraction.to_directory.describe_output", interrupt)
        unlearn(job, tmp_path / "out")
    with pytest.raises(pf.InputError, match="finish it with: perta resume"):
        unlearn(job, tmp_path / "out")
    stopped(unlearn, 2, job, tmp_path / "out", mu=2.0, overwrite=True)
    layers.clear()
    unlearn(job, tmp_path / "out", mu=2.0)
    assert set(layers) == {2}
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_what_was_begun_with_overwrite_goes_on_without(job: Job, tmp_path: Path, layers: list[int]) -> None:
    kept = tmp_path / "kept"
    for make, how in ((unlearn, {}), (unlearn, {"save_tuned": kept}), (precondition, {})):
        make(job, tmp_path / "out", **how)
        first = contents(tmp_path / "out")
        said = stopped(make, 2, job, tmp_path / "out", overwrite=True, **how)
        assert said.endswith("the same command, without overwrite")
        assert contents(tmp_path / "out") == first
        layers.clear()
        make(job, tmp_path / "out", **how)
        assert set(layers) == {2}
        assert contents(tmp_path / "out") == first
        shutil.rmtree(tmp_path / "out")


def test_a_record_alone_lets_nothing_be_replaced(job: Job, tmp_path: Path) -> None:
    """Anybody may have written it."""
    for make in (unlearn, precondition):
        stopped(make, 1, job, tmp_path / "out", overwrite=True)
        (tmp_path / "out").mkdir()
        (tmp_path / "out/precious").touch()
        with pytest.raises(pf.InputError, match="holds what no run has written"):
            make(job, tmp_path / "out")
        make(job, tmp_path / "out", overwrite=True)
        shutil.rmtree(tmp_path / "out")


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("how", [flip, Path.unlink])
@pytest.mark.parametrize(
    "name", ["tuned/model-00001.safetensors", "scratch/hidden-2", "scratch/a-0", PRECONDITIONING_RECORD]
)
def test_damage(name: str, how: Callable[[Path], None], job: Job, tmp_path: Path) -> None:
    job = adapted(job) if name == "scratch/a-0" else job
    unlearn(job, tmp_path / "expected")
    stopped(unlearn, 2, job, tmp_path / "out")
    folder = scratch_path(tmp_path / "out")
    how((folder if name.startswith("tuned") else folder / PRECONDITIONING_STATE) / name)
    if name == PRECONDITIONING_RECORD and how is not flip:  # then there is nothing to go on with
        unlearn(job, tmp_path / "out")
    else:
        with pytest.raises(pf.InputError, match=r"start over with overwrite$"):
            unlearn(job, tmp_path / "out")
        unlearn(job, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert names(tmp_path) == ["expected", "job", "out"]


@pytest.mark.parametrize(
    "change",
    [
        {"done": 0},
        {"done": LAYERS + 1},
        {"done": LAYERS},
        {"shards": [""]},
        {"files": {}},
        {"files": {"../victim": {"dtype": "float32", "shape": [1], "blake3": ""}}},
        {"files": {"hidden-2": {"dtype": "nn", "shape": [1], "blake3": ""}}},
        {"torch_threads": 1 << 40},
        {"batch_size": 0},
        {"dtype": "int8"},
        {"day": "today"},
        {"before": -1.0},
        {"versions": {}},
    ],
    ids=str,
)
def test_a_record_that_no_walk_has_written(change: dict[str, Any], job: Job, tmp_path: Path) -> None:
    stopped(unlearn, 2, job, tmp_path / "out")
    path = scratch_path(tmp_path / "out") / PRECONDITIONING_STATE / PRECONDITIONING_RECORD
    write_record(path, read_record(path) | change)
    victim = path.parent / "victim"
    victim.write_text("precious")
    with pytest.raises(pf.InputError, match="start over with overwrite"):
        unlearn(job, tmp_path / "out")
    assert victim.read_text() == "precious"


def test_the_day_is_kept(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in job.checkpoints:
        tokenizer("{{ strftime_now('%Y-%m-%d') }}" + CHAT_TEMPLATE).save_pretrained(path)

    def on(day: date) -> None:
        monkeypatch.setattr(chat, "_clock", lambda: datetime(day.year, day.month, day.day))

    on(date(2025, 4, 10))
    unlearn(job, tmp_path / "expected")
    stopped(unlearn, 1, job, tmp_path / "out")
    stopped(precondition, 1, job, tmp_path / "made")
    on(date(2025, 4, 12))
    report, made = unlearn(job, tmp_path / "out"), precondition(job, tmp_path / "made")
    assert report.settings["date"] == made.settings["date"] == report.recipe["date-string"] == "2025-04-10"
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_the_batch_and_the_threads_are_kept(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(precondition, 1, job, tmp_path / "out", batch_size=4)
    path = partial_path(tmp_path / "out") / PRECONDITIONING_STATE / PRECONDITIONING_RECORD
    write_record(path, read_record(path) | {"torch_threads": 2, "batch_size": 3})  # as a limit of memory chooses it
    seen: list[int] = []
    layer = PartialForward.layer

    def watched(forward: PartialForward, number: int, hidden: torch.Tensor, *more: Any) -> Any:
        if has_values(hidden):
            seen.append(torch.get_num_threads())
        assert len(hidden) <= 3
        return layer(forward, number, hidden, *more)

    monkeypatch.setattr(PartialForward, "layer", watched)
    record = precondition(job, tmp_path / "out", batch_size=4, memory=1 << 40)
    assert set(seen) == {2} and torch.get_num_threads() == 1
    assert record.settings["batch_size"] == 3


def test_rows_of_python(job: Job, tmp_path: Path) -> None:
    how: dict[str, Any] = {"retain": RETAIN, "forget": None}
    unlearn(job, tmp_path / "expected", **how)
    said = stopped(unlearn, 1, job, tmp_path / "out", **how)
    assert said.endswith("Go on with: the same call, with the same rows")
    with pytest.raises(pf.InputError, match="other values of retain"):
        unlearn(job, tmp_path / "out", **how | {"retain": RETAIN[1:]})
    unlearn(job, tmp_path / "out", **how)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_full_disk(job: Job, tmp_path: Path) -> None:
    said = stopped(unlearn, 1, job, tmp_path / "out", error=OSError(28, "No space left on device"))
    assert "the disk is full" in said and said.endswith("finish it with: the same command")
    unlearn(job, tmp_path / "out")


def test_out_of_memory(job: Job, tmp_path: Path) -> None:
    said = stopped(unlearn, 1, job, tmp_path / "out", error=torch.OutOfMemoryError("CUDA out of memory"))
    assert said.endswith("Go on where more is free with: the same command")
    unlearn(job, tmp_path / "out")


def test_the_bar_begins_at_the_share_that_is_done(job: Job, tmp_path: Path) -> None:
    stopped(precondition, 2, job, tmp_path / "out")
    events: list[pf.Event] = []
    precondition(job, tmp_path / "out", progress=events.append)
    first, *_, last = (event for event in events if event.phase == "inputs of linear maps")
    assert (first.done, first.total, last.done) == (3 * len(RETAIN), 4 * len(RETAIN), 4 * len(RETAIN))


@pytest.fixture
def arguments(job: Job, tmp_path: Path) -> Iterator[list[object]]:
    inputs = [f"--{name}={getattr(job, name)}" for name in ("model", "base", "tuned", "forget", "retain")]
    yield ["unlearn", *inputs, "--lam=3", "--stream", "--batch-size=2", "--quiet", f"--out={tmp_path / 'out'}"]


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_killed(after: bool, job: Job, tmp_path: Path, arguments: list[object], layers: list[int]) -> None:
    """By a signal that no process can catch, while a layer is recorded."""
    unlearn(job, tmp_path / "expected")
    done = perta(*arguments, setup=signal_at("SIGKILL", "preconditioning.unfinished.write_record", after, earlier=1))
    assert done.returncode == -9, done.stderr
    layers.clear()
    assert cli.main(list(map(str, arguments))) == 0
    assert set(layers) == set(range(1 + after, LAYERS))
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert names(tmp_path) == ["expected", "job", "out"]


@pytest.mark.slow
def test_several_processes_go_on(job: Job, tmp_path: Path, arguments: list[object]) -> None:
    """The first of them walks, so that any number may."""
    unlearn(job, tmp_path / "expected")
    stopped(unlearn, 2, job, tmp_path / "out")
    before = fingerprint(tmp_path)
    refused = perta_on_ranks(2, *arguments, "--mu=2")
    assert {end.status for end in refused} == {2}
    assert "with other values of --mu" in "".join(end.errors for end in refused)
    assert fingerprint(tmp_path) == before
    assert [end.status for end in perta_on_ranks(2, *arguments)] == [0, 0]
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert names(tmp_path) == ["expected", "job", "out"]


@pytest.mark.slow
def test_the_command_line(
    job: Job, tmp_path: Path, arguments: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    setup = signal_at("SIGINT", "preconditioning.unfinished.write_record", earlier=1)
    done = perta(*arguments, "--overwrite", setup=setup)
    assert done.returncode == 130
    going_on = "Go on with: the same command, without --overwrite"
    assert done.stderr == f"perta: interrupted; the layers that were done are kept. {going_on}\n"
    words = list(map(str, arguments))
    assert cli.main([*words, "--mu=2"]) == 2
    assert "with other values of --mu; finish it" in capsys.readouterr().err
    assert cli.main(["resume", str(tmp_path / "out")]) == 2
    assert "run the same command again, which goes on with it" in capsys.readouterr().err
    assert cli.main(words) == 0


# What other runs do meanwhile, and what they are told.


def test_a_run_that_keeps_its_vector_does_not_pass_by_another_walk(job: Job, tmp_path: Path, layers: list[int]) -> None:
    """It would be refused when its own walk is done."""
    stopped(unlearn, 2, job, tmp_path / "out")
    layers.clear()
    with pytest.raises(pf.InputError, match="another run to this place was stopped; finish it with the command that"):
        unlearn(job, tmp_path / "out", save_tuned=tmp_path / "kept")
    assert layers == [] and names(tmp_path) == ["..out.perta-importance.perta-partial", "job"]


def test_a_stopped_preconditioning_is_not_replaced_by_a_result(job: Job, tmp_path: Path) -> None:
    stopped(precondition, 2, job, tmp_path / "out", mu=77.0)
    before = fingerprint(tmp_path)
    with pytest.raises(pf.InputError, match="another run to this place was stopped; finish it with the command that"):
        unlearn(job, tmp_path / "out")
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("make", [unlearn, precondition])
@pytest.mark.parametrize("ended", [False, True])
def test_another_run_that_has_gone_on_meanwhile_loses_nothing(
    ended: bool, make: Make, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has kept is not taken for what was seen before the directory was locked."""
    expected, out = tmp_path / "expected", tmp_path / "out"
    make(job, expected)
    stopped(make, 1, job, out)
    enter = OutputDirectory.__enter__

    def late(target: OutputDirectory) -> OutputDirectory:
        with monkeypatch.context() as patched:
            patched.setattr(OutputDirectory, "__enter__", enter)
            if ended:
                make(job, out)
            else:
                stopped(make, 2, job, out)
        return enter(target)

    with monkeypatch.context() as patched, pytest.raises(pf.RunError, match="has gone on with this walk meanwhile"):
        patched.setattr(OutputDirectory, "__enter__", late)
        make(job, out)
    if not ended:
        make(job, out)
    assert contents(out) == contents(expected) and names(tmp_path) == ["expected", "job", "out"]


def test_a_walk_that_was_begun_meanwhile_is_not_emptied(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = OutputDirectory.__enter__

    def late(target: OutputDirectory) -> OutputDirectory:
        with monkeypatch.context() as patched:
            patched.setattr(OutputDirectory, "__enter__", enter)
            stopped(unlearn, 2, job, tmp_path / "out")
        return enter(target)

    with monkeypatch.context() as patched, pytest.raises(pf.InputError, match="another run to this place was stopped"):
        patched.setattr(OutputDirectory, "__enter__", late)
        unlearn(job, tmp_path / "out")
    begun = Begun.load(scratch_path(tmp_path / "out") / PRECONDITIONING_STATE)
    assert begun is not None and begun.done == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_job_goes_on_with_a_stopped_walk(
    overwrite: bool, job: Job, tmp_path: Path, layers: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    given = {role: getattr(job, role) for role in ("model", "base", "tuned", "forget", "retain")}
    shared = "".join(f"{role}: {place}\n" for role, place in given.items())
    settings = "  stream: true\n  lam: 3\n  batch-size: 2\n" + "  overwrite: true\n" * overwrite
    path.write_text(f"{shared}unlearn:\n{settings}  out: {tmp_path / 'out'}\n")
    run = ["recipe", "run", str(path)]
    stopped(lambda: raised_by(run), 2)
    layers.clear()
    capsys.readouterr()
    assert cli.main(run) == 0
    assert set(layers) == {2} and "was begun, and goes on" in capsys.readouterr().out
    unlearn(job, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def raised_by(command: list[str]) -> None:
    """The job's error as an interrupt, which the command line has caught."""
    assert cli.main(command) == 130
    raise pf.Interrupted("")


def test_other_runs_in_place_say_what_gives_up_a_stopped_walk(job: Job, tmp_path: Path) -> None:
    stopped(unlearn, 2, job, None, in_place=True)
    before = fingerprint(job.model)
    state = scratch_path(job.model)
    for overwrite in (False, True):
        for how in ({"save_tuned": tmp_path / "kept"}, {"rule": "tv", "stream": False}):
            with pytest.raises(pf.InputError, match=f"the command that began it, or give it up with: rm -r {state}$"):
                unlearn(job, None, in_place=True, overwrite=overwrite, **how)
    with pytest.raises(pf.InputError, match=f"give it up with: rm -r {state}$"):
        pf.apply(*job.checkpoints, rule="tv", in_place=True, progress=False)
    assert fingerprint(job.model) == before
    shutil.rmtree(state)
    unlearn(job, None, in_place=True, rule="tv", stream=False)
    assert fingerprint(job.model) != before


def test_a_walk_that_goes_on_keeps_its_limits_or_says_that_it_cannot(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(unlearn, 2, job, tmp_path / "out")
    with pytest.raises(pf.InputError, match="cannot hold one part of the model"):
        unlearn(job, tmp_path / "out", memory=1000)

    def one_at_a_time(*_: Any) -> Any:
        return SimpleNamespace(schedule=SimpleNamespace(batch_size=1))

    with monkeypatch.context() as patched, pytest.raises(pf.InputError, match="keeps its batches of 2, and only 1 fit"):
        patched.setattr(making_tuned, "choose_schedule", one_at_a_time)
        unlearn(job, tmp_path / "out", memory=1 << 40)
    unlearn(job, tmp_path / "out", memory=1 << 40)
    unlearn(job, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
