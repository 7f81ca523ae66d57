"""Hidden states at the boundaries between layers, in files of a scratch directory; no padding is kept.

Read and written by plain calls rather than through a mapping: a full disk is then an error that can be
reported, not a signal that ends the process.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from blake3 import blake3
from torch import Tensor

from perta_fast.errors import InputError
from perta_fast.files.durable import sync_file, write_fully
from perta_fast.files.hashing import hash_file
from perta_fast.files.reading import PositionReader


@dataclass(frozen=True)
class Piece:
    """Samples that run together: token ids (N, T), padded on the right, and where their rows lie."""

    input_ids: Tensor
    lengths: tuple[int, ...]
    begin: int  # rows before the first sample's
    numbers: tuple[int, ...] = ()  # of the samples

    @property
    def end(self) -> int:
        """Rows up to the last sample's."""
        return self.begin + sum(self.lengths)

    @property
    def attention_mask(self) -> Tensor:
        """(N, T) int64, 1 on real tokens."""
        lengths = torch.tensor(self.lengths)
        mask = torch.arange(self.input_ids.shape[1]) < lengths[:, None]
        return mask.long().to(self.input_ids.device)

    def apart(self) -> Sequence["Piece"]:
        """Each sample by itself, without padding."""
        begin, pieces = self.begin, []
        for k, length in enumerate(self.lengths):
            pieces.append(Piece(self.input_ids[k : k + 1, :length], (length,), begin, self.numbers[k : k + 1]))
            begin += length
        return pieces


class FileState(TypedDict):
    """What a spilled file holds: its type, the shape of a row (or of a whole tensor), and its hash."""

    dtype: str
    shape: list[int]
    blake3: str


@dataclass(frozen=True)
class Settled:
    """A spill at the end of a step: its files, and what is still to be flushed and then removed."""

    files: dict[str, FileState]
    fresh: list[Path]
    dead: list[Path]

    def flush(self) -> None:
        """Make what was written durable."""
        for path in self.fresh:
            sync_file(path)

    def clear(self) -> None:
        """Remove what was forgotten; only once nothing durable names it any more."""
        for path in self.dead:
            path.unlink(missing_ok=True)


class Spill:
    """Tensors of real tokens by name, and whole tensors that wait for their turn."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._kinds: dict[str, tuple[torch.Size, torch.dtype]] = {}  # shape of a row, or of a whole tensor
        self._hashes: dict[str, blake3] = {}  # of what is or was written
        self._restored: dict[str, str] = {}  # hashes of what an earlier attempt wrote
        self._fresh: set[str] = set()
        self._dead: set[str] = set()

    def write(self, name: str, piece: Piece, values: Tensor) -> None:
        """Keep ``values`` (N, T, ...) at its real tokens; pieces come in order, of one type and row shape."""
        self._kinds[name] = values.shape[2:], values.dtype
        self._write(name, values[piece.attention_mask.bool()], piece.begin)

    def _write(self, name: str, rows: Tensor, begin: int) -> None:
        data = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        start = os.O_TRUNC if begin == 0 else 0
        if begin == 0:
            self._hashes[name] = blake3()
            self._dead.discard(name)
        descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | start, 0o666)
        try:
            if data.size:
                write_fully(descriptor, data.data, begin * (data.size // len(rows)))
                self._hashes[name].update(data.data)
        finally:
            os.close(descriptor)
        self._fresh.add(name)

    def read(self, name: str, piece: Piece) -> Tensor:
        """What was written, with zeros in place of padding, on the device of ``piece``."""
        device, (row, dtype) = piece.input_ids.device, self._kinds[name]
        result = torch.zeros((*piece.input_ids.shape, *row), dtype=dtype, device=device)
        rows = self._read(name, torch.Size((sum(piece.lengths), *row)), dtype, piece.begin)
        result[piece.attention_mask.bool()] = rows.to(device)
        return result

    def _read(self, name: str, shape: torch.Size, dtype: torch.dtype, begin: int = 0) -> Tensor:
        result = torch.empty(shape, dtype=dtype)
        begin *= result.nbytes // max(1, len(result))
        with closing(PositionReader(self._folder / name)) as reader:
            reader.read_into(result.view(-1).view(torch.uint8).numpy().data, begin, "scratch data")
        return result

    def forget(self, name: str) -> None:
        """``name`` is needed no more; its file, if anything was written, goes when the step is settled."""
        if self._kinds.pop(name, None) is not None:
            self._hashes.pop(name, None)
            self._restored.pop(name, None)
            self._fresh.discard(name)
            self._dead.add(name)

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a whole tensor of at least one dimension."""
        self._kinds[name] = tensor.shape, tensor.dtype
        self._write(name, tensor, 0)

    def take(self, name: str, device: torch.device) -> Tensor:
        """A tensor that was ``put``, which is forgotten."""
        tensor = self._read(name, *self._kinds[name]).to(device)
        self.forget(name)
        return tensor

    def settle(self) -> Settled:
        """End a step."""
        files: dict[str, FileState] = {
            name: {
                "dtype": str(dtype).removeprefix("torch."),
                "shape": list(shape),
                "blake3": self._hashes[name].hexdigest() if name in self._hashes else self._restored[name],
            }
            for name, (shape, dtype) in self._kinds.items()
        }
        settled = Settled(files, self._paths(self._fresh), self._paths(self._dead))
        self._fresh, self._dead = set(), set()
        return settled

    def _paths(self, names: set[str]) -> list[Path]:
        return [self._folder / name for name in sorted(names)]

    def restore(self, files: Mapping[str, FileState], advance: Callable[[int], Any]) -> None:
        """Go on from a settled step. Raises InputError if a file is not what it was then.

        advance: called with the bytes that were checked.
        """
        for path in self._folder.iterdir():
            if path.name not in files:
                path.unlink()
        for name, state in files.items():
            path = self._folder / name
            known = path.name == name and isinstance(getattr(torch, state["dtype"], None), torch.dtype)
            if not known or not path.is_file() or hash_file(path, advance) != state["blake3"]:
                raise InputError(f"{path}: is not what the run wrote; start over with --overwrite")
            self._kinds[name] = torch.Size(state["shape"]), getattr(torch, state["dtype"])
            self._restored[name] = state["blake3"]

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self._folder.iterdir())
