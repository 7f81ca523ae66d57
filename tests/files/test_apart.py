"""Directories that must lie apart are called by their arguments."""

from pathlib import Path

import pytest

from perta_fast.errors import InputError
from perta_fast.files.apart import check_apart


def test_both_arguments_are_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    check_apart({"out": tmp_path / "a", "checkpoint": tmp_path / "ab", "save_tuned": tmp_path / "b"})
    for inside in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / "link" / "b"):
        for places in ({"out": tmp_path / "a", "save_tuned": inside}, {"save_tuned": inside, "out": tmp_path / "a"}):
            with pytest.raises(InputError, match="must lie apart, neither within the other") as refused:
                check_apart({"model": tmp_path / "b"} | places)
            said = refused.value.spelled(lambda name: f"--{name}")
            assert f"--out {tmp_path / 'a'}" in said and f"--save_tuned {inside}" in said
