"""What is needed of each disk is compared with what it has, and with what a killed command left there."""

import os
from pathlib import Path

import pytest

from perta_fast.errors import RunError
from perta_fast.files.disk_space import check_space, free_bytes
from tests.support.disks import with_free


def test_directories_of_one_disk_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(10**9, monkeypatch)
    first, second = tmp_path / "a", tmp_path / "below" / "b"
    check_space({first: 4 * 10**8, second: 6 * 10**8})
    with pytest.raises(RunError, match=rf"{first} and {second}: need 1\.10 GB of disk space, 1\.00 GB are free"):
        check_space({first: 5 * 10**8, second: 6 * 10**8})


def test_each_disk_is_checked_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a", tmp_path / "other" / "b"
    with_free(10, monkeypatch, {tmp_path / "other": 20})
    check_space({first: 10, second: 20})
    with pytest.raises(RunError, match=f"{second}: needs"):
        check_space({first: 10, second: 21})


def test_what_is_emptied_first_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(1000, monkeypatch, {tmp_path / "other": 0})
    for left in (tmp_path / "left" / "below", tmp_path / "other"):
        left.mkdir(parents=True, exist_ok=True)
        (left / "file").write_bytes(os.urandom(8192))
    emptied = [tmp_path / "left", tmp_path / "other", tmp_path / "missing"]
    assert free_bytes(tmp_path / "out", emptied) == 1000 + 8192
    os.link(tmp_path / "left" / "below" / "file", tmp_path / "linked")
    assert free_bytes(tmp_path / "out", emptied) == 1000
