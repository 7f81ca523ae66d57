"""Hidden states at the boundaries between layers, in files of a scratch directory; no padding is kept.

Read and written by plain calls rather than through a mapping: a full disk is then an error that can be
reported, not a signal that ends the process.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from perta_fast.durable import write_fully


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


class Spill:
    """Tensors of real tokens by name, and whole tensors that wait for their turn."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kinds: dict[str, tuple[torch.Size, torch.dtype]] = {}  # shape of a row, or of a whole tensor

    def write(self, name: str, piece: Piece, values: Tensor) -> None:
        """Keep ``values`` (N, T, ...), of one type and row shape for all pieces, at its real tokens."""
        self._kinds[name] = values.shape[2:], values.dtype
        self._write(name, values[piece.attention_mask.bool()], piece.begin)

    def _write(self, name: str, rows: Tensor, begin: int) -> None:
        data = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            if data.size:
                write_fully(descriptor, data.data, begin * (data.size // len(rows)))
        finally:
            os.close(descriptor)

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
        found = np.fromfile(self._folder / name, np.uint8, result.nbytes, offset=begin)
        result.view(-1).view(torch.uint8).numpy()[:] = found
        return result

    def remove(self, name: str) -> None:
        """Forget ``name``."""
        (self._folder / name).unlink()

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a whole tensor of at least one dimension."""
        self._kinds[name] = tensor.shape, tensor.dtype
        self._write(name, tensor, 0)

    def take(self, name: str, device: torch.device) -> Tensor:
        """A tensor that was ``put``, which is forgotten."""
        tensor = self._read(name, *self._kinds[name]).to(device)
        self.remove(name)
        return tensor
