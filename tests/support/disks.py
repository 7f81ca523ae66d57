"""Disks of any size, as ``shutil.disk_usage`` and the numbers of file systems tell of them."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from perta_fast.files import disk_space


def with_free(free: int, monkeypatch: pytest.MonkeyPatch, others: Mapping[Path, int] | None = None) -> None:
    """So many bytes free on the disk. others: those of further disks, by the directory that each one is."""
    others = others or {}
    for each in others:
        each.mkdir(exist_ok=True)

    def disk(path: Path) -> Path | None:
        return next((each for each in others if path.absolute().is_relative_to(each)), None)

    def usage(path: Path) -> SimpleNamespace:
        own = disk(Path(path))
        return SimpleNamespace(free=free if own is None else others[own])

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(disk_space, "disk_of", lambda path: hash(disk(path)))
