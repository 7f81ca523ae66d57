"""Single files that commands write: what is refused, and what a failure leaves."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from perta_fast.errors import InputError, RunError
from perta_fast.files.new_directory import check_output
from perta_fast.files.new_file import check_output_file, write_output_file


def test_what_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("mine")
    (tmp_path / "folder.json").mkdir()
    for name, overwrite, reason in (
        ("weights.safetensors", True, "name a file that ends in .json or .js"),
        ("folder.json", True, "is a directory"),
        ("there.json", False, "exists"),
        ("no/new.json", False, "no: is not a directory"),
    ):
        with pytest.raises(InputError, match=reason):
            check_output_file(tmp_path / name, (".json", ".js"), overwrite=overwrite)
    check_output_file(tmp_path / "there.json", (".json", ".js"), overwrite=True)
    check_output_file(tmp_path / "new.js", (".json", ".js"), overwrite=False)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failure_keeps_what_was_there(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "scores.json"
    write_output_file(path, b"first")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(RunError, match=r"scores.json: cannot be written: No space left on device"):
        write_output_file(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_output_file(path, b"second")
    assert path.read_bytes() == b"second"


def test_an_input_is_not_replaced_whatever_its_path(tmp_path: Path) -> None:
    source = tmp_path / "mine.json"
    source.write_text("mine")
    os.link(source, tmp_path / "second.json")
    (tmp_path / "link.json").symlink_to("mine.json")
    (tmp_path / "folder").symlink_to(".")
    for path in ("mine.json", "second.json", "link.json", "folder/mine.json", "folder/folder/second.json"):
        with pytest.raises(InputError, match=r"is the input .*mine\.json; choose another file"):
            check_output_file(tmp_path / path, (".json",), overwrite=True, inputs=[tmp_path / "x.json", source])
    check_output_file(tmp_path / "new.json", (".json",), overwrite=True, inputs=[source])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "perta_report.json"])
def test_a_file_of_a_model_is_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"{name}: is a file of a model, which is not replaced"):
        check_output_file(tmp_path / name, (".json",), overwrite=True)


def test_a_link_that_leads_nowhere_is_there(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to("nowhere.json")
    with pytest.raises(InputError, match="exists; choose another file or pass overwrite"):
        check_output_file(tmp_path / "link.json", (".json",), overwrite=False)
    write_output_file(tmp_path / "link.json", b"new")
    assert (tmp_path / "link.json").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["link.json"]


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_what_cannot_get_its_name_is_kept(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "scores.json"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"the result is in (.*)\. Give it a name: mv "):
        patch.setattr(os, "rename", busy)
        write_output_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert (tmp_path / ".scores.json.perta-partial").read_bytes() == b"new"


@pytest.mark.parametrize(("flag", "reason"), [(0, "Permission denied"), (os.ST_RDONLY, "Read-only file system")])
def test_a_directory_that_cannot_be_written_is_found_before_the_work(
    flag: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flag))
    with pytest.raises(RunError, match=rf"scores\.json: cannot be written: {reason}"):
        check_output_file(tmp_path / "scores.json", (".json",), overwrite=False)
    for out in (tmp_path / "out", tmp_path / "a" / "b"):
        with pytest.raises(RunError, match=f"cannot be written: {reason}"):
            check_output(out, overwrite=False, inputs=[])
    assert not list(tmp_path.iterdir())


def test_a_path_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("scores.json"), Path("./a/../scores.json")):
        (tmp_path / "a").mkdir(exist_ok=True)
        check_output_file(path, (".json",), overwrite=True)
        write_output_file(path, b"new")
    assert (tmp_path / "scores.json").read_bytes() == b"new"
