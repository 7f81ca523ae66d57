"""A model changed where it lies: the same bytes as a run into a new directory, and what is refused."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from transformers import AutoModelForCausalLM

from perta_fast import (
    Importance,
    InputError,
    Interrupted,
    Report,
    RunError,
    apply,
    estimate_importance,
    resume,
    unlearn,
    verify,
)
from perta_fast.cli import main
from perta_fast.files.durable import read_record, write_record
from perta_fast.files.journal import new_segment
from perta_fast.subtraction import compute as subtraction
from perta_fast.subtraction import in_place, journal_directory
from perta_fast.subtraction.journal_directory import is_open, locked_journal
from tests.support.checkpoints import draw, fingerprint, read_checkpoint, same_bytes, write_checkpoint, write_raw
from tests.support.children import perta, signal_at
from tests.support.inputs import BF16, F16, F32, Inputs, write_inputs
from tests.support.models import Job

OPTIONS = ("model", "base", "tuned", "forget-importance", "retain-importance")


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return write_inputs(tmp_path / "inputs", shards=2)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def change(inputs: Inputs, **settings: Any) -> Report:
    return apply(*inputs.all, lam=0.7, in_place=True, progress=False, **settings)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("types", [(F32,) * 5, (BF16, BF16, BF16, F32, F32), (F16, F32, BF16, F32, BF16)])
@pytest.mark.parametrize(("chunk", "segment", "threads"), [(64, 700, 2), (7, 50, 3), (1 << 18, 64 << 20, 1)])
def test_the_same_bytes_as_a_run_to_a_directory(
    count: int,
    types: tuple[Any, ...],
    chunk: int,
    segment: int,
    threads: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = write_inputs(tmp_path / "inputs", types, count)
    (inputs["model"] / "config.json").write_text("{}")
    apply(*inputs.all, lam=0.7, out=tmp_path / "out", progress=False)
    monkeypatch.setattr(subtraction, "CHUNK", chunk)
    monkeypatch.setattr(in_place, "SEGMENT", segment)
    others = fingerprint(*(inputs[role] for role in ("base", "tuned", "forget", "retain")))
    report = change(inputs, threads=threads)
    assert shards(inputs["model"]) == shards(tmp_path / "out")
    assert names(inputs["model"]) == names(tmp_path / "out")
    assert fingerprint(*(inputs[role] for role in ("base", "tuned", "forget", "retain"))) == others
    assert Report.load(inputs["model"]) == report
    expected = Report.load(tmp_path / "out")
    for row, other in zip(report.tensors, expected.tensors, strict=True):
        assert (row.name, row.action, row.changed) == (other.name, other.action, other.changed)
        for name in ("relative_change", "mean_weight"):  # sums in another order
            assert (getattr(row, name) or 0) == pytest.approx(getattr(other, name) or 0, rel=1e-5)
    assert report.counts == expected.counts
    assert report.in_place and not expected.in_place
    assert report.inputs["model"] == expected.inputs["model"] | {"kept": False}
    assert report.output["files"] == expected.output["files"]


def test_a_task_vector_of_zero_writes_nothing(inputs: Inputs) -> None:
    before = {path: path.stat().st_mtime_ns for path in inputs["model"].glob("*.safetensors")}
    apply(
        inputs["model"],
        inputs["base"],
        inputs["base"],
        rule="tv",
        lam=1.0,
        in_place=True,
        allow_zero=True,
        progress=False,
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (inputs["model"] / "perta_report.json").exists()


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_base_or_tuned_may_be_the_model_itself(role: str, inputs: Inputs, tmp_path: Path) -> None:
    model, base, tuned = (inputs["model" if each == role else each] for each in ("model", "base", "tuned"))
    inputs.tensors[role] = inputs.tensors["model"]
    expected = inputs.expected(None, 1.0)
    apply(model, base, tuned, rule="tv", lam=1.0, out=tmp_path / "out", progress=False)
    apply(model, base, tuned, rule="tv", lam=1.0, in_place=True, progress=False)
    for folder in (model, tmp_path / "out"):
        found = read_checkpoint(folder)
        assert all(same_bytes(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_a_run_whose_base_or_tuned_is_the_model_can_be_finished(
    role: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base, tuned = (inputs["model" if each == role else each] for each in ("model", "base", "tuned"))
    apply(model, base, tuned, rule="tv", lam=1.0, out=tmp_path / "out", progress=False)
    monkeypatch.setattr(subtraction, "CHUNK", 64)
    monkeypatch.setattr(in_place, "SEGMENT", 700)
    with monkeypatch.context() as patch:
        stop_at_the_second_segment(patch)
        with pytest.raises(Interrupted):
            apply(model, base, tuned, rule="tv", lam=1.0, in_place=True, progress=False)
    resume(model, progress=False)
    assert shards(model) == shards(tmp_path / "out")


def test_a_tensor_that_would_be_read_after_it_was_changed_is_refused(tmp_path: Path) -> None:
    """A head that the model stores and its own base, the same file, ties: read at the embedding's place."""
    tied = {"model.embed_tokens.weight": draw((9, 4))}
    model = write_checkpoint(tmp_path / "model", tied | {"lm_head.weight": draw((9, 4), seed=1)}, 2)
    tuned = write_checkpoint(tmp_path / "tuned", tied | {"lm_head.weight": draw((9, 4), seed=2)})
    base = tmp_path / "base"
    base.mkdir()
    (shard,) = (path for path in model.glob("*.safetensors") if b"embed" in path.read_bytes())
    (base / "model.safetensors").symlink_to(shard)
    before = fingerprint(model)
    with pytest.raises(InputError, match=r"which is read for .*, lies in a file that would be changed"):
        apply(model, base, tuned, rule="tv", lam=1.0, in_place=True, progress=False)
    assert fingerprint(model) == before


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_linked_shards_are_refused(link: Any, inputs: Inputs, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in inputs["model"].iterdir():
        link(path, snapshot / path.name)
    before = fingerprint(inputs["model"])
    with pytest.raises(InputError, match=r"is a link to a file that others may use .*copy the model first"):
        apply(snapshot, *inputs.all[1:], lam=1.0, in_place=True, progress=False)
    assert fingerprint(inputs["model"]) == before
    assert not (snapshot / ".perta-journal").exists()


def test_a_result_that_is_not_finite_leaves_the_model_untouched(tmp_path: Path) -> None:
    """Found in the last tensor, when the first would have been changed."""
    tensors = {"a": draw((500,)).half(), "b": draw((4,)).half()}
    model = write_checkpoint(tmp_path / "model", tensors)
    base = write_checkpoint(tmp_path / "base", tensors)
    tuned = write_checkpoint(tmp_path / "tuned", {"a": tensors["a"] + 1, "b": tensors["b"] - 60000})
    before = fingerprint(model)
    with pytest.raises(RunError, match=r"tensor b: the result would hold NaN or infinite values.*untouched"):
        apply(model, base, tuned, rule="tv", lam=3.0, in_place=True, progress=False)
    assert fingerprint(model) == before
    assert names(model) == {"model.safetensors"}


def test_out_or_in_place(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings in ({}, {"out": tmp_path / "out", "in_place": True}):
        with pytest.raises(InputError, match="give either out, a directory to make, or in_place"):
            apply(*inputs.checkpoints, rule="tv", lam=1.0, **settings)  # type: ignore[arg-type]
    places = [f"--{role}={inputs[role]}" for role in ("model", "base", "tuned")]
    for end in ([], ["--out", "x", "--in-place"]):
        with pytest.raises(SystemExit, match="2"):
            main(["apply", *places, "--rule", "tv", "--lam", "1", *end])
    assert "--out" in capsys.readouterr().err


def stop_at_the_second_segment(patch: pytest.MonkeyPatch) -> None:
    """An interrupt once it is durable, with the first in the shards."""
    seal = in_place.Segment.seal
    calls = []

    def stop(segment: in_place.Segment, state: Any) -> None:
        seal(segment, state)
        calls.append(segment)
        if len(calls) == 2:
            raise KeyboardInterrupt

    patch.setattr(in_place.Segment, "seal", stop)


@pytest.fixture
def open_run(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    """Stopped with the first segment in the shards and the second durable."""
    monkeypatch.setattr(subtraction, "CHUNK", 64)
    monkeypatch.setattr(in_place, "SEGMENT", 700)
    (inputs["model"] / "config.json").write_text("{}")
    with monkeypatch.context() as patch:
        stop_at_the_second_segment(patch)
        with pytest.raises(Interrupted, match=r"half changed and cannot be loaded; finish .*perta resume"):
            change(inputs)
    return inputs


class TestAnOpenRun:
    def test_nothing_else_takes_the_directory_for_a_model(self, open_run: Inputs, tmp_path: Path) -> None:
        model = open_run["model"]
        assert not names(model) & {"config.json", "model.safetensors.index.json"}
        before = fingerprint(model)
        data = tmp_path / "data.jsonl"
        data.write_text('{"text": "a few words"}\n')
        refused = "an in-place run has not been finished; finish it with: perta resume"
        attempts = [
            lambda: change(open_run),
            lambda: apply(*open_run.all, lam=1.0, out=tmp_path / "out"),
            lambda: apply(open_run["base"], open_run["base"], open_run["tuned"], rule="tv", out=model, overwrite=True),
            lambda: apply(open_run["base"], model, open_run["tuned"], rule="tv", out=tmp_path / "out"),
            lambda: unlearn(*open_run.checkpoints, "f", "r", out=tmp_path / "out", lam=1.0, rule="fisher"),
            lambda: estimate_importance(model, data),
            lambda: verify(model, progress=False),
            lambda: Report.load(model),
        ]
        for attempt in attempts:
            with pytest.raises(InputError, match=refused):
                attempt()
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(model)
        assert fingerprint(model) == before

    def test_it_can_be_finished(self, open_run: Inputs, tmp_path: Path) -> None:
        fresh = write_inputs(tmp_path / "fresh", shards=2)
        apply(*fresh.all, lam=0.7, out=tmp_path / "out", progress=False)
        report = resume(open_run["model"], progress=False)
        assert report.resumed == 1
        assert shards(open_run["model"]) == shards(tmp_path / "out")
        assert names(open_run["model"]) == names(tmp_path / "out") | {"config.json"}
        found = {(row.name, row.action, row.changed) for row in report.tensors}
        assert found == {(row.name, row.action, row.changed) for row in Report.load(tmp_path / "out").tensors}
        with pytest.raises(InputError, match="no unfinished run to resume"):
            resume(open_run["model"])

    def test_it_can_be_finished_where_it_was_moved_to(self, open_run: Inputs, tmp_path: Path) -> None:
        open_run["model"].rename(tmp_path / "moved")
        resume(tmp_path / "moved", progress=False)
        assert "config.json" in names(tmp_path / "moved")

    @pytest.mark.parametrize("role", ["base", "tuned", "forget", "retain"])
    def test_a_changed_input_is_refused(self, role: str, open_run: Inputs) -> None:
        shard = sorted(open_run[role].glob("*.safetensors"))[0]
        content = shard.read_bytes()
        before = fingerprint(open_run["model"])
        for damage in (content[:-1] + bytes([content[-1] ^ 1]), content[:-1], content[:30] + b" " + content[31:]):
            shard.write_bytes(damage)
            with pytest.raises(InputError, match=str(shard.name)):
                resume(open_run["model"])
            after = fingerprint(open_run["model"])
            assert {p: h for p, h in after.items() if p.name != "job.json"} == {
                p: h for p, h in before.items() if p.name != "job.json"
            }
        shard.write_bytes(content)
        resume(open_run["model"], progress=False)

    def test_two_runs_on_one_model_are_kept_apart(self, open_run: Inputs) -> None:
        busy = pytest.raises(RunError, match="another run is changing it now")
        with locked_journal(open_run["model"]), busy:
            resume(open_run["model"])

    @pytest.mark.parametrize("damage", [b"", b"{}", b"[" * 100_000, b'{"format": "perta-run"}', b"\xff"])
    @pytest.mark.parametrize("hashed", [False, True])
    def test_a_damaged_description_is_refused(self, damage: bytes, hashed: bool, open_run: Inputs) -> None:
        job = open_run["model"] / ".perta-journal" / "job.json"
        job.write_bytes(blake3(damage).hexdigest().encode() + b"\n" + damage if hashed else damage)
        before = fingerprint(open_run["model"])
        with pytest.raises(InputError, match=r"job\.json: "):
            resume(open_run["model"])
        assert fingerprint(open_run["model"]) == before

    def test_another_version_is_refused(self, open_run: Inputs) -> None:
        path = open_run["model"] / ".perta-journal" / "job.json"
        write_record(path, read_record(path) | {"version": "0.0"})
        with pytest.raises(InputError, match=r"begun by perta_fast 0\.0, .*install that version"):
            resume(open_run["model"])

    @pytest.mark.parametrize(
        ("key", "value"), [("lam", None), ("p", []), ("directories", None), ("matches", [{}]), ("report", {})]
    )
    def test_a_description_of_other_types_is_refused(self, key: str, value: object, open_run: Inputs) -> None:
        path = open_run["model"] / ".perta-journal" / "job.json"
        write_record(path, read_record(path) | {key: value})
        with pytest.raises(InputError):
            resume(open_run["model"])

    def test_a_segment_that_may_have_been_applied_must_be_whole(self, open_run: Inputs) -> None:
        """Else its chunks would be subtracted a second time."""
        journal = open_run["model"] / ".perta-journal"
        applied = read_record(journal / "applying")
        segment = journal / f"segment-{applied % 3}"
        content = bytearray(segment.read_bytes())
        content[5000] ^= 1
        for number in range(applied + 1, applied + 3):  # as if these had not been begun
            (journal / f"segment-{number % 3}").unlink(missing_ok=True)
        segment.write_bytes(content)
        before = shards(open_run["model"])
        with pytest.raises(InputError, match=rf"segment {applied} is not what was written and may be in the shards"):
            resume(open_run["model"])
        assert shards(open_run["model"]) == before

    def test_a_segment_of_another_run_is_refused(self, open_run: Inputs) -> None:
        model = open_run["model"]
        for name, state in (("config.json", {"chunks": 0, "totals": {}}), ("model.safetensors", {})):
            with new_segment(model / ".perta-journal", 7) as segment:
                segment.put(name, 0, memoryview(b"evil"), 4096)
                segment.seal(state)
            before = shards(model)
            with pytest.raises(InputError, match="segment-1: does not belong to the run"):
                resume(model)
            assert shards(model) == before

    def test_nothing_else_can_be_removed(self, open_run: Inputs, tmp_path: Path) -> None:
        precious = tmp_path / "precious"
        precious.mkdir()
        path = open_run["model"] / ".perta-journal" / "job.json"
        write_record(path, read_record(path) | {"temporary": str(precious)})
        with pytest.raises(InputError, match="not a description that this version understands"):
            resume(open_run["model"])
        assert precious.exists()


def kill_at(call: str, inputs: Inputs, earlier: int = 0) -> None:
    """Kill a run in place when it makes a call, once it was made ``earlier`` times."""
    paths = [text for role, path in zip(OPTIONS, inputs.all, strict=True) for text in (f"--{role}", path)]
    killed = perta("apply", *paths, "--lam", "0.7", "--in-place", setup=signal_at("SIGKILL", call, earlier=earlier))
    assert killed.returncode == -9
    assert not is_open(inputs["model"])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("subtraction.in_place._rehearse", "stopped before it changed anything: run the same command again"),
        ("subtraction.in_place.describe_inputs", "stopped before it changed anything: run the same command again"),
        ("subtraction.journal_directory.lock", "stopped as it began or ended; perta_report.json there says whether"),
    ],
)
def test_what_is_left_of_a_run_that_was_killed_before_it_changed_anything(call: str, said: str, inputs: Inputs) -> None:
    before = fingerprint(inputs["model"])
    kill_at(call, inputs)
    with pytest.raises(InputError, match=f"there is no unfinished run to resume; one in place was {said}"):
        resume(inputs["model"])
    assert fingerprint(inputs["model"]) == before
    assert ".perta-journal" not in names(inputs["model"])
    with pytest.raises(InputError, match=r"there is no unfinished run to resume$"):
        resume(inputs["model"])


@pytest.mark.parametrize("earlier", [1, 2, 4])
def test_what_is_left_of_a_run_that_was_killed_when_it_was_complete(earlier: int, inputs: Inputs) -> None:
    kill_at("subtraction.journal_directory.remove", inputs, earlier)
    report = Report.load(inputs["model"])
    done = shards(inputs["model"])
    with pytest.raises(InputError, match=r"would change it a second time\. Do these steps with: perta resume"):
        change(inputs)
    assert resume(inputs["model"], progress=False) == report
    assert shards(inputs["model"]) == done
    assert ".perta-journal" not in names(inputs["model"])
    with pytest.raises(InputError, match=r"there is no unfinished run to resume$"):
        resume(inputs["model"])


def test_a_run_that_rehearses_is_left_alone(inputs: Inputs) -> None:
    with locked_journal(inputs["model"]), pytest.raises(RunError, match="another run is changing it now"):
        resume(inputs["model"])


def test_leftovers_of_a_finished_run_are_never_replayed(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the last rename but before its journal was gone, as a power cut can."""
    with monkeypatch.context() as patch:
        patch.setattr(journal_directory, "remove", lambda path: None)
        change(inputs)
    assert (inputs["model"] / ".perta-journal" / "segment-0").exists()
    resume(inputs["model"], progress=False)
    apply(*inputs.all, lam=0.3, out=tmp_path / "out", progress=False)
    seal = in_place.Segment.seal

    def stop(segment: in_place.Segment, state: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(in_place.Segment, "seal", stop)
    with pytest.raises(Interrupted):
        apply(*inputs.all, lam=0.3, in_place=True, progress=False)
    monkeypatch.setattr(in_place.Segment, "seal", seal)
    resume(inputs["model"], progress=False)
    assert shards(inputs["model"]) == shards(tmp_path / "out")


@pytest.mark.parametrize("again", [False, True])
def test_stopped_after_the_last_change_it_says_so(
    again: bool, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To run the same command again would subtract twice."""
    apply(*inputs.all, lam=0.7, out=tmp_path / "out", progress=False)
    if again:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(in_place, "SEGMENT", 256)
            stop_at_the_second_segment(patch)
            change(inputs, threads=2)
    remove = journal_directory.remove

    def stop(path: Path) -> None:
        if path.name == ".perta-journal":
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(journal_directory, "remove", stop)
    with pytest.raises(Interrupted, match="is complete; do not run the same command again"):
        resume(inputs["model"], progress=False) if again else change(inputs)
    assert shards(inputs["model"]) == shards(tmp_path / "out")


def test_from_a_shell(inputs: Inputs) -> None:
    model, base, tuned = inputs.checkpoints
    command = ["apply", "--model", model, "--base", base, "--tuned", tuned, "--rule", "tv", "--lam", "1"]
    stopped = perta(*command, "--in-place", setup=signal_at("SIGINT", "subtraction.in_place.describe_output"))
    assert stopped.returncode == 130
    assert stopped.stderr == (
        f"perta: interrupted; {model} is half changed and cannot be loaded; finish the run with: perta resume {model}\n"
    )
    refused = perta(*command, "--in-place")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"perta resume {model}" in refused.stderr
    finished = perta("resume", model)
    assert finished.returncode == 0
    assert finished.stdout.endswith(f"written to {model}\n")
    assert perta("resume", model).returncode == 2


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("keep", [False, True])
def test_unlearn_in_place(keep: bool, job: Job, tmp_path: Path) -> None:
    model = shutil.copytree(job.model, tmp_path / "model")
    data = (job.forget, job.retain)
    kept = tmp_path / "kept" if keep else None
    unlearn(job.model, job.base, job.tuned, *data, lam=1.0, out=tmp_path / "out", progress=False, rule="fisher")
    report = unlearn(
        *(model, job.base, job.tuned, *data),
        lam=1.0,
        in_place=True,
        save_importance=kept,
        progress=False,
        rule="fisher",
    )
    assert shards(model) == shards(tmp_path / "out")
    assert names(tmp_path) == {"model", "out"} | ({"kept"} if keep else set())
    assert report.data.keys() == {"forget", "retain"}
    AutoModelForCausalLM.from_pretrained(model)


@pytest.mark.usefixtures("one_thread")
def test_unlearn_in_place_is_finished_with_the_importances_it_had(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(job.model, tmp_path / "model")
    monkeypatch.setattr(subtraction, "CHUNK", 512)
    monkeypatch.setattr(in_place, "SEGMENT", 4096)
    with monkeypatch.context() as patch:
        patch.setattr(in_place, "describe_output", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            unlearn(
                *(model, job.base, job.tuned, job.forget, job.retain),
                lam=1.0,
                in_place=True,
                progress=False,
                rule="fisher",
            )
    assert len(names(tmp_path)) == 2
    report = resume(model, progress=False)
    assert names(tmp_path) == {"model"}
    assert report.data.keys() == {"forget", "retain"}
    assert verify(model, progress=False).problems == []
    importance = {role: report.importance[f"{role}_importance"] for role in ("forget", "retain")}
    assert importance["forget"]["data_hash"] == report.data["forget"]["blake3"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rule", ["fisher", "preconditioned"])
def test_unlearn_in_place_that_was_killed_before_its_last_removal(rule: str, job: Job, tmp_path: Path) -> None:
    """What it had made beside the model is still there, and goes."""
    model = shutil.copytree(job.model, tmp_path / "model")
    given = {"model": model, "base": job.base, "tuned": job.tuned, "forget": job.forget, "retain": job.retain}
    paths = [text for name, path in given.items() for text in (f"--{name}", path)]
    at_the_scratch = signal_at("SIGKILL", "subtraction.in_place.remove_scratch")
    killed = perta("unlearn", *paths, "--rule", rule, "--lam", "1", "--in-place", "--no-check", setup=at_the_scratch)
    assert killed.returncode == -9
    assert len(names(tmp_path)) == 2 and not is_open(model)
    resume(model, progress=False)
    assert names(tmp_path) == {"model"} and ".perta-journal" not in names(model)


@pytest.mark.parametrize("drop_cache", [False, True])
def test_offsets_beyond_four_gibibytes(drop_cache: bool, tmp_path: Path) -> None:
    """Sparse files: a tensor of 5 GiB that nothing covers, and a small one behind it."""
    size = 5 << 30
    for number, role in enumerate(("model", "base", "tuned")):
        (tmp_path / role).mkdir()
        header = {
            "big": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
            "small": {"dtype": "F32", "shape": [100], "data_offsets": [size, size + 400]},
        }
        with write_raw(tmp_path / role / "model.safetensors", header).open("ab") as file:
            file.truncate(file.tell() + size)
            file.seek(0, 2)
            file.write(draw((100,), seed=number).numpy().tobytes())
    theta, base, tuned = (draw((100,), seed=k) for k in range(3))
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("perta_fast.subtraction.report_entries.hash_files", lambda paths, *_: dict.fromkeys(paths, ""))
        apply(
            *(tmp_path / role for role in ("model", "base", "tuned")),
            rule="tv",
            lam=1.0,
            in_place=True,
            drop_cache=drop_cache,
            progress=False,
        )
    with (tmp_path / "model" / "model.safetensors").open("rb") as file:
        file.seek(-400, 2)
        assert file.read() == (theta - (tuned - base)).numpy().tobytes()
    assert (tmp_path / "model" / "model.safetensors").stat().st_blocks * 512 < 1 << 20


def test_importance_objects_serve_too(inputs: Inputs, tmp_path: Path) -> None:
    apply(*inputs.all, lam=0.7, out=tmp_path / "out", progress=False)
    importances = [Importance.load(inputs[role]) for role in ("forget", "retain")]
    apply(*inputs.checkpoints, *importances, lam=0.7, in_place=True, progress=False)
    assert shards(inputs["model"]) == shards(tmp_path / "out")


def linked(model: Path, *names: str) -> Path:
    """Move files of ``model`` into a hub cache's blobs and link them, as relative links; returns the blobs."""
    blobs = model.parent.parent / "blobs"
    blobs.mkdir()
    for number, name in enumerate(names):
        (model / name).rename(blobs / f"{number:040x}")
        (model / name).symlink_to(Path("../../blobs") / f"{number:040x}")
    return blobs


@pytest.fixture
def cached(tmp_path: Path) -> Inputs:
    """Inputs whose model has config, index, card and tokenizer as links into a hub cache, and shards as files."""
    inputs = write_inputs(tmp_path / "models--x" / "snapshots", shards=2)
    for name in ("config.json", "tokenizer.json", "README.md"):
        (inputs["model"] / name).write_text(f'{{"name": "{name}"}}')
    linked(inputs["model"], "config.json", "model.safetensors.index.json", "tokenizer.json", "README.md")
    return inputs


class TestLinksOfAHubCache:
    STAGES = ("describe_inputs", "_rehearse", "_change", "describe_output", "write_model_card", "second segment")

    def expected(self, cached: Inputs, out: Path) -> dict[str, bytes]:
        apply(*cached.all, lam=0.7, out=out, progress=False)
        return shards(out)

    def assert_done(self, cached: Inputs, blobs: dict[Path, str], expected: dict[str, bytes]) -> None:
        model = cached["model"]
        assert shards(model) == expected
        for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
            assert (model / name).readlink().parent == Path("../../blobs")
            assert (model / name).is_file()
        assert not (model / "README.md").is_symlink()  # a new one, with what the old one said
        assert (model / "README.md").read_text().startswith('{"name": "README.md"}\n\n## Unlearned')
        assert not (model / ".perta-journal").exists()
        assert fingerprint(model.parent.parent / "blobs") == blobs

    @pytest.mark.parametrize("stage", [None, *STAGES])
    def test_they_survive(
        self, stage: str | None, cached: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = self.expected(cached, tmp_path / "out")
        blobs = fingerprint(cached.folder.parent / "blobs")
        monkeypatch.setattr(subtraction, "CHUNK", 64)
        monkeypatch.setattr(in_place, "SEGMENT", 700)
        if stage is not None:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                if stage == "second segment":
                    stop_at_the_second_segment(patch)
                else:
                    patch.setattr(in_place, stage, interrupt)
                change(cached)
            if is_open(cached["model"]):
                resume(cached["model"], progress=False)
                self.assert_done(cached, blobs, expected)
                return
        change(cached)
        self.assert_done(cached, blobs, expected)

    @pytest.mark.parametrize("moves", range(2, 12))
    def test_stopped_between_two_moves(
        self, moves: int, cached: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = self.expected(cached, tmp_path / "out")
        blobs = fingerprint(cached.folder.parent / "blobs")
        move, calls = in_place.move, []

        def stop_after(source: Path, target: Path) -> None:
            move(source, target)
            calls.append(source)
            if len(calls) == moves:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(in_place, "move", stop_after)
            try:
                change(cached)
            except Interrupted:
                resume(cached["model"], progress=False)
        self.assert_done(cached, blobs, expected)

    def test_an_absolute_link_survives(self, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = inputs["model"]
        for name in ("config.json", "model.safetensors.index.json"):
            if name == "config.json":
                (model / name).write_text("{}")
            (model / name).rename(tmp_path / name)
            (model / name).symlink_to(tmp_path / name)
        before = fingerprint(tmp_path / "config.json", tmp_path / "model.safetensors.index.json")
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(in_place, "describe_output", interrupt)
            change(inputs)
        assert not names(model) & {"config.json", "model.safetensors.index.json"}
        resume(model, progress=False)
        assert (model / "config.json").readlink() == tmp_path / "config.json"
        assert (model / "model.safetensors.index.json").is_symlink()
        assert fingerprint(tmp_path / "config.json", tmp_path / "model.safetensors.index.json") == before


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


# What a run in place would find only at its end.
IN_THE_WAY: dict[str, Any] = {
    "directory": Path.mkdir,
    "pipe": os.mkfifo,
    "link to another's file": lambda path: path.symlink_to(path.parent.parent / "private.txt"),
    "link to nothing": lambda path: path.symlink_to("../nothing"),
    "link to itself": make_loop,
}


@pytest.mark.parametrize("kind", IN_THE_WAY)
@pytest.mark.parametrize("name", ["README.md", "perta_report.json"])
def test_what_would_fail_at_the_end_is_refused_before(name: str, kind: str, inputs: Inputs) -> None:
    model = inputs["model"]
    (inputs.folder / "private.txt").write_text("private")
    IN_THE_WAY[kind](model / name)
    before, present = fingerprint(inputs.folder), sorted(inputs.folder.rglob("*"))
    with pytest.raises(InputError, match=rf"{name}: (is not a file|is a link to|cannot be read)"):
        change(inputs)
    assert fingerprint(inputs.folder) == before
    assert sorted(inputs.folder.rglob("*")) == present
    if kind == "directory":
        (model / name).rmdir()
    else:
        (model / name).unlink()
    change(inputs)


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_a_config_that_is_no_file_is_refused(kind: str, inputs: Inputs) -> None:
    IN_THE_WAY[kind](inputs["model"] / "config.json")
    before = sorted(inputs.folder.rglob("*"))
    with pytest.raises(InputError, match=r"config\.json: cannot be read: (Is a directory|Not a regular file)"):
        change(inputs)
    assert sorted(inputs.folder.rglob("*")) == before


@pytest.mark.parametrize("kind", ["link to nothing", "link to itself"])
def test_a_config_that_leads_nowhere_is_refused(kind: str, inputs: Inputs) -> None:
    """It would be missed at the end, with the model half changed."""
    IN_THE_WAY[kind](inputs["model"] / "config.json")
    before, present = fingerprint(inputs.folder), sorted(inputs.folder.rglob("*"))
    with pytest.raises(InputError, match=r"config\.json: is a link to .*, where nothing is"):
        change(inputs)
    assert fingerprint(inputs.folder) == before
    assert sorted(inputs.folder.rglob("*")) == present
    (inputs["model"] / "config.json").unlink()
    change(inputs)


def test_a_file_that_cannot_be_read_is_refused_before(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hash belongs in the list of files."""
    notice = inputs["model"] / "LICENSE"
    notice.write_text("as you like")
    before = fingerprint(inputs.folder)
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != notice and may(path, mode))
    with pytest.raises(InputError, match=r"LICENSE: cannot be read"):
        change(inputs)
    assert fingerprint(inputs.folder) == before


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stream", [False, True])
def test_unlearn_in_place_is_refused_before_the_first_gradient(
    stream: bool, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(job.model, tmp_path / "model")
    (model / "README.md").mkdir()
    monkeypatch.setattr("perta_fast.models.loading.load_subject", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match=r"README\.md: is not a file"):
        unlearn(
            model,
            job.base,
            job.tuned,
            job.forget,
            job.retain,
            in_place=True,
            stream=stream,
            progress=False,
            lam=1.0,
            rule="fisher",
        )
