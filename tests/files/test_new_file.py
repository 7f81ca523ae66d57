"""Single files that commands write: what is refused, and what a failure leaves."""

import errno
import os
from pathlib import Path

import pytest

from perta_fast.errors import InputError, RunError
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
