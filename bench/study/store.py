"""Pieces of work that are done once. A piece is a directory that appears when it is whole.

Its name ends in a hash of everything it was made of, so a change of settings makes new pieces.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from perta_fast.files.durable import move, remove, sync_tree, write_file
from perta_fast.files.locking import lock

_ABOUT = "piece.json"


class NotYet(Exception):
    """A piece has not been made, and may not be made now."""


class Busy(Exception):
    """Another process is making a piece."""


class Store:
    """The directory of a study, in which several processes may work.

    compute: False makes nothing; a piece that is missing raises ``NotYet``.
    """

    def __init__(self, folder: Path, *, compute: bool = True) -> None:
        self.folder = folder
        self.compute = compute

    def place(self, name: str, made_of: Mapping[str, Any]) -> Path:
        """Where a piece lies, or would."""
        return self.folder / f"{name}-{digest_of(made_of)}".replace(" ", "-")

    def piece(self, name: str, made_of: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The directory of a piece; if it is not there, ``make`` writes its content.

        Raises ``Busy`` if another process is making it. name: its path in the study, without the hash. made_of: all
        that its content depends on, as JSON. Other pieces appear there by the names of their directories, so that a
        change of settings makes new pieces of all that depend on them, and of no others.
        """
        piece = self.place(name, made_of)
        if piece.is_dir():
            return piece
        if not self.compute:
            raise NotYet(name)
        unfinished = piece.with_name(f".{piece.name}.unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = lock(unfinished)
        except (BlockingIOError, FileNotFoundError) as error:
            raise Busy(name) from error
        try:
            if piece.is_dir():  # another process has made it before we had the lock
                unfinished.rmdir()
                return piece
            for leftover in unfinished.iterdir():  # of a run that was stopped
                remove(leftover)
            wall, processor = time.perf_counter(), time.process_time()
            make(unfinished)
            seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
            write_json(unfinished / _ABOUT, {"made_of": made_of, "seconds": seconds})
            sync_tree(unfinished)
            move(unfinished, piece)
        finally:
            os.close(descriptor)
        print(f"{time.strftime('%H:%M:%S')} {name}: {seconds['wall']:.0f} s", flush=True)
        return piece

    def relative(self, piece: Path) -> str:
        """The name of a piece in the ``made_of`` of another."""
        return str(piece.relative_to(self.folder))


def digest_of(content: Any) -> str:
    """A short hash of JSON content."""
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def processor_seconds(piece: Path) -> float:
    """The processor seconds that making a piece took, over all threads; other work on the machine hardly adds any."""
    seconds = read_json(piece / _ABOUT)["seconds"]["processor"]
    assert isinstance(seconds, float)
    return seconds


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON."""
    write_file(path, f"{json.dumps(content, indent=1)}\n".encode())


def read_json(path: Path) -> Any:
    """Read a file of ``write_json``."""
    return json.loads(path.read_text(encoding="utf-8"))
