"""How the tensors of a batch hold its samples: N samples, T tokens of the longest of them, R rows of a sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor


class UnexpectedCall(Exception):
    """A module was called in a way that its ``ModuleFisher`` cannot compute."""


class Layout(Enum):
    """What the first dimensions of a linear map's input are.

    Sizes alone do not tell it, since any size of a model may equal N or T. Two probes of different sizes do.
    """

    TOKENS = "(N, T, ..., d)"
    SAMPLES = "(N, ..., d)"
    FLAT = "(N * T, d)"


@dataclass
class BatchShape:
    """The batch that runs through the model: N samples, padded on the right to T tokens."""

    count: int
    tokens: int
    lengths: Tensor  # (N,) int64 on the CPU: real tokens of each sample

    def layouts(self, tensor: Tensor) -> list[Layout]:
        """The layouts that the sizes of ``tensor`` allow, the one that tells most first."""
        fits = {
            Layout.TOKENS: tensor.dim() >= 3 and tensor.shape[:2] == (self.count, self.tokens),
            Layout.SAMPLES: tensor.dim() >= 2 and tensor.shape[0] == self.count,
            Layout.FLAT: tensor.dim() == 2 and tensor.shape[0] == self.count * self.tokens,
        }
        return [layout for layout, fit in fits.items() if fit]

    def by_sample(self, tensor: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """``tensor`` as (N, R, d), and how many of the R rows of each sample are real (None: unknown, take all).

        Raises UnexpectedCall for sizes that the layout does not allow. All rows of a single sample are its own.
        """
        if self.count == 1:
            return tensor.reshape(1, -1, tensor.shape[-1]), None
        if layout not in self.layouts(tensor):
            raise UnexpectedCall(self.unlike(tensor))
        rows = tensor.reshape(self.count, -1, tensor.shape[-1])
        return rows, None if layout is Layout.SAMPLES else self.lengths * (rows.shape[1] // self.tokens)

    def rows_per_sample(self, value: Any) -> int:
        """The number of leading rows of an argument for each sample; 0 if it has no sample dimension."""
        leading = value.shape[0] if isinstance(value, Tensor) and value.dim() > 0 else 0
        return {self.count: 1, self.count * self.tokens: self.tokens}.get(leading, 0)

    def parts(self, value: Any) -> Sequence[Any]:
        """What each sample has of an argument. Raises UnexpectedCall for a tensor without a sample dimension."""
        if self.count == 1 or not isinstance(value, Tensor):
            return [value] * self.count
        rows = self.rows_per_sample(value)
        if not rows:
            raise UnexpectedCall(self.unlike(value))
        return list(value.split(rows))

    def unlike(self, tensor: Tensor) -> str:
        """What to say of a tensor of unexpected sizes."""
        return f"shape {tuple(tensor.shape)} in a batch of {self.count} samples of {self.tokens} tokens"
