"""A write-ahead journal of new bytes: they are on the disk, with their hashes, before a shard is touched.

Three segment files are filled in turn. A segment holds, one after another, the new bytes of some pieces of the
shards, then a table of where they go with the hash of each, and at its start the place and hash of that table.
It is valid as a whole or not at all. Segment k is written over segment k - 3 only when k - 2 is durable and
k - 3 and k - 2 are in the shards, so that at any instant the valid segments say how far the run has come:
everything before the last of them is in the shards or in a valid segment, nothing after it has touched a shard.
Old bytes are never kept. Replaying a segment twice gives what replaying it once does.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from blake3 import blake3

from perta_fast.errors import RunError
from perta_fast.files.durable import copy_range, write_fully
from perta_fast.files.reading import drop_pages

# What an unfinished in-place run keeps in the model's directory: see subtraction/in_place.py.
JOURNAL = ".perta-journal"
JOB = "job.json"
SLOTS = 3
START = 4096  # the first piece's position in a segment
_MAGIC = b"PERTAJNL"
_START = struct.Struct("<8sQQ32s")  # magic, offset and length of the table, hash of the table
_STEP = 1 << 20
_TABLE_LIMIT = 1 << 28


@dataclass(frozen=True)
class Piece:
    """``size`` bytes that belong at ``offset`` of the shard ``name``, kept at ``position`` of the segment."""

    name: str
    offset: int
    size: int
    position: int
    blake3: str


@dataclass
class Segment:
    """One segment, being filled or read back. state: whatever the run wants to know after a crash."""

    number: int
    path: Path
    descriptor: int
    pieces: list[Piece] = field(default_factory=list)
    state: Any = None

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def __enter__(self) -> "Segment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def put(self, name: str, offset: int, data: memoryview, position: int) -> None:
        """Keep new bytes; ``position`` must be at least ``START`` and no two pieces may overlap.

        May be called by several threads at once.
        """
        write_fully(self.descriptor, data, position)
        self.pieces.append(Piece(name, offset, len(data), position, blake3(data).hexdigest()))

    def seal(self, state: Any) -> None:
        """Complete the segment and make it durable."""
        self.state = state
        table = json.dumps(
            {
                "number": self.number,
                "pieces": [[p.name, p.offset, p.size, p.position, p.blake3] for p in self.pieces],
                "state": state,
            }
        ).encode()
        place = max([START, *(piece.position + piece.size for piece in self.pieces)])
        write_fully(self.descriptor, memoryview(table), place)
        start = _START.pack(_MAGIC, place, len(table), blake3(table).digest())
        write_fully(self.descriptor, memoryview(start), 0)
        self.sync()

    def sync(self) -> None:
        """Flush the segment to the disk."""
        os.fsync(self.descriptor)

    def apply(self, shards: Mapping[str, Path], drop_cache: bool = False) -> None:
        """Write the pieces into the shards, given by name, and flush those.

        drop_cache: neither they nor the segment stay in the page cache.
        """
        targets: dict[str, int] = {}
        try:
            for piece in self.pieces:
                if piece.name not in targets:
                    targets[piece.name] = os.open(shards[piece.name], os.O_RDWR)
                copy_range(self.descriptor, targets[piece.name], piece.size, piece.position, piece.offset)
            for target in targets.values():
                os.fsync(target)
            if drop_cache:
                drop_pages(self.descriptor)
                for piece in self.pieces:  # not the pages that are read ahead for the next
                    drop_pages(targets[piece.name], piece.offset, piece.size)
        finally:
            for target in targets.values():
                os.close(target)


def new_segment(directory: Path, number: int) -> Segment:
    """Begin segment ``number`` over an older one. What was there is no longer valid."""
    path = directory / f"segment-{number % SLOTS}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        write_fully(descriptor, memoryview(bytes(_START.size)), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return Segment(number, path, descriptor)


def valid_segments(directory: Path) -> Iterator[Segment]:
    """The segments that are whole, in the order of their numbers; each must be closed by the caller.

    Raises RunError if one cannot be read.
    """
    found = []
    try:
        for slot in range(SLOTS):
            segment = _read(directory / f"segment-{slot}", slot)
            if segment is not None:
                found.append(segment)
    except OSError as error:
        raise RunError(f"{directory}: the journal cannot be read: {error.strerror}") from error
    yield from sorted(found, key=lambda segment: segment.number)


def _read(path: Path, slot: int) -> Segment | None:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    segment = _parse(path, slot, descriptor)
    if segment is None:
        os.close(descriptor)
    return segment


def _parse(path: Path, slot: int, descriptor: int) -> Segment | None:
    """The segment, if every hash is right."""
    start = os.pread(descriptor, _START.size, 0)
    if len(start) < _START.size:
        return None
    magic, place, length, digest = _START.unpack(start)
    if magic != _MAGIC or length > _TABLE_LIMIT or place >= 1 << 62:
        return None
    table = os.pread(descriptor, length, place)
    if len(table) != length or blake3(table).digest() != digest:
        return None
    content = json.loads(table)  # the hash is right, so this is what a run has written
    number, pieces = content["number"], [Piece(*row) for row in content["pieces"]]
    if number % SLOTS != slot:
        return None
    segment = Segment(number, path, descriptor, pieces, content["state"])
    return segment if all(_intact(descriptor, piece) for piece in segment.pieces) else None


def _intact(descriptor: int, piece: Piece) -> bool:
    digest = blake3()
    for begin in range(0, piece.size, _STEP):
        digest.update(os.pread(descriptor, min(_STEP, piece.size - begin), piece.position + begin))
    return digest.hexdigest() == piece.blake3
