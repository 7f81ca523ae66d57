"""One safetensors file: its header checked, its data mapped.

The format (huggingface/safetensors): eight bytes with the header's length, a JSON header with the type, shape
and byte range of each tensor, then the data without holes. The package has its own reader because the
subtraction works on byte ranges, without a copy and without torch.
"""

import json
import mmap
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeGuard

from perta_fast.arrays import ByteArray, FloatArray, widen
from perta_fast.checkpoints.wrappers import by_plain_name, plain_name
from perta_fast.dtypes import ITEM_SIZES, byte_count
from perta_fast.errors import InputError, RunError
from perta_fast.files.reading import PositionReader, check_fetched, regular_file

MAXIMUM_HEADER_BYTES = 100_000_000  # the library's own bound
_PAGE = mmap.PAGESIZE
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``[begin, end)`` are byte offsets from the start of the file.

    stored_name: its name in the file, if wrappers have added to it; else "". pieces: if the tensor is not stored as
    such, the ranges of stored ones that it is made of, one after another; then the other fields are those of the first,
    but for type and shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    path: Path
    stored_name: str = ""
    pieces: "tuple[TensorEntry, ...]" = ()

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces) if self.pieces else self.end - self.begin

    @property
    def count(self) -> int:
        return self.size // ITEM_SIZES[self.dtype]

    def elements(self, begin: int, count: int) -> "Iterator[TensorEntry]":
        """Where ``count`` elements lie, from element ``begin`` on: flat entries, each in one file, in order."""
        if not self.pieces:
            width = ITEM_SIZES[self.dtype]
            first = self.begin + begin * width
            # Not `replace`, which takes twice as long: this is done for every chunk.
            yield TensorEntry(
                self.name, self.dtype, (count,), first, first + count * width, self.path, self.stored_name
            )
            return
        number, end = bisect_right(self._ends, begin), begin + count
        while begin < end:
            stop = min(end, self._ends[number])
            piece = self.pieces[number]
            yield from piece.elements(begin - self._ends[number] + piece.count, stop - begin)
            number, begin = number + 1, stop

    @cached_property
    def _ends(self) -> list[int]:
        """The number of elements up to the end of each piece."""
        return list(accumulate(piece.count for piece in self.pieces))

    @classmethod
    def made_of(cls, pieces: "Sequence[TensorEntry]", shape: tuple[int, ...]) -> "TensorEntry":
        """A tensor of ``shape`` whose elements are those of ``pieces``, one after another."""
        return replace(pieces[0], shape=shape, pieces=tuple(pieces))


@dataclass(frozen=True)
class SafetensorsFile:
    """A checked header; the data is mapped at first use.

    tensors: by names without what wrappers added. mtime_ns: the file's time of change when the header was read.
    """

    path: Path
    size: int
    header: bytes = field(repr=False)  # length prefix included
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    metadata: Mapping[str, str]
    mtime_ns: int

    @classmethod
    def open(cls, path: Path) -> "SafetensorsFile":
        """Read and check the header. Raises InputError if the file cannot be read, is truncated or not safetensors."""
        try:
            with open(path, "rb", opener=regular_file) as file:
                status = os.fstat(file.fileno())
                size = status.st_size
                check_fetched(path, os.pread(file.fileno(), 64, 0))
                prefix = file.read(8)
                length = _header_length(path, prefix, size)
                header = file.read(length)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        if len(header) < length:
            raise InputError(f"{path}: is truncated inside its header")
        tensors, metadata = _parse_header(path, header, 8 + length, size)
        return cls(path, size, prefix + header, tensors, metadata, status.st_mtime_ns)

    @property
    def has_changed(self) -> bool:
        """Whether the file is not what it was when it was opened, by size and time of change; or is gone."""
        try:
            status = self.path.stat()
        except OSError:
            return True
        return (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns)

    @cached_property
    def _map(self) -> mmap.mmap:
        try:
            with open(self.path, "rb", opener=regular_file) as file:
                if os.fstat(file.fileno()).st_size != self.size:
                    raise InputError(f"{self.path}: changed size while it was being used")
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be read: {error.strerror}") from error
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        return mapped

    def content(self, begin: int, end: int) -> bytes:
        """A copy of the bytes [begin, end) of the file."""
        return self._map[begin:end]

    @cached_property
    def data(self) -> ByteArray:
        """The file as a read-only mapped array of bytes."""
        import numpy as np

        return np.frombuffer(self._map, dtype=np.uint8)

    @cached_property
    def address(self) -> int:
        """Address of the file's first byte in memory."""
        return int(self.data.ctypes.data)

    def release(self, begin: int, end: int) -> None:
        """Give back the mapped pages that lie wholly in ``[begin, end)``; they stay in the page cache."""
        first = -(-begin // _PAGE) * _PAGE
        last = end // _PAGE * _PAGE
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def build_header(
    entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header of a new file, length prefix included, and each tensor's offset from the file's start.

    entries: name to (dtype, shape), in the order of the data, which begins at a multiple of 64 bytes.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets: dict[str, int] = {}
    position = 0
    for name, (dtype, shape) in entries.items():
        size = byte_count(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        offsets[name] = position
        position += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}


def read_values(entry: TensorEntry, begin: int, end: int) -> FloatArray:
    """Elements [begin, end) of a floating-point tensor as float32. Raises RunError if the file cannot be read."""
    import numpy as np

    data = bytearray((end - begin) * ITEM_SIZES[entry.dtype])
    buffer = memoryview(data)
    for piece in entry.elements(begin, end - begin):
        with closing(PositionReader(piece.path)) as reader:
            reader.read_into(buffer[: piece.size], piece.begin, f"tensor {piece.name}")
        buffer = buffer[piece.size :]
    if entry.dtype == "F32":
        return np.frombuffer(data, np.float32)
    values = np.empty(end - begin, np.float32)
    widen(memoryview(data), entry.dtype, values)
    return values


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise InputError(f"{path}: is not a safetensors file: it has {size} bytes, fewer than 8")
    length = int.from_bytes(prefix, "little")
    if length > MAXIMUM_HEADER_BYTES or length > size - 8:
        raise InputError(
            f"{path}: is not a safetensors file, or is truncated: its header claims {length} bytes, the file has {size}"
        )
    return length


def _parse_header(
    path: Path, header: bytes, data_begin: int, size: int
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    try:
        table = json.loads(header.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not a safetensors file: its header is not JSON") from error
    if not isinstance(table, dict):
        raise InputError(f"{path}: is not a safetensors file: its header is not a JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, [*metadata, *metadata.values()])):
        raise InputError(f"{path}: its __metadata__ is not a table of strings")
    entries = {name: _parse_entry(path, name, row, data_begin) for name, row in table.items()}
    tensors = {plain: entries[name] for plain, name in by_plain_name(entries, path).items()}
    position = data_begin
    for entry in sorted(tensors.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            raise InputError(f"{path}: tensor {entry.name} overlaps another or leaves a hole before it")
        position = entry.end
    if position > size:
        raise InputError(
            f"{path}: is truncated: its header promises {position} bytes, the file has {size}; fetch or copy it again"
        )
    if position < size:
        raise InputError(f"{path}: has {size - position} bytes after its last tensor")
    return tensors, metadata


def _parse_entry(path: Path, name: str, row: Any, data_begin: int) -> TensorEntry:
    if not _is_text(name):
        raise InputError(f"{path}: tensor {name!a}: its name is not valid Unicode")
    if not isinstance(row, dict):
        raise InputError(f"{path}: tensor {name}: its header row is not a table")
    dtype, shape, offsets = row.get("dtype"), row.get("shape"), row.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise InputError(f"{path}: tensor {name}: unknown dtype {dtype!r}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise InputError(f"{path}: tensor {name}: its shape or data_offsets are malformed")
    begin, end = offsets
    if end - begin != byte_count(dtype, tuple(shape)):
        raise InputError(
            f"{path}: tensor {name}: shape {shape} as {dtype} does not take the {end - begin} bytes "
            "that data_offsets give"
        )
    plain = plain_name(name)
    stored_name = name if plain != name else ""
    return TensorEntry(plain, dtype, tuple(shape), data_begin + begin, data_begin + end, path, stored_name)


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether ``value`` is a string that UTF-8 can write: in JSON it can hold half a surrogate pair."""
    return isinstance(value, str) and not _LONE_SURROGATE.search(value)
