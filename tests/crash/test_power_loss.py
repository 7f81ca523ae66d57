"""The power fails: what was not flushed is on the disk in part or not at all, and the run can be finished.

A run is recorded once. From moments of the recording, disks are made as a crash could leave them. A file holds its
content at its last flush, and any blocks of what was written later. Of the changes to names, all until the last flush
of a directory have happened, and some of the later ones, in order. On each disk the run is then finished.
"""

import os
import random
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from perta_fast import apply, resume
from perta_fast.errors import InputError
from perta_fast.records.file_hashes import read_hashes
from perta_fast.subtraction import compute as subtraction
from perta_fast.subtraction import in_place
from tests.crash.test_resume import SOAK
from tests.support.inputs import BF16, F32, Inputs, write_inputs

BLOCK = 64  # bytes that are written together; blocks of real disks are larger, so fewer of them can be torn


@dataclass(frozen=True)
class Moment:
    """Contents of files by number, at the last flush and now; numbers of changes to names, flushed and made."""

    flushed: dict[int, bytes]
    content: dict[int, bytes]
    names_flushed: int
    names_changed: int


@dataclass
class Recorder:
    """Records a folder before and after each call that flushes or renames."""

    folder: Path
    names: dict[str, int] = field(default_factory=dict)
    changes: list[tuple[str, ...]] = field(default_factory=list)  # create name number, rename from to, remove name
    names_flushed: int = 0
    flushed: dict[int, bytes] = field(default_factory=dict)
    content: dict[int, bytes] = field(default_factory=dict)
    moments: list[Moment] = field(default_factory=list)

    def start(self, patch: pytest.MonkeyPatch) -> None:
        """Begin: everything in the folder counts as flushed."""
        self.look()
        self.flushed, self.names_flushed = dict(self.content), len(self.changes)
        self.moments.clear()
        fsync, rename, lock = os.fsync, os.rename, threading.Lock()

        def watched_fsync(descriptor: int) -> None:
            with lock:
                self.look()
                fsync(descriptor)
                self._flush(Path(f"/proc/self/fd/{descriptor}").readlink())
                self.look()

        def watched_rename(source: Any, target: Any) -> None:
            with lock:
                self.look()
                rename(source, target)
                self._rename(*(str(Path(path).relative_to(self.folder)) for path in (source, target)))
                self.look()

        patch.setattr(os, "fsync", watched_fsync)
        patch.setattr(os, "rename", watched_rename)

    def look(self) -> None:
        """Record what has changed, and this moment."""
        present = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}
        for name in self.names.keys() - present:
            self.changes.append(("remove", name))
            del self.names[name]
        for name in sorted(present - self.names.keys()):
            self.names[name] = len(self.changes)
            self.changes.append(("create", name))
        for name, number in self.names.items():
            self.content[number] = (self.folder / name).read_bytes()
        self.moments.append(Moment(dict(self.flushed), dict(self.content), self.names_flushed, len(self.changes)))

    def _flush(self, path: Path) -> None:
        if not path.is_relative_to(self.folder):
            return
        if path.is_dir():
            self.names_flushed = len(self.changes)
        else:
            number = self.names[str(path.relative_to(self.folder))]
            self.flushed[number] = self.content[number]

    def _rename(self, source: str, target: str) -> None:
        self.changes.append(("rename", source, target))
        self.names = renamed(self.names, source, target)

    def disk_after_a_crash(self, moment: Moment, draw: random.Random, folder: Path) -> None:
        """Write one of the states that a crash at ``moment`` can leave."""
        names: dict[str, int] = {}
        for number, change in enumerate(self.changes[: draw.randint(moment.names_flushed, moment.names_changed)]):
            if change[0] == "create":
                names[change[1]] = number
            elif change[0] == "remove":
                del names[change[1]]
            else:
                names = renamed(names, *change[1:])
        for name, number in names.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(torn(moment.flushed.get(number, b""), moment.content[number], draw))


def renamed(names: dict[str, int], source: str, target: str) -> dict[str, int]:
    """The names after a file or a directory is renamed."""
    result = {name: number for name, number in names.items() if name != target}
    for name in names:
        if name == source or name.startswith(f"{source}/"):
            result[target + name[len(source) :]] = result.pop(name)
    return result


def torn(before: bytes, after: bytes, draw: random.Random) -> bytes:
    """A content that a crash can leave while a file changes from ``before`` to ``after``."""
    if before == after or draw.random() < 0.3:
        return before
    size = draw.choice([len(before), len(after)])
    old, new = before[:size].ljust(size, b"\0"), after[:size].ljust(size, b"\0")
    return b"".join(draw.choice([old, new])[begin : begin + BLOCK] for begin in range(0, size, BLOCK))


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    monkeypatch.setattr(subtraction, "CHUNK", 64)
    monkeypatch.setattr(in_place, "SEGMENT", 900)
    inputs = write_inputs(tmp_path / "inputs", (BF16, BF16, BF16, F32, F32), shards=2)
    (inputs["model"] / "config.json").write_text("{}")
    (inputs["model"] / "README.md").write_text("# A model\n")
    return inputs


def shown(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def disks(recorder: Recorder, folder: Path, number: int) -> Iterator[Path]:
    """``number`` disks after a crash, at evenly spread moments."""
    draw = random.Random(0)
    for k in range(number):
        moment = recorder.moments[k * len(recorder.moments) // number]
        disk = folder / "disk"
        recorder.disk_after_a_crash(moment, draw, disk)
        yield disk
        shutil.rmtree(disk)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds a descriptor's file in /proc")
@pytest.mark.parametrize("kind", ["out", "in-place"])
def test_finished_after_a_power_cut(kind: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"lam": 0.7, "threads": 1, "progress": False}
    apply(*inputs.all, **settings, out=tmp_path / "whole")
    expected = shown(tmp_path / "whole")
    watched = tmp_path / "watched"
    watched.mkdir()
    model = inputs["model"] if kind == "out" else shutil.copytree(inputs["model"], watched / "result")
    settings |= {"out": watched / "result"} if kind == "out" else {"in_place": True}
    recorder = Recorder(watched)
    with monkeypatch.context() as patch:
        recorder.start(patch)
        apply(model, *inputs.all[1:], **settings)
    assert len(recorder.moments) > 30
    finished = 0
    number = 5000 if SOAK else 80
    for disk in disks(recorder, tmp_path, number):
        watched.rename(tmp_path / "away")
        disk.rename(watched) if disk.exists() else watched.mkdir()
        try:
            resume(watched / "result", progress=False)
            finished += 1
        except InputError as error:
            assert "no unfinished run" in str(error) or "job.json: is damaged" in str(error)
            if not (watched / "result" / "perta_report.json").exists():
                if kind == "in-place":  # nothing has begun
                    assert shown(watched / "result") == shown(inputs["model"])
                else:
                    assert not (watched / "result").exists()
                apply(model, *inputs.all[1:], **settings)
        result = shown(watched / "result")
        assert read_hashes(watched / "result").keys() == result.keys() - {"perta_files.b3"}
        for name in result.keys() - {"perta_report.json", "README.md", "perta_files.b3"}:
            assert result[name] == expected[name], name
        assert result.keys() == expected.keys()
        assert result["README.md"] == expected["README.md"]
        watched.rename(disk)
        (tmp_path / "away").rename(watched)
    assert finished > number / 5
