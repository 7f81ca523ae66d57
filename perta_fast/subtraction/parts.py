"""The shards of a run into a directory, cut into parts; each is written by one rank and noted once durable.

A part is a run of a shard's chunks. What was noted stays done, however many ranks go on after a stop.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from perta_fast.checkpoints.safetensors_file import SafetensorsFile
from perta_fast.errors import InputError
from perta_fast.files.durable import read_record, write_fully, write_record
from perta_fast.records.typed_json import fits
from perta_fast.subtraction.compute import Chunk, Statistics, bytes_moved
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.matching import TensorMatch

_PART_NOTE = re.compile(r"part-(\d{1,12})-(\d{1,12})-(.*)\.json", re.DOTALL)

Totals = dict[int, Statistics]  # what the chunks of each tensor add up to


@dataclass(frozen=True, eq=False)
class Shard:
    """One weight file of the output. matches: of its tensors, by number. chunk: elements of a chunk."""

    source: SafetensorsFile
    path: Path
    state: Path
    matches: dict[int, TensorMatch]
    chunk: int

    @property
    def unchanged(self) -> bool:
        """Whether the file is copied as it is."""
        return all(match.copied for match in self.matches.values())

    @property
    def count(self) -> int:
        """Its chunks, which are numbered from 0; none has elements of two tensors."""
        return sum(self._chunks_of(match) for match in self.matches.values())

    def stretches(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Chunks [begin, end) as stretches of tensors: a match's number, and its elements from and to."""
        first = 0
        for index, match in self.matches.items():
            after = first + self._chunks_of(match)
            start, stop = max(begin, first) - first, min(end, after) - first
            if start < stop:
                yield index, start * self.chunk, min(stop * self.chunk, match.theta.count)
            first = after

    def cost(self, begin: int, end: int) -> int:
        """Bytes that the chunks [begin, end) move."""
        return sum(bytes_moved(self.matches[k], stop - start) for k, start, stop in self.stretches(begin, end))

    def begin_file(self) -> None:
        """Make the file anew, with its header alone."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_fully(descriptor, memoryview(self.source.header), 0)
        finally:
            os.close(descriptor)

    def done(self) -> dict[tuple[int, int], Totals]:
        """The parts that are noted. Raises InputError if a note is damaged, or what it says cannot be."""
        found = {}
        whole = self.state / f"done-{self.path.name}.json"
        if whole.exists():
            return {(0, self.count): self._read(whole)}
        for note in self.state.glob("part-*"):
            match = _PART_NOTE.fullmatch(note.name)
            if match and match[3] == self.path.name:
                found[int(match[1]), int(match[2])] = self._read(note)
        places = [number for part in sorted(found) for number in part]
        if places != sorted(places) or (places and (places[-1] > self.count or not self.path.exists())):
            raise InputError(f"{self.state}: its notes on {self.path.name} do not fit; start over with --overwrite")
        return found

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
        """Whether it is all of the shard."""
        return (self.begin, self.end) == (0, self.shard.count)

    @property
    def cost(self) -> int:
        """Bytes that it moves."""
        return self.shard.cost(self.begin, self.end)

    def chunks(self) -> Iterator["PartChunk"]:
        """Its chunks, in order."""
        size = self.shard.chunk
        for index, start, stop in self.shard.stretches(self.begin, self.end):
            for place in range(start, stop, size):
                yield PartChunk(index, place, min(size, stop - place), self)

    def note(self, totals: Totals) -> None:
        """Record that it is written, and flushed."""
        name = self.shard.path.name
        file = f"done-{name}.json" if self.whole else f"part-{self.begin}-{self.end}-{name}.json"
        write_record(self.shard.state / file, totals)


@dataclass(frozen=True)
class PartChunk(Chunk):
    """A chunk that knows the part that it is of."""

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


def left_of(shard: Shard, done: Sequence[tuple[int, int]]) -> list[Part]:
    """The parts of ``shard`` between those that are ``done``."""
    if not done:
        return [Part(shard, 0, shard.count)]
    ends = [0, *(end for _, end in sorted(done))]
    begins = [*(begin for begin, _ in sorted(done)), shard.count]
    return [Part(shard, end, begin) for end, begin in zip(ends, begins, strict=True) if end < begin]


def deal_in_order(parts: Sequence[Part], hands: int) -> list[list[Part]]:
    """Cut ``parts`` into one run for each hand, of about the same cost; a file that is copied is not cut.

    The hands' runs follow each other, so that but for its ends a hand has its files to itself.
    """
    total = sum(part.cost for part in parts)
    dealt: list[list[Part]] = [[] for _ in range(hands)]
    hand = given = 0
    for whole in parts:
        rest: Part | None = whole
        while rest is not None:
            while hand < hands - 1 and given >= total * (hand + 1) / hands:
                hand += 1
            part, rest = _cut(rest, total * (hand + 1) / hands - given) if hand < hands - 1 else (rest, None)
            dealt[hand].append(part)
            given += part.cost
    return dealt


def _cut(part: Part, size: float) -> tuple[Part, Part | None]:
    """The first chunks of ``part`` that move ``size`` bytes or a little more, and the rest if there is one."""
    low, high = part.begin, part.end
    if part.shard.unchanged or part.cost <= size:
        return part, None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if part.shard.cost(part.begin, middle) >= size else (middle, high)
    if high == part.end:
        return part, None
    return Part(part.shard, part.begin, high), Part(part.shard, high, part.end)
