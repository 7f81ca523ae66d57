"""Inputs and outputs are told apart by what they are, not by their paths."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perta_fast import InputError, unlearn
from perta_fast.files.identity import is_same, lies_in
from perta_fast.files.mounts import mounts_in
from perta_fast.files.new_directory import check_output
from perta_fast.files.new_file import check_output_file
from perta_fast.runs.apply import apply
from tests.support.checkpoints import fingerprint, read_checkpoint, same_bytes
from tests.support.children import run_child
from tests.support.inputs import Inputs, write_inputs
from tests.support.models import Job


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return write_inputs(tmp_path / "inputs", shards=2)


@pytest.fixture
def bind(tmp_path: Path) -> Iterator[Callable[[Path, Path], Path]]:
    """Shows a directory, or a file, at a second path as well."""
    made: list[Path] = []

    def bind(source: Path, path: Path) -> Path:
        path.mkdir() if source.is_dir() else path.touch()
        if run_child(["mount", "--bind", source, path]).returncode != 0:
            pytest.skip("mounting is not permitted here")
        made.append(path)
        return path

    yield bind
    for path in reversed(made):
        run_child(["umount", path], check=True)


def test_two_paths_to_one_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").symlink_to("b")
    (tmp_path / "d").write_text("")
    assert is_same(tmp_path / "a", tmp_path / "b") and is_same(tmp_path / "a", tmp_path / "c")
    assert not is_same(tmp_path / "a", tmp_path / "d")
    assert is_same(tmp_path / "missing", tmp_path / "x" / ".." / "missing")
    assert not is_same(tmp_path / "missing", tmp_path / "gone")
    assert lies_in(tmp_path / "a", tmp_path) and lies_in(tmp_path, tmp_path)
    assert lies_in(tmp_path / "not" / "yet", tmp_path / "not") and not lies_in(tmp_path, tmp_path / "a")


class OneOfTwo:
    """A file system on which ``Model`` is ``model``, as where upper and lower case do not count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stat = os.stat
        monkeypatch.setattr(os, "stat", lambda path, *a, **k: stat(self.lower(path), *a, **k))
        self.scandir, self.listdir = os.scandir, os.listdir
        monkeypatch.setattr(os, "listdir", lambda path=".": self.listdir(self.lower(path)))
        monkeypatch.setattr(os, "scandir", lambda path=".": self.scandir(self.lower(path)))

    def lower(self, path: object) -> object:
        return path if isinstance(path, int) else os.fspath(path).replace("Model", "model")  # type: ignore[call-overload]


def test_an_input_in_other_letters_is_not_overwritten(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(inputs.folder)
    with monkeypatch.context() as patch:
        OneOfTwo(patch)
        with pytest.raises(InputError, match=r"Model: is or contains the input"):
            apply(*inputs.checkpoints, rule="tv", out=inputs.folder / "Model", overwrite=True, progress=False)
    assert fingerprint(inputs.folder) == before


class TestBindMounts:
    def test_an_input_under_a_second_path(
        self, inputs: Inputs, bind: Callable[[Path, Path], Path], tmp_path: Path
    ) -> None:
        holder = tmp_path / "holder"
        holder.mkdir()
        model, (_, base, tuned) = inputs["model"].rename(holder / "model"), inputs.checkpoints
        seen = bind(model, tmp_path / "seen")
        before = fingerprint(holder)
        for output in (model, holder):  # the parents of the given path do not show that the latter holds it
            with pytest.raises(InputError, match=r"is or contains the input .*seen"):
                apply(seen, base, tuned, rule="tv", out=output, overwrite=True, progress=False)
        with pytest.raises(InputError, match="is or contains the input"):
            apply(model, base, tuned, rule="tv", out=seen, overwrite=True, progress=False)
        assert fingerprint(holder) == before

    def test_a_data_file_in_a_directory_under_a_second_path(
        self, job: Job, bind: Callable[[Path, Path], Path], tmp_path: Path
    ) -> None:
        data = tmp_path / "data"
        (data / "below").mkdir(parents=True)
        (data / "below" / "mine.jsonl").write_bytes(job.forget.read_bytes())
        seen = bind(data / "below", tmp_path / "seen")
        with pytest.raises(InputError, match=r"is or contains the input .*seen/mine.jsonl"):
            unlearn(
                *job.checkpoints,
                seen / "mine.jsonl",
                job.retain,
                out=data,
                overwrite=True,
                progress=False,
                lam=1.0,
                rule="fisher",
            )
        assert (data / "below" / "mine.jsonl").exists()

    def test_the_base_is_the_model_under_a_second_path(
        self, inputs: Inputs, bind: Callable[[Path, Path], Path], tmp_path: Path
    ) -> None:
        model, _, tuned = inputs.checkpoints
        apply(model, model, tuned, rule="tv", lam=0.7, out=tmp_path / "out", progress=False)
        apply(model, bind(model, tmp_path / "seen"), tuned, rule="tv", lam=0.7, in_place=True, progress=False)
        found, expected = read_checkpoint(model), read_checkpoint(tmp_path / "out")
        assert all(same_bytes(found[name], tensor) for name, tensor in expected.items())

    def test_no_output_can_replace_a_mount(
        self, inputs: Inputs, bind: Callable[[Path, Path], Path], tmp_path: Path
    ) -> None:
        (tmp_path / "volume").mkdir()
        out = bind(tmp_path / "volume", tmp_path / "out put")
        advice = r"out put: is a mount point, which cannot be replaced; .* such as '.*/out put/NAME'$"
        for overwrite in (False, True):
            with pytest.raises(InputError, match=advice):
                apply(*inputs.checkpoints, rule="tv", out=out, overwrite=overwrite, progress=False)
        apply(*inputs.checkpoints, rule="tv", out=out / "NAME", progress=False)  # what the message says
        assert (tmp_path / "volume" / "NAME" / "perta_report.json").exists()

    def test_a_directory_that_holds_a_mount_is_not_removed(
        self, inputs: Inputs, bind: Callable[[Path, Path], Path], tmp_path: Path
    ) -> None:
        (tmp_path / "volume").mkdir()
        (tmp_path / "volume" / "mine").write_text("mine")
        (tmp_path / "out").mkdir()
        bind(tmp_path / "volume", tmp_path / "out" / "volume")
        with pytest.raises(InputError, match=r"holds the mount point .*out/volume, whose content would be removed"):
            apply(*inputs.checkpoints, rule="tv", out=tmp_path / "out", overwrite=True, progress=False)
        assert (tmp_path / "volume" / "mine").exists()

    def test_a_file_that_is_a_mount(self, bind: Callable[[Path, Path], Path], tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text("{}")
        path = bind(tmp_path / "a.json", tmp_path / "b c.json")
        assert mounts_in(path) == [path]
        with pytest.raises(InputError, match=r"is a mount point, which cannot be replaced"):
            check_output_file(path, (".json",), overwrite=True)


def test_without_the_system_s_table_only_the_directory_itself_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perta_fast.files.mounts._TABLE", str(tmp_path / "none"))
    assert mounts_in(Path("/proc")) == [Path("/proc")]
    assert mounts_in(tmp_path) == []


def test_the_system_s_table_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path.resolve()
    escaped = str(folder / "a b").replace(" ", r"\040")
    table = folder / "table"
    table.write_text(f"36 35 98:0 /mnt1 {escaped} rw - ext3 /dev/root rw\n37 35 0:4 / /proc rw - proc proc rw\n")
    monkeypatch.setattr("perta_fast.files.mounts._TABLE", str(table))
    assert mounts_in(folder) == [folder / "a b"] == mounts_in(folder / "a b")
    with pytest.raises(InputError, match="is a mount point"):
        check_output(folder / "a b", overwrite=False, inputs=[])


def test_a_hard_link_in_the_old_output_is_no_input(inputs: Inputs, tmp_path: Path) -> None:
    """Removing it leaves the input: --link-unchanged makes such links."""
    before = fingerprint(inputs["model"])
    (tmp_path / "out").mkdir()
    for path in inputs["model"].glob("*.safetensors"):
        os.link(path, tmp_path / "out" / path.name)
    apply(*inputs.checkpoints, rule="tv", out=tmp_path / "out", overwrite=True, progress=False)
    assert fingerprint(inputs["model"]) == before
