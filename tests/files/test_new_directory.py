"""The output appears whole or not at all, whatever was there before and however the run ends."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.errors import InputError, RunError
from perta_fast.files.disk_space import FREE_MARGIN
from perta_fast.files.new_directory import OutputDirectory, partial_path
from perta_fast.importance.store import Importance
from perta_fast.resuming import resume
from perta_fast.runs.apply import apply
from perta_fast.runs.unlearn import unlearn
from perta_fast.subtraction import compute as subtraction
from perta_fast.subtraction import to_directory
from tests.support.checkpoints import draw, fingerprint, read_checkpoint, write_checkpoint, write_importance
from tests.support.children import perta, run_child, signal_at
from tests.support.disks import with_free
from tests.support.inputs import Inputs, write_inputs
from tests.support.models import Job


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return write_inputs(tmp_path / "inputs", shards=2)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the run writes: a directory of its own holds it, so that whatever is left behind shows."""
    place = tmp_path / "place"
    place.mkdir()
    return place / "out"


def run(inputs: Inputs, out: Path, overwrite: bool = False) -> None:
    apply(*inputs.checkpoints, rule="tv", lam=1.0, out=out, overwrite=overwrite)


def arguments(inputs: Inputs, out: Path, *more: str) -> list[object]:
    model, base, tuned = inputs.checkpoints
    return [
        *("apply", "--model", model, "--base", base, "--tuned", tuned),
        *("--rule", "tv", "--lam", "1", "--out", out, *more),
    ]


def old_directory(path: Path) -> dict[Path, str]:
    """A non-empty directory, and its fingerprint."""
    (path / "below").mkdir(parents=True)
    (path / "below" / "old.txt").write_text("old")
    return fingerprint(path)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_complete(inputs: Inputs, out: Path) -> None:
    """The output is there, right, and alone in its directory."""
    found, expected = read_checkpoint(out), inputs.expected(None, 1.0)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (out / "perta_report.json").exists()
    assert names(out.parent) == {"out"}


class TestWhatIsInTheWay:
    def test_a_directory_that_is_not_empty_is_refused(self, inputs: Inputs, out: Path) -> None:
        before = old_directory(out)
        with pytest.raises(InputError, match=r"out: exists and is not empty; .* pass overwrite"):
            run(inputs, out)
        assert fingerprint(out.parent) == before

    def test_an_empty_directory_is_used(self, inputs: Inputs, out: Path) -> None:
        out.mkdir()
        run(inputs, out)
        assert_complete(inputs, out)

    def test_missing_parents_are_made(self, inputs: Inputs, out: Path) -> None:
        run(inputs, out / "a" / "out")
        assert_complete(inputs, out / "a" / "out")

    def test_overwrite_replaces_all_that_was_there(self, inputs: Inputs, out: Path) -> None:
        old_directory(out)
        run(inputs, out, overwrite=True)
        assert_complete(inputs, out)

    @pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
    @pytest.mark.parametrize(("module", "place"), [(to_directory, "copy_companions"), (subtraction, "_check_finite")])
    def test_a_failure_keeps_the_old_one(
        self,
        error: type[BaseException],
        module: ModuleType,
        place: str,
        inputs: Inputs,
        out: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        before = old_directory(out)

        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(module, place, fail)
        with pytest.raises(RunError if error is OSError else error):
            run(inputs, out, overwrite=True)
        assert fingerprint(out.parent) == before
        assert names(out.parent) == {"out"}

    def test_a_link_stays_and_what_it_points_to_is_written(self, inputs: Inputs, out: Path) -> None:
        disk = out.parent.parent / "disk"
        disk.mkdir()
        out.symlink_to(disk / "out")
        run(inputs, out)
        assert out.is_symlink()
        assert names(out.parent) == {"out"}
        assert_complete(inputs, disk / "out")

    def test_what_comes_while_the_run_works_is_not_replaced(
        self, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(to_directory, "write_model_card", lambda *_: old_directory(out))
        with pytest.raises(RunError, match=r"out: could not be written: .*not empty.*perta resume"):
            run(inputs, out)
        assert (out / "below" / "old.txt").read_text() == "old"
        shutil.rmtree(out)
        monkeypatch.undo()
        resume(out)
        assert_complete(inputs, out)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_file_is_refused(self, overwrite: bool, inputs: Inputs, out: Path) -> None:
        out.write_text("mine")
        for place in (out, out / "below"):
            with pytest.raises(InputError, match="is not a directory, or lies below a file"):
                run(inputs, place, overwrite)
        assert out.read_text() == "mine"

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize(
        ("place", "reason"), [("/", "is the root of the file system"), ("x" * 300, "cannot be read: File name")]
    )
    def test_places_that_cannot_be_are_refused(self, place: str, reason: str, overwrite: bool, inputs: Inputs) -> None:
        with pytest.raises(InputError, match=reason):
            run(inputs, Path(place), overwrite)


PLACES: dict[str, Callable[[Inputs], Path]] = {
    "the model": lambda inputs: inputs["model"],
    "the base": lambda inputs: inputs["base"],
    "the tuned": lambda inputs: inputs["tuned"],
    "the forget importance": lambda inputs: inputs["forget"],
    "the retain importance": lambda inputs: inputs["retain"],
    "what holds them all": lambda inputs: inputs.folder,
    "what holds that": lambda inputs: inputs.folder.parent,
    "another way there": lambda inputs: inputs["model"] / ".." / "base" / "..",
}


@pytest.mark.parametrize("place", PLACES)
def test_no_input_is_overwritten(place: str, inputs: Inputs) -> None:
    before = fingerprint(inputs.folder)
    with pytest.raises(InputError, match="is or contains the input"):
        apply(*inputs.all, lam=1.0, out=PLACES[place](inputs), overwrite=True)
    assert fingerprint(inputs.folder) == before


def test_no_input_is_overwritten_through_a_link(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(inputs["model"])
    before = fingerprint(inputs.folder)
    with pytest.raises(InputError, match="is or contains the input"):
        run(inputs, tmp_path / "link", overwrite=True)
    assert fingerprint(inputs.folder) == before


def test_the_files_behind_the_links_of_a_hub_cache_are_not_overwritten(inputs: Inputs, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in inputs["model"].iterdir():
        (snapshot / path.name).symlink_to(path)
    before = fingerprint(inputs["model"])
    with pytest.raises(InputError, match="is or contains the input"):
        apply(snapshot, inputs["base"], inputs["tuned"], rule="tv", lam=1.0, out=inputs["model"], overwrite=True)
    assert fingerprint(inputs["model"]) == before


def test_a_new_directory_inside_an_input_is_allowed(inputs: Inputs) -> None:
    run(inputs, inputs["model"] / "unlearned")
    assert (inputs["model"] / "unlearned" / "perta_report.json").exists()


class TestUnlearn:
    """The data files and the kept importances are inputs and outputs too."""

    @pytest.mark.parametrize("role", ["forget", "retain"])
    def test_the_directory_of_a_data_file_is_not_overwritten(self, role: str, job: Job, tmp_path: Path) -> None:
        data = tmp_path / "data"
        data.mkdir()
        files = {name: getattr(job, name) for name in ("forget", "retain")}
        files[role] = data / "mine.jsonl"
        files[role].write_bytes(getattr(job, role).read_bytes())
        with pytest.raises(InputError, match=r"is or contains the input .*mine\.jsonl"):
            unlearn(*job.checkpoints, **{"rule": "fisher"} | files, lam=1.0, out=data, overwrite=True)
        assert names(data) == {"mine.jsonl"}

    @pytest.mark.parametrize(
        ("kept", "out"), [("out", "out"), ("out/kept", "out"), ("kept", "kept/out"), ("base", "out")]
    )
    def test_output_importances_and_inputs_are_kept_apart(self, kept: str, out: str, job: Job, tmp_path: Path) -> None:
        folder = shutil.copytree(job.base, tmp_path / "base")
        with pytest.raises(InputError, match="is or contains the input"):
            unlearn(
                job.model,
                folder,
                job.tuned,
                job.forget,
                job.retain,
                lam=1.0,
                out=tmp_path / out,
                save_importance=tmp_path / kept,
                overwrite=True,
                rule="fisher",
            )
        assert names(tmp_path) == {"base"}


def test_an_importance_is_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_importance(tmp_path / "source", {"a": draw((9,)), "b": draw((3,))})
    importance = Importance.load(source)
    (tmp_path / "place").mkdir()
    importance.save(tmp_path / "place" / "kept")
    with pytest.raises(InputError, match="exists and is not empty"):
        importance.save(tmp_path / "place" / "kept")
    before = fingerprint(tmp_path / "place")
    monkeypatch.setattr("perta_fast.importance.store.write_fully", lambda *_: 1 / 0)
    for name in ("kept", "other"):
        with pytest.raises(ZeroDivisionError):
            importance.save(tmp_path / "place" / name, overwrite=True)
    assert fingerprint(tmp_path / "place") == before
    assert names(tmp_path / "place") == {"kept"}


def test_all_is_on_the_disk_before_it_is_shown(inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    shown: list[set[int]] = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def note_rename(path: Path, target: Path) -> Path:
        if path.is_dir():
            shown.append({each.stat().st_ino for each in (path, *path.iterdir())} - synced)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    run(inputs, out)
    assert shown == [set()]
    assert out.parent.stat().st_ino in synced  # the rename itself


def test_short_writes_are_continued(inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:11], offset))
    run(inputs, out)
    assert_complete(inputs, out)


def test_two_runs_on_one_output_are_kept_apart(inputs: Inputs, out: Path) -> None:
    with OutputDirectory(out) as first:
        (first.path / "half.txt").write_text("half")
        with pytest.raises(RunError, match="out: another run is writing it now"):
            run(inputs, out)
        process = perta(*arguments(inputs, out))
        assert (process.returncode, process.stdout) == (1, "")
        assert process.stderr == f"perta: error: {out}: another run is writing it now\n"
        assert (first.path / "half.txt").read_text() == "half"
        first.commit()
    assert names(out) == {"half.txt"}


# Every stage: before the weights, among them, after them, before the rename.
STAGES = (
    "subtraction.to_directory.copy_companions",
    "subtraction.compute._check_finite",
    "subtraction.to_directory.describe_inputs",
    "files.new_directory.sync_tree",
)
BEFORE_A_SHARD_IS_DONE = STAGES[:2]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_it_shows_nothing_and_the_next_run_completes_it(stage: str, inputs: Inputs, out: Path) -> None:
    before = fingerprint(inputs.folder)
    process = perta(*arguments(inputs, out), setup=signal_at("SIGKILL", stage))
    assert process.returncode == -9
    assert not out.exists()
    assert all(name.startswith(".") for name in names(out.parent))
    assert fingerprint(inputs.folder) == before
    run(inputs, out)
    assert_complete(inputs, out)


def test_killed_after_the_rename_it_is_complete(inputs: Inputs, out: Path) -> None:
    process = perta(*arguments(inputs, out), setup=signal_at("SIGKILL", "files.new_directory.move", after=True))
    assert process.returncode == -9
    assert_complete(inputs, out)


def test_killed_between_the_two_renames_the_old_one_is_not_lost(inputs: Inputs, out: Path) -> None:
    before = old_directory(out)
    setup = signal_at("SIGKILL", "files.new_directory.move", after=True)
    assert perta(*arguments(inputs, out, "--overwrite"), setup=setup).returncode == -9
    assert not out.exists()
    kept = fingerprint(out.parent / ".out.perta-replaced")
    assert list(kept.values()) == list(before.values())
    resume(out)
    assert_complete(inputs, out)


class TestKilledAfterTheLastRename:
    """The new directory is complete, and the one that it replaced lies hidden beside it."""

    REPLACED = ".out.perta-replaced"

    @pytest.fixture(autouse=True)
    def killed(self, inputs: Inputs, out: Path) -> None:
        old_directory(out)
        setup = signal_at("SIGKILL", "files.new_directory.move", after=True, earlier=1)
        assert perta(*arguments(inputs, out, "--overwrite"), setup=setup).returncode == -9
        assert names(out.parent) == {"out", self.REPLACED}
        assert (out.parent / self.REPLACED / "below" / "old.txt").read_text() == "old"

    def test_the_next_run_removes_the_old_one_before_it_works(
        self, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        during: list[set[str]] = []
        copy = to_directory.copy_companions

        def note(*sources: Any) -> None:
            during.append(names(out.parent))
            copy(*sources)

        monkeypatch.setattr(to_directory, "copy_companions", note)
        run(inputs, out, overwrite=True)
        assert during == [{"out", ".out.perta-partial"}]
        assert_complete(inputs, out)

    def test_resume_removes_the_old_one(self, inputs: Inputs, out: Path) -> None:
        resume(out)
        assert_complete(inputs, out)

    def test_a_run_that_is_refused_removes_nothing(self, inputs: Inputs, out: Path) -> None:
        before = fingerprint(out.parent)
        with pytest.raises(InputError, match="exists and is not empty"):
            run(inputs, out)
        assert fingerprint(out.parent) == before

    @pytest.mark.parametrize("finish", [partial(run, overwrite=True), lambda _, out: resume(out)])
    def test_only_what_bears_the_name_goes_and_no_link_is_followed(
        self, finish: Callable[[Inputs, Path], object], inputs: Inputs, out: Path
    ) -> None:
        mine = out.parent.parent / "mine"
        before = old_directory(mine)
        other = old_directory(out.with_name(".other.perta-replaced"))
        (out.parent / self.REPLACED / "link").symlink_to(mine)
        finish(inputs, out)
        assert fingerprint(mine) == before
        assert fingerprint(out.with_name(".other.perta-replaced")) == other
        assert names(out.parent) == {"out", ".other.perta-replaced"}

    def test_a_link_of_that_name_stays(self, out: Path) -> None:
        mine = out.parent.parent / "mine"
        (out.parent / self.REPLACED).rename(mine)
        before = fingerprint(mine)
        (out.parent / self.REPLACED).symlink_to(mine)
        resume(out)
        assert fingerprint(mine) == before
        assert (out.parent / self.REPLACED).is_symlink()


def test_killed_while_it_starts_over_it_takes_up_nothing_half_removed(inputs: Inputs, out: Path) -> None:
    late, clearing = (
        signal_at("SIGKILL", "files.new_directory.sync_tree"),
        signal_at("SIGKILL", "files.new_directory.remove"),
    )
    assert perta(*arguments(inputs, out), setup=late).returncode == -9
    assert perta(*arguments(inputs, out, "--overwrite"), setup=clearing).returncode == -9
    with pytest.raises(InputError, match=r"no unfinished run to resume; .* run the same command again"):
        resume(out)
    run(inputs, out)
    assert_complete(inputs, out)


@pytest.mark.usefixtures("one_thread")
def test_killed_during_unlearn_the_next_run_clears_the_importances_away(job: Job, out: Path) -> None:
    model, base, tuned = job.checkpoints
    process = perta(
        *("unlearn", "--rule=fisher", "--model", model, "--base", base, "--tuned", tuned, "--lam", "1", "--out", out),
        *("--forget", job.forget, "--retain", job.retain),
        setup=signal_at("SIGKILL", "subtraction.compute._check_finite"),
    )
    assert process.returncode == -9
    assert all(name.startswith(".") for name in names(out.parent))
    assert len(names(out.parent)) > 1
    unlearn(*job.checkpoints, job.forget, job.retain, lam=1.0, out=out, rule="fisher")
    assert names(out.parent) == {"out"}


@pytest.mark.parametrize(
    ("signal", "stage"), [("SIGTERM", STAGES[1]), *(("SIGINT", stage) for stage in BEFORE_A_SHARD_IS_DONE)]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_interrupted_early_it_leaves_nothing_behind(
    signal: str, stage: str, overwrite: bool, inputs: Inputs, out: Path
) -> None:
    before = old_directory(out) if overwrite else {}
    untouched = fingerprint(inputs.folder)
    more = ["--threads", "1", *(["--overwrite"] if overwrite else [])]  # no other thread finishes a shard
    process = perta(*arguments(inputs, out, *more), setup=signal_at(signal, stage))
    assert process.returncode == 130
    assert process.stderr.startswith("perta: interrupted; the inputs are untouched and no partial output is left")
    assert process.stderr.count("\n") == 1
    assert fingerprint(out.parent) == before
    assert names(out.parent) == ({"out"} if overwrite else set())
    assert fingerprint(inputs.folder) == untouched


@pytest.mark.parametrize("stage", [*STAGES[2:], "files.new_directory.move"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_interrupted_late_it_can_be_resumed(stage: str, overwrite: bool, inputs: Inputs, out: Path) -> None:
    before = old_directory(out) if overwrite else {}
    more = ["--overwrite"] if overwrite else []
    process = perta(*arguments(inputs, out, *more), setup=signal_at("SIGINT", stage))
    assert process.returncode == 130
    assert process.stderr == (
        f"perta: interrupted; the inputs are untouched. Finish the run with: perta resume {out}\n"
    )
    assert {path: digest for path, digest in fingerprint(out.parent).items() if out in path.parents} == before
    assert all(name == "out" or name.startswith(".") for name in names(out.parent))
    shards = {path: path.stat().st_mtime_ns for path in out.parent.glob(".*/*.safetensors")}
    assert shards
    report = resume(out)
    assert report.resumed == 1
    assert_complete(inputs, out)
    assert {out / path.name: changed for path, changed in shards.items()} == {
        path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")
    }


def test_unfinished_work_of_another_run_is_not_thrown_away_unasked(inputs: Inputs, out: Path) -> None:
    setup = signal_at("SIGKILL", "subtraction.to_directory.describe_inputs")
    assert perta(*arguments(inputs, out), setup=setup).returncode == -9
    before = fingerprint(out.parent)
    with pytest.raises(InputError, match=r"another run to this place was stopped.*perta resume.*with overwrite"):
        apply(*inputs.checkpoints, rule="tv", lam=2.0, out=out)
    assert fingerprint(out.parent) == before
    report = apply(*inputs.checkpoints, rule="tv", lam=2.0, out=out, overwrite=True)
    assert (report.lam, report.resumed) == (2.0, 0)
    assert names(out.parent) == {"out"}


@pytest.mark.parametrize("role", ["model", "base", "tuned"])
def test_an_input_that_changed_is_refused_at_resume(role: str, inputs: Inputs, out: Path) -> None:
    setup = signal_at("SIGKILL", "subtraction.to_directory.describe_inputs")
    assert perta(*arguments(inputs, out), setup=setup).returncode == -9
    shard = sorted(inputs[role].glob("*.safetensors"))[0]
    times = shard.stat()
    shard.write_bytes(shard.read_bytes())
    before = fingerprint(out.parent)
    with pytest.raises(InputError, match=f"{shard.name}: has changed since the run began"):
        resume(out)
    assert fingerprint(out.parent) == before
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    resume(out)
    assert_complete(inputs, out)


def test_there_may_be_nothing_to_resume(inputs: Inputs, out: Path) -> None:
    for place in (out, inputs["model"], out.parent / ("x" * 300), out / "below"):
        with pytest.raises(InputError, match="there is no unfinished run to resume"):
            resume(place)


@pytest.mark.parametrize("link", [False, True])
def test_shards_without_a_change_are_copied_or_linked(link: bool, tmp_path: Path) -> None:
    tensors = {"counts": torch.arange(700), "flags": torch.ones(9, dtype=torch.uint8)}
    model = {"a": draw((50,)), **tensors}
    for number, role in enumerate(("model", "base", "tuned")):
        folder = tmp_path / role
        write_checkpoint(folder, {"a": draw((50,), seed=number)} | tensors)
        index = {"weight_map": {"a": "a.safetensors"} | dict.fromkeys(tensors, "b.safetensors")}
        (folder / "model.safetensors").unlink()
        save_file({"a": draw((50,), seed=number)}, folder / "a.safetensors")
        save_file(tensors, folder / "b.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    roles = [tmp_path / role for role in ("model", "base", "tuned")]
    apply(*roles, rule="tv", lam=1.0, out=tmp_path / "out", link_unchanged=link)
    found = read_checkpoint(tmp_path / "out")
    assert found.keys() == model.keys()
    first, second = (tmp_path / role / "b.safetensors" for role in ("model", "out"))
    assert first.read_bytes() == second.read_bytes()
    shared = first.stat().st_ino == second.stat().st_ino
    assert shared <= link  # a file system that can share data makes a file of its own
    assert (tmp_path / "out" / "a.safetensors").stat().st_nlink == 1


def test_interrupted_between_the_two_renames_the_old_one_is_put_back(inputs: Inputs, out: Path) -> None:
    before = old_directory(out)
    setup = signal_at("SIGINT", "files.new_directory.move", after=True)
    assert perta(*arguments(inputs, out, "--overwrite"), setup=setup).returncode == 130
    assert fingerprint(out) == before
    resume(out)
    assert_complete(inputs, out)


FILE_SIZE_LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"


def test_a_file_size_limit_is_a_failed_run(inputs: Inputs, out: Path) -> None:
    before = fingerprint(inputs.folder)
    process = perta(*arguments(inputs, out), setup=FILE_SIZE_LIMIT)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == (
        f"perta: error: {out}: could not be written: the file would exceed this process's file size limit "
        "(ulimit -f). The inputs are untouched; nothing was left behind\n"
    )
    assert not names(out.parent)
    assert fingerprint(inputs.folder) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = run_child(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk])
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    run_child(["umount", disk], check=True)


@pytest.fixture
def large(tmp_path: Path) -> Inputs:
    """A model of 2 MiB, too large for the small disk."""
    tensors = {role: {"a": draw((1 << 19,), seed=k)} for k, role in enumerate(("model", "base", "tuned"))}
    for role, each in tensors.items():
        write_checkpoint(tmp_path / "large" / role, each)
    return Inputs(tmp_path / "large", tensors)


def test_a_disk_too_small_is_refused_before_anything_is_written(large: Inputs, small_disk: Path) -> None:
    with pytest.raises(RunError, match=r"out: needs 0\.07 GB of disk space, 0\.00 GB are free"):
        run(large, small_disk / "out")
    assert not names(small_disk)


def test_what_a_killed_run_left_counts_as_free(inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(Checkpoint.open(inputs["model"]).size + FREE_MARGIN - 4096, monkeypatch)
    with pytest.raises(RunError, match="out: needs"):
        run(inputs, out)
    partial_path(out).mkdir()
    (partial_path(out) / "model.safetensors").write_bytes(bytes(4096))
    run(inputs, out)
    assert_complete(inputs, out)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_fills_up_is_a_failed_run(
    overwrite: bool, large: Inputs, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_directory, "check_space", lambda *_: None)  # as if others filled it meanwhile
    out = small_disk / "out"
    old = old_directory(out) if overwrite else {}
    before = fingerprint(large.folder)
    with pytest.raises(RunError, match="out: could not be written: the disk is full: free some space"):
        run(large, out, overwrite)
    assert fingerprint(small_disk) == old
    assert names(small_disk) == ({"out"} if overwrite else set())
    assert fingerprint(large.folder) == before


def test_a_parent_that_cannot_be_written_is_a_failed_run(
    inputs: Inputs, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_directory, "check_space", lambda *_: None)
    run_child(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(RunError, match="out: cannot be written: Read-only file system"):
        run(inputs, small_disk / "out")
    assert not names(small_disk)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read everywhere")
def test_a_parent_without_permission_is_a_failed_run(inputs: Inputs, out: Path) -> None:
    out.parent.chmod(0o500)
    with pytest.raises(RunError, match="out: cannot be written: Permission denied"):
        run(inputs, out)
    out.parent.chmod(0o700)
    assert not names(out.parent)


@pytest.mark.parametrize("locked", ["out", "out/below"])
def test_what_cannot_be_removed_is_not_replaced(
    locked: str, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before the work: it would stay, under a hidden name, in the way of the next run."""
    (out / "below").mkdir(parents=True)
    (out / "below" / "file").write_text("x")
    place, access = out.parent / locked, os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place and access(path, mode))  # as for no root
    with pytest.raises(InputError, match=f"{locked}: may not be written, so what is in it cannot be removed"):
        run(inputs, out, overwrite=True)
    assert names(out.parent) == {"out"}


class TestARenameThatTheSystemRefuses:
    """As over a mount point that nothing shows, or in some layered file systems: no finished work is lost."""

    @pytest.fixture(params=[errno.EBUSY, errno.EXDEV, errno.EACCES])
    def refused(self, request: pytest.FixtureRequest, out: Path) -> Iterator[pytest.MonkeyPatch]:
        """No directory named ``out`` can be renamed, and none can get this name."""
        rename, number = Path.rename, request.param

        def renamed(path: Path, target: Path) -> Path:
            if out in (Path(path), Path(target)):
                raise OSError(number, os.strerror(number), str(path), None, str(target))
            return rename(path, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "rename", renamed)
            yield patch

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_run_is_resumed(self, overwrite: bool, inputs: Inputs, out: Path, refused: pytest.MonkeyPatch) -> None:
        before = old_directory(out) if overwrite else {}
        advice = rf"the result is complete, in .*{'move .*/out away, then ' if overwrite else ''}finish it with: perta "
        with pytest.raises(RunError, match=advice + f"resume {out}$"):
            run(inputs, out, overwrite)
        assert fingerprint(out) == before
        refused.undo()
        if overwrite:
            out.rename(out.parent.parent / "away")
        resume(out, progress=False)
        assert_complete(inputs, out)

    def test_an_importance_is_given_its_name(self, out: Path, tmp_path: Path, refused: pytest.MonkeyPatch) -> None:
        importance = Importance.load(write_importance(tmp_path / "source", {"a": draw((9,)), "b": draw((3,))}))
        with pytest.raises(RunError, match=r"the result is complete, in .*; give it its name: (mv .*)$") as raised:
            importance.save(out)
        refused.undo()
        run_child(["sh", "-c", str(raised.value).rpartition("its name: ")[2]], check=True)
        assert torch.equal(Importance.load(out).tensors["a"], draw((9,)))
        assert names(out.parent) == {"out"}
