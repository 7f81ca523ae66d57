"""Pieces of work that are done once: each is a directory that appears whole, named by what it was made of."""

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
    """A piece that a report needs has not been made."""


class Busy(Exception):
    """A piece is being made by another process."""


class Store:
    """The directory of a study. ``compute`` False only looks: what is not there raises ``NotYet``.

    Several processes may work in one directory; a piece that another one is making raises ``Busy``.
    """

    def __init__(self, folder: Path, *, compute: bool = True) -> None:
        self.folder = folder
        self.compute = compute

    def piece(self, name: str, made_of: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The directory of a piece, made by ``make`` unless it is there already.

        name: its place in the study. made_of: all that its content depends on, as JSON; other pieces by the
        names of their directories, so that a change of settings makes anew what follows from it, and no more.
        """
        place = self.folder / f"{name}-{digest_of(made_of)}".replace(" ", "-")
        if place.is_dir():
            return place
        if not self.compute:
            raise NotYet(name)
        unfinished = place.with_name(f".{place.name}.unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        try:
            held = lock(unfinished)
        except (BlockingIOError, FileNotFoundError) as error:
            raise Busy(name) from error
        try:
            if place.is_dir():  # since we looked
                unfinished.rmdir()
                return place
            for leftover in unfinished.iterdir():  # of a run that was stopped in the middle
                remove(leftover)
            wall, processor = time.perf_counter(), time.process_time()
            make(unfinished)
            seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
            write_json(unfinished / _ABOUT, {"made_of": made_of, "seconds": seconds})
            sync_tree(unfinished)
            move(unfinished, place)
        finally:
            os.close(held)
        print(f"{time.strftime('%H:%M:%S')} {name}: {seconds['wall']:.0f} s", flush=True)
        return place

    def relative(self, piece: Path) -> str:
        """The name under which another piece says that it was made of this one."""
        return str(piece.relative_to(self.folder))


def digest_of(content: Any) -> str:
    """A short hash of what JSON can hold."""
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def processor_seconds(piece: Path) -> float:
    """What making it took, over all threads; hardly touched by what else the machine did."""
    seconds = read_json(piece / _ABOUT)["seconds"]["processor"]
    assert isinstance(seconds, float)
    return seconds


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON."""
    write_file(path, f"{json.dumps(content, indent=1)}\n".encode())


def read_json(path: Path) -> Any:
    """Read it back."""
    return json.loads(path.read_text(encoding="utf-8"))
