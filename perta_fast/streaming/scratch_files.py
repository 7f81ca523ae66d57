"""The scratch files of a streamed run: hidden states between layers, their gradients, and sums.

Padding is not stored. Plain calls read and write the files, and not a memory mapping: a full disk is then an error
with a message, not a signal that kills the process.

Shapes: N samples, T tokens of the longest of them.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from blake3 import blake3
from torch import Tensor

from perta_fast.dtypes import torch_name
from perta_fast.errors import InputError
from perta_fast.files.durable import sync, write_fully
from perta_fast.files.hashing import hash_file
from perta_fast.files.own import own_file
from perta_fast.files.reading import PositionReader
from perta_fast.streaming.micro_batch import MicroBatch


class FileRecord(TypedDict):
    """The type, the shape of a row (or of a whole tensor) and the hash of a scratch file."""

    dtype: str
    shape: list[int]
    blake3: str


@dataclass(frozen=True)
class StepFiles:
    """The scratch files at the end of a step: all, those that it wrote, those that no later step needs."""

    files: dict[str, FileRecord]
    written: list[Path]
    discarded: list[Path]

    def flush(self) -> None:
        """Make what was written durable."""
        for path in self.written:
            sync(path)

    def remove_discarded(self) -> None:
        """To be called when no durable record names these files any more."""
        for path in self.discarded:
            path.unlink(missing_ok=True)


class ScratchFiles:
    """Tensors by name, one file each: rows of tokens, written batch by batch, or whole tensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._kinds: dict[str, tuple[torch.Size, torch.dtype]] = {}  # shape of a row, or of a whole tensor
        self._hashes: dict[str, blake3] = {}  # of files that this process writes
        self._restored: dict[str, str] = {}  # hashes of files that an earlier attempt wrote
        self._written: set[str] = set()
        self._discarded: set[str] = set()

    def write(self, name: str, batch: MicroBatch, values: Tensor) -> None:
        """Store ``values`` (N, T, ...) without padding; the batches of a file come in order, with one row shape."""
        self._kinds[name] = values.shape[2:], values.dtype
        self._write(name, values[batch.attention_mask.bool()], batch.first_row)

    def put(self, name: str, tensor: Tensor) -> None:
        """Store a whole tensor of at least one dimension."""
        self._kinds[name] = tensor.shape, tensor.dtype
        self._write(name, tensor, 0)

    def _write(self, name: str, rows: Tensor, first_row: int) -> None:
        data = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        truncate = os.O_TRUNC if first_row == 0 else 0
        if first_row == 0:
            self._hashes[name] = blake3()
            self._discarded.discard(name)
        descriptor = own_file(self._folder / name, os.O_WRONLY | os.O_CREAT | truncate)
        try:
            if data.size:
                write_fully(descriptor, data.data, first_row * (data.size // len(rows)))
                self._hashes[name].update(data.data)
        finally:
            os.close(descriptor)
        self._written.add(name)

    def read(self, name: str, batch: MicroBatch) -> Tensor:
        """What was written, (N, T, ...), with zeros for padding, on the device of ``batch``."""
        device, (row, dtype) = batch.input_ids.device, self._kinds[name]
        result = torch.zeros((*batch.input_ids.shape, *row), dtype=dtype, device=device)
        rows = self._read(name, torch.Size((sum(batch.lengths), *row)), dtype, batch.first_row)
        result[batch.attention_mask.bool()] = rows.to(device)
        return result

    def get(self, name: str) -> Tensor:
        """A whole tensor that was ``put``, on the CPU."""
        return self._read(name, *self._kinds[name])

    def take(self, name: str, device: torch.device) -> Tensor:
        """The same, on ``device``; its file is discarded."""
        tensor = self.get(name).to(device)
        self.discard(name)
        return tensor

    def _read(self, name: str, shape: torch.Size, dtype: torch.dtype, first_row: int = 0) -> Tensor:
        result = torch.empty(shape, dtype=dtype)
        offset = first_row * (result.nbytes // max(1, len(result)))
        with closing(PositionReader(self._folder / name)) as reader:
            reader.read_into(result.view(-1).view(torch.uint8).numpy().data, offset, "scratch data")
        return result

    def discard(self, name: str) -> None:
        """No later step needs ``name``; its file, if there is one, is removed after this step."""
        if self._kinds.pop(name, None) is not None:
            self._hashes.pop(name, None)
            self._restored.pop(name, None)
            self._written.discard(name)
            self._discarded.add(name)

    def end_step(self) -> StepFiles:
        """The files at the end of a step; those written or discarded from now on belong to the next step."""
        files: dict[str, FileRecord] = {
            name: {
                "dtype": torch_name(dtype),
                "shape": list(shape),
                "blake3": self._hashes[name].hexdigest() if name in self._hashes else self._restored[name],
            }
            for name, (shape, dtype) in self._kinds.items()
        }
        ended = StepFiles(files, self._paths(self._written), self._paths(self._discarded))
        self._written, self._discarded = set(), set()
        return ended

    def _paths(self, names: set[str]) -> list[Path]:
        return [self._folder / name for name in sorted(names)]

    def restore(self, files: Mapping[str, FileRecord], advance: Callable[[int], Any]) -> None:
        """Go on from the end of a step. Raises InputError if a file has changed since.

        advance: called with numbers of checked bytes.
        """
        for path in self._folder.iterdir():
            if path.name not in files:
                path.unlink()
        for name, record in files.items():
            path = self._folder / name
            dtype: Any = getattr(torch, record["dtype"], None)
            valid = path.name == name and isinstance(dtype, torch.dtype) and path.is_file()
            if not valid or hash_file(path, advance) != record["blake3"]:
                raise InputError(f"{path}: is not what the run wrote; start over with ‹overwrite›")
            self._kinds[name] = torch.Size(record["shape"]), dtype
            self._restored[name] = record["blake3"]

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self._folder.iterdir())
