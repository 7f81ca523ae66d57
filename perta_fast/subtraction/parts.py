"""The shards of a run into a directory, divided into parts; each is written by one rank and noted once it is durable.

A part is consecutive chunks of one shard. A part that was noted stays done, whatever the number of ranks that resume.
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from perta_fast.checkpoints.safetensors_file import SafetensorsFile
from perta_fast.errors import InputError
from perta_fast.files.durable import read_record, write_fully, write_record
from perta_fast.files.own import own_file
from perta_fast.records.typed_json import fits
from perta_fast.subtraction.compute import Chunk, Statistics, bytes_moved
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.matching import TensorMatch

_PART_NOTE = re.compile(r"part-(\d{1,12})-(\d{1,12})-(.*)\.json", re.DOTALL)

Totals = dict[int, Statistics]  # by number of the match: sums over chunks


@dataclass(frozen=True, eq=False)
class Shard:
    """One weight file of the output. matches: of its tensors, by number. state: where notes go. chunk: elements."""

    source: SafetensorsFile
    path: Path
    state: Path
    matches: dict[int, TensorMatch]
    chunk: int

    @property
    def unchanged(self) -> bool:
        """Whether the file is copied as it is."""
        return all(match.copied for match in self.matches.values()) and len(self.matches) == len(self.source.tensors)

    @property
    def count(self) -> int:
        """The number of its chunks; no chunk has elements of two tensors."""
        return sum(self._chunks_of(match) for match in self.matches.values())

    def ranges(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The elements of chunks [begin, end): for each tensor the number of its match, and the range in it."""
        first = 0
        for index, match in self.matches.items():
            after = first + self._chunks_of(match)
            start, stop = max(begin, first) - first, min(end, after) - first
            if start < stop:
                yield index, start * self.chunk, min(stop * self.chunk, match.theta.count)
            first = after

    def cost(self, begin: int, end: int) -> int:
        """Bytes that the chunks [begin, end) move."""
        return sum(bytes_moved(self.matches[i], stop - start, start) for i, start, stop in self.ranges(begin, end))

    def begin_file(self) -> None:
        """Make the file, or empty it, and write the header. Old copies of tensors become zeros."""
        descriptor = own_file(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            write_fully(descriptor, memoryview(self.source.header), 0)
            if len(self.matches) < len(self.source.tensors):
                os.ftruncate(descriptor, self.source.size)
        finally:
            os.close(descriptor)

    def done(self) -> dict[tuple[int, int], Totals]:
        """The totals of the parts that are noted. Raises InputError if notes are damaged or contradict each other."""
        whole = self.state / f"done-{self.path.name}.json"
        if whole.exists():
            return {(0, self.count): self._read(whole)}
        noted = {}
        for note in self.state.glob("part-*"):
            match = _PART_NOTE.fullmatch(note.name)
            if match and match[3] == self.path.name:
                noted[int(match[1]), int(match[2])] = self._read(note)
        bounds = [number for part in sorted(noted) for number in part]
        if bounds != sorted(bounds) or (bounds and (bounds[-1] > self.count or not self.path.exists())):
            raise InputError(f"{self.state}: its notes on {self.path.name} do not fit; start over with ‹overwrite›")
        return noted

    def _read(self, note: Path) -> Totals:
        content = read_record(note)
        if not fits(content, dict[str, Statistics]) or not content.keys() <= set(map(str, self.matches)):
            raise InputError(f"{note}: is not the note of a finished shard")
        return {int(index): sums for index, sums in content.items()}

    def _chunks_of(self, match: TensorMatch) -> int:
        return -(-match.theta.count // self.chunk)


@dataclass(frozen=True, eq=False)
class Part:
    """The chunks [begin, end) of a shard."""

    shard: Shard
    begin: int
    end: int

    @property
    def whole(self) -> bool:
        """Whether it is the whole shard."""
        return (self.begin, self.end) == (0, self.shard.count)

    @property
    def cost(self) -> int:
        """Bytes that it moves."""
        return self.shard.cost(self.begin, self.end)

    def chunks(self) -> Iterator["PartChunk"]:
        """Its chunks, in order."""
        size = self.shard.chunk
        for index, start, stop in self.shard.ranges(self.begin, self.end):
            for first in range(start, stop, size):
                yield PartChunk(index, first, min(size, stop - first), self)

    def note(self, totals: Totals) -> None:
        """Record, durably, that it is written and flushed."""
        name = self.shard.path.name
        file = f"done-{name}.json" if self.whole else f"part-{self.begin}-{self.end}-{name}.json"
        write_record(self.shard.state / file, totals)


@dataclass(frozen=True)
class PartChunk(Chunk):
    """A chunk that knows its part."""

    part: Part


def shards_of(sources: Sources, directory: Path, state: Path, chunk: int) -> list[Shard]:
    """The shards of the output in ``directory``, whose notes are in ``state``."""
    matches: dict[str, dict[int, TensorMatch]] = {name: {} for name in sources.model.shards}
    for index, match in enumerate(sources.matches):
        matches[match.theta.path.name][index] = match
    return [Shard(file, directory / name, state, matches[name], chunk) for name, file in sources.model.shards.items()]


def begun_shards(state: Path) -> set[str]:
    """Names of the shards that have a note in ``state``."""
    names = {path.name.removeprefix("done-").removesuffix(".json") for path in state.glob("done-*")}
    parts = map(_PART_NOTE.fullmatch, (path.name for path in state.glob("part-*")))
    return names | {match[3] for match in parts if match}


def remaining_parts(shard: Shard, done: Collection[tuple[int, int]]) -> list[Part]:
    """The parts of ``shard`` between those that are ``done``."""
    if not done:
        return [Part(shard, 0, shard.count)]
    ends = [0, *(end for _, end in sorted(done))]
    begins = [*(begin for begin, _ in sorted(done)), shard.count]
    return [Part(shard, end, begin) for end, begin in zip(ends, begins, strict=True) if end < begin]


def deal_in_order(parts: Sequence[Part], ranks: int) -> list[list[Part]]:
    """Consecutive parts for each rank, of about the same cost; a file that is copied is not cut.

    A rank shares with others only the files at the ends of its parts.
    """
    total = sum(part.cost for part in parts)
    dealt: list[list[Part]] = [[] for _ in range(ranks)]
    rank = cost = 0
    for whole in parts:
        rest: Part | None = whole
        while rest is not None:
            while rank < ranks - 1 and cost >= total * (rank + 1) / ranks:
                rank += 1
            part, rest = _cut(rest, total * (rank + 1) / ranks - cost) if rank < ranks - 1 else (rest, None)
            dealt[rank].append(part)
            cost += part.cost
    return dealt


def _cut(part: Part, size: float) -> tuple[Part, Part | None]:
    """The first chunks of ``part``, which move ``size`` bytes or a little more, and the rest, if any."""
    low, high = part.begin, part.end
    if part.shard.unchanged or part.cost <= size:
        return part, None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if part.shard.cost(part.begin, middle) >= size else (middle, high)
    if high == part.end:
        return part, None
    return Part(part.shard, part.begin, high), Part(part.shard, high, part.end)
