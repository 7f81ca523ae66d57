"""A write-ahead journal of new bytes: they are on the disk, with their hashes, before a shard is touched.

Three segment files are filled in turn. A segment holds the new bytes of some extents of the shards, one after
another, then a table with the position and the hash of each; the segment's start says where the table lies, and
its hash. A segment is valid as a whole or not at all. Segment k is written over segment k - 3 only when k - 2 is
durable and k - 3 and k - 2 are in the shards. The valid segments always say how far the run has come: everything
before the last of them is in the shards or in a valid segment, and nothing after it has reached a shard. Old
bytes are never kept. To apply a segment twice gives the same as to apply it once.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from perta_fast.errors import InputError, RunError, shell_command
from perta_fast.files.durable import copy_range, write_fully
from perta_fast.files.own import check_own, own_file
from perta_fast.files.reading import drop_pages, exists

# What an unfinished in-place run keeps in the model's directory: see subtraction/in_place.py.
JOURNAL, JOB = ".perta-journal", "job.json"
SLOTS = 3
START = 4096  # position of the first extent in a segment
_MAGIC = b"PERTAJNL"
_START = struct.Struct("<8sQQ32s")  # magic, offset and length of the table, hash of the table
_STEP = 1 << 20
_TABLE_LIMIT = 1 << 28


def check_finished(model: Path) -> None:
    """Raise InputError, with the command that finishes it, if a run in place was stopped in the directory ``model``."""
    if exists(model / JOURNAL / JOB):
        check_own(model / JOURNAL)
        finishing = shell_command("perta", "resume", model)
        raise InputError(f"{model}: an in-place run has not been finished; finish it with: {finishing}")


@dataclass(frozen=True)
class Extent:
    """``size`` bytes that belong at ``offset`` of the shard ``name``, kept at ``position`` of the segment."""

    name: str
    offset: int
    size: int
    position: int
    blake3: str


@dataclass
class Segment:
    """A segment that is being filled or was read back. state: what the run must know after a crash."""

    number: int
    path: Path
    descriptor: int
    extents: list[Extent] = field(default_factory=list)
    state: Any = None

    def close(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> "Segment":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, name: str, offset: int, data: memoryview, position: int) -> None:
        """Keep new bytes at ``position``, from ``START`` on; extents must not overlap. Several threads may call it."""
        write_fully(self.descriptor, data, position)
        self.extents.append(Extent(name, offset, len(data), position, blake3(data).hexdigest()))

    def seal(self, state: Any) -> None:
        """Complete the segment and make it durable."""
        self.state = state
        content = {"number": self.number, "extents": [astuple(extent) for extent in self.extents], "state": state}
        table = json.dumps(content).encode()
        position = max([START, *(extent.position + extent.size for extent in self.extents)])
        write_fully(self.descriptor, memoryview(table), position)
        start = _START.pack(_MAGIC, position, len(table), blake3(table).digest())
        write_fully(self.descriptor, memoryview(start), 0)
        self.sync()

    def sync(self) -> None:
        os.fsync(self.descriptor)

    def apply(self, shards: Mapping[str, Path], drop_cache: bool = False) -> None:
        """Write the extents into the shards, by name, and flush these. drop_cache: nothing stays in the page cache."""
        targets: dict[str, int] = {}
        try:
            for extent in self.extents:
                if extent.name not in targets:
                    targets[extent.name] = own_file(shards[extent.name], os.O_RDWR)
                copy_range(self.descriptor, targets[extent.name], extent.size, extent.position, extent.offset)
            for target in targets.values():
                os.fsync(target)
            if drop_cache:
                drop_pages(self.descriptor)
                for extent in self.extents:  # but not the pages that the system has read ahead
                    drop_pages(targets[extent.name], extent.offset, extent.size)
        finally:
            for target in targets.values():
                os.close(target)


def new_segment(directory: Path, number: int) -> Segment:
    """Begin segment ``number`` in the file of an older one, which is then no longer valid."""
    path = directory / f"segment-{number % SLOTS}"
    descriptor = own_file(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        write_fully(descriptor, memoryview(bytes(_START.size)), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return Segment(number, path, descriptor)


def valid_segments(directory: Path) -> Iterator[Segment]:
    """The valid segments in the order of their numbers, for the caller to close. Raises RunError."""
    try:
        read = [_read(directory / f"segment-{slot}", slot) for slot in range(SLOTS)]
    except OSError as error:
        raise RunError(f"{directory}: the journal cannot be read: {error.strerror}") from error
    yield from sorted(filter(None, read), key=lambda segment: segment.number)


def _read(path: Path, slot: int) -> Segment | None:
    try:
        descriptor = own_file(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    segment = _parse(path, slot, descriptor)
    if segment is None:
        os.close(descriptor)
    return segment


def _parse(path: Path, slot: int, descriptor: int) -> Segment | None:
    """The segment; None unless every hash is right."""
    start = os.pread(descriptor, _START.size, 0)
    if len(start) < _START.size:
        return None
    magic, position, length, digest = _START.unpack(start)
    if magic != _MAGIC or length > _TABLE_LIMIT or position >= 1 << 62:
        return None
    table = os.pread(descriptor, length, position)
    if len(table) != length or blake3(table).digest() != digest:
        return None
    content = json.loads(table)  # the hash is right: a run has written this
    number, extents = content["number"], [Extent(*row) for row in content["extents"]]
    if number % SLOTS != slot or not all(_intact(descriptor, extent) for extent in extents):
        return None
    return Segment(number, path, descriptor, extents, content["state"])


def _intact(descriptor: int, extent: Extent) -> bool:
    digest = blake3()
    for begin in range(0, extent.size, _STEP):
        digest.update(os.pread(descriptor, min(_STEP, extent.size - begin), extent.position + begin))
    return digest.hexdigest() == extent.blake3
