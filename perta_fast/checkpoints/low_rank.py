"""What LoRA adds to a matrix (arXiv 2106.09685), kept as two factors."""

from dataclasses import dataclass

from perta_fast.arrays import FloatArray
from perta_fast.checkpoints.safetensors_file import TensorEntry, read_values


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a matrix, or to its transpose: scale * b @ a. a: (rank, d_in), b: (d_out, rank)."""

    a: TensorEntry
    b: TensorEntry
    scale: float
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        d_out, d_in = self.b.shape[0], self.a.shape[1]
        return (d_in, d_out) if self.transposed else (d_out, d_in)

    def factors(self) -> tuple[FloatArray, FloatArray]:
        """Two float32 arrays, (rows, rank) and (rank, columns), whose product times scale is added to the matrix.

        Raises RunError if the file cannot be read.
        """
        import numpy as np

        a, b = _read(self.a), _read(self.b)
        if self.transposed:
            return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
        return b, a

    def same(self, other: "LowRank") -> bool:
        """Whether the other one adds the same, factor by factor."""
        pairs = zip(self.factors(), other.factors(), strict=True)
        return self.scale == other.scale and all(
            own.shape == theirs.shape and bool((own == theirs).all()) for own, theirs in pairs
        )


def _read(entry: TensorEntry) -> FloatArray:
    return read_values(entry, 0, entry.count).reshape(entry.shape)
