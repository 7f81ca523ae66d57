"""An input that someone changes while a run reads it: noticed before it does harm, with what to do."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from perta_fast import InputError, Report, RunError, apply, estimate_importance, precondition, resume, tune, unlearn
from perta_fast.runs import estimate, unlearn_in_memory, unlearn_preconditioned
from perta_fast.runs.making_tuned import Making
from perta_fast.streaming import walk, write_behind
from perta_fast.subtraction import compute, in_place, to_directory
from perta_fast.subtraction.parts import Part
from tests.distributed.launch import perta_on_ranks
from tests.support.checkpoints import fingerprint
from tests.support.inputs import Inputs, write_inputs
from tests.support.models import Job

NOT_FINITE = b"\xff"


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    """With many chunks, parts and segments."""
    monkeypatch.setattr(compute, "CHUNK", 64)
    monkeypatch.setattr(in_place, "SEGMENT", 700)
    return write_inputs(tmp_path / "inputs", shards=2)


def run(inputs: Inputs, **settings: Any) -> Report:
    return apply(*inputs.all, lam=0.7, progress=False, **settings)


def shard_of(folder: Path) -> Path:
    """The last one to be read."""
    return sorted(folder.glob("*.safetensors"))[-1]


def change(path: Path, byte: bytes = b"\x01") -> tuple[bytes, int]:
    """Replace the data of a shard, but not its header, nor its size; returns what was there, and its time of change."""
    content, mtime = path.read_bytes(), path.stat().st_mtime_ns
    begin = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:begin] + byte * (len(content) - begin))
    os.utime(path, ns=(mtime + 1, mtime + 1))
    return content, mtime


def own_checkpoints(job: Job, folder: Path) -> dict[str, Path]:
    """Copies of the three checkpoints, which may be changed."""
    return {name: Path(shutil.copytree(getattr(job, name), folder / name)) for name in ("model", "base", "tuned")}


def ended_by(shard: Path) -> AbstractContextManager[object]:
    """The run ends as ``shard`` has changed, and nothing is kept."""
    return pytest.raises(RunError, match=f"{shard.name}: has changed during the run; run the same command again")


def after(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, action: Callable[[], object], earlier: int = 0
) -> None:
    """Do ``action`` after a call of a function, once it was called ``earlier`` times."""
    original, calls = getattr(owner, name), []

    def called(*arguments: Any, **settings: Any) -> Any:
        result = original(*arguments, **settings)
        calls.append(name)
        if len(calls) == earlier + 1:
            action()
        return result

    monkeypatch.setattr(owner, name, called)


@pytest.mark.parametrize("byte", [b"\x01", NOT_FINITE])
@pytest.mark.parametrize("role", ["model", "tuned", "forget"])
def test_in_place_before_the_model_is_changed(
    role: str, byte: bytes, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shard_of(inputs[role])
    after(monkeypatch, in_place, "HashesInPassing", lambda: change(shard, byte))
    before = {path: digest for path, digest in fingerprint(inputs.folder).items() if path != shard}
    with pytest.raises(RunError) as caught:
        run(inputs, in_place=True)
    said = f"{shard}: has changed during the run; run the same command again. The model is untouched"
    assert str(caught.value) == said
    assert {path: digest for path, digest in fingerprint(inputs.folder).items() if path != shard} == before
    assert not (inputs["model"] / ".perta-journal").exists()


@pytest.mark.parametrize("byte", [b"\x01", NOT_FINITE])
@pytest.mark.parametrize("role", ["base", "tuned", "retain"])
def test_in_place_while_the_model_is_changed(
    role: str, byte: bytes, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was made of other bytes reaches the model, so it is finished from the old ones, of any time."""
    run(inputs, out=tmp_path / "out")
    shard, kept = shard_of(inputs[role]), []
    with monkeypatch.context() as patch:
        after(patch, in_place, "_fill", lambda: kept.append(change(shard, byte)), earlier=1)
        with pytest.raises(RunError) as caught:
            run(inputs, in_place=True)
    assert str(caught.value) == (
        f"{shard}: has changed during the run; put the old file back. {inputs['model']} is half changed and cannot be "
        f"loaded; finish the run with: perta resume {inputs['model']}"
    )
    with pytest.raises(InputError, match=f"{shard.name}: has changed since the run began; put the old file back"):
        resume(inputs["model"], progress=False)
    shard.write_bytes(kept[0][0])
    report = resume(inputs["model"], progress=False)
    assert isinstance(report, Report)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    assert {path.name: path.read_bytes() for path in inputs["model"].glob("*.safetensors")} == expected
    for directory in (record for name, record in report.inputs.items() if name != "model"):
        for name, file in directory["files"].items():
            assert file["blake3"] == blake3(Path(directory["path"], name).read_bytes()).hexdigest()


def test_a_new_directory_before_there_is_work_to_keep(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shard_of(inputs["tuned"])
    after(monkeypatch, to_directory, "copy_companions", lambda: change(shard, NOT_FINITE))
    with pytest.raises(RunError) as caught:
        run(inputs, out=tmp_path / "made" / "out")
    assert str(caught.value) == (
        f"{shard}: has changed during the run. Leave the inputs as they are, and run the same command again"
    )
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize("cut", [False, True])
def test_a_new_directory_with_work_to_keep(
    cut: bool, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is noted was made of the old bytes; they are known by their time of change."""
    run(inputs, out=tmp_path / "expected")
    out, shard, kept = tmp_path / "out", shard_of(inputs["tuned"]), []

    def strike() -> None:
        kept.append(change(shard))
        if cut:
            os.truncate(shard, shard.stat().st_size // 2)

    with monkeypatch.context() as patch:
        after(patch, Part, "note", strike)
        with pytest.raises(RunError) as caught:
            run(inputs, out=out, threads=1)
    assert str(caught.value) == (
        f"{shard}: has changed during the run. Put the old file back, with its time of change (cp -p keeps it), and "
        f"finish the run with: perta resume {out}; or start over with overwrite"
    )
    content, mtime = kept[0]
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"has changed since the run began; put the old file back, with its time of"):
        resume(out, progress=False)
    os.utime(shard, ns=(mtime, mtime))
    resume(out, progress=False)
    for path in (tmp_path / "expected").glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_base_that_changes_after_its_gradients_were_taken(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(job.base, tmp_path / "base"))
    shard = shard_of(base)
    after(monkeypatch, unlearn_in_memory, "_estimate", lambda: change(shard))
    with ended_by(shard):
        unlearn(
            *(job.model, base, job.tuned, job.forget, job.retain),
            rule="fisher",
            lam=1.0,
            check=False,
            out=tmp_path / "out",
            progress=False,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("role", ["model", "base", "tuned"])
def test_an_input_that_changes_after_theta_f_was_made_of_it(
    role: str, kept: bool, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = own_checkpoints(job, tmp_path)
    shard = shard_of(own[role])
    after(monkeypatch, Making, "run", lambda: change(shard))
    settings: dict[str, Any] = {"save_tuned": tmp_path / "kept"} if kept else {}
    with ended_by(shard):
        unlearn(**own, forget=job.forget, retain=job.retain, lam=1.0, out=tmp_path / "out", progress=False, **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model", "tuned"]


def test_an_input_that_changes_before_theta_f_is_subtracted(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report would have the hashes of another θ_f than the one that was preconditioned."""
    tuned = Path(shutil.copytree(job.tuned, tmp_path / "tuned"))
    shard = shard_of(tuned)
    after(monkeypatch, unlearn_preconditioned, "_with_tuned", lambda: change(shard))
    with ended_by(shard):
        unlearn(job.model, job.base, tuned, job.forget, job.retain, lam=1.0, out=tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned"]


def test_settings_of_an_adapter_that_change_after_theta_f_was_made_of_it(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    tune(job.base, job.forget, adapter, rank=2, epochs=1, progress=False)
    config = adapter / "adapter_config.json"
    doubled = json.dumps(json.loads(config.read_text()) | {"lora_alpha": 64})
    after(monkeypatch, Making, "run", lambda: config.write_text(doubled))
    with pytest.raises(RunError, match=r"adapter_config\.json: has changed during the run"):
        unlearn(job.model, job.base, adapter, job.forget, job.retain, lam=1.0, out=tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    ("owner", "name"), [(estimate, "load_subject"), (walk.Walk, "run")], ids=["in memory", "streamed"]
)
def test_a_model_that_changes_while_an_importance_is_estimated(
    owner: Any, name: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metadata would know it by the hash of other weights."""
    base, stream = Path(shutil.copytree(job.base, tmp_path / "base")), name == "run"
    shard = shard_of(base)
    after(monkeypatch, owner, name, lambda: change(shard))
    with ended_by(shard):
        estimate_importance(base, job.forget, out=tmp_path / "out", stream=stream, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("role", ["model", "base", "tuned"])
def test_an_input_that_changes_while_it_is_preconditioned(
    role: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = own_checkpoints(job, tmp_path)
    shard = shard_of(own[role])
    after(monkeypatch, Making, "run", lambda: change(shard))
    with ended_by(shard):
        precondition(**own, retain=job.retain, out=tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model", "tuned"]


@pytest.mark.usefixtures("one_thread")
def test_a_base_that_changes_during_a_streamed_walk(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path(shutil.copytree(job.base, tmp_path / "base"))
    arguments = (job.model, base, job.tuned, job.forget, job.retain)
    settings: dict[str, Any] = {"rule": "fisher", "lam": 1.0, "stream": True, "check": False, "progress": False}
    unlearn(*arguments, out=tmp_path / "expected", **settings)
    shard, out, kept = shard_of(base), tmp_path / "out", []
    with monkeypatch.context() as patch:
        after(patch, write_behind.WriteBehind, "_record", lambda: kept.append(change(shard)))
        with pytest.raises(RunError, match=rf"{shard.name}: has changed during the run. Put .*: perta resume {out};"):
            unlearn(*arguments, out=out, **settings)
    content, mtime = kept[0]
    shard.write_bytes(content)
    os.utime(shard, ns=(mtime, mtime))
    resume(out, progress=False)
    for path in (tmp_path / "expected").glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def change_after_a_part(rank: int, shard: Path) -> None:
    """On the second of two ranks, once its part is noted."""
    note = Part.note

    def noted(part: Part, totals: Any) -> None:
        note(part, totals)
        if rank == 1:
            change(shard)

    Part.note = noted


def test_a_change_that_one_of_two_processes_sees(inputs: Inputs, tmp_path: Path) -> None:
    shard = shard_of(inputs["tuned"])
    names = ("model", "base", "tuned", "forget-importance", "retain-importance")
    paths = [text for name, path in zip(names, inputs.all, strict=True) for text in (f"--{name}", path)]
    command = ("apply", *paths, "--lam", "0.7", "--quiet", "--out", tmp_path / "out")
    ended = perta_on_ranks(2, *command, setup=partial(change_after_a_part, shard=shard))
    assert [each.status for each in ended] == [1, 1]
    said = [each.errors for each in ended if each.errors]  # of one; of both, if both see it at once
    assert all(f"{shard}: has changed during the run" in errors for errors in said)
    assert any("during the run. Put the old file back, with its time of change" in errors for errors in said)
    assert not (tmp_path / "out").exists()


def test_a_change_at_the_very_end(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hashes would be of the new bytes, where only a hash was read."""
    shard = shard_of(inputs["model"])
    after(monkeypatch, to_directory, "describe_inputs", lambda: change(shard))
    with pytest.raises(RunError, match=f"{shard.name}: has changed during the run"):
        run(inputs, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
