"""How a streamed run is cut, which decides what is in memory and on the scratch disk at one time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from perta_fast.errors import InputError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Schedule:
    """Choices that change what a streamed run costs; of its result they change only the order of sums.

    batch_size: samples that run together. every: hidden states stay on disk at each ``every``-th boundary between
    layers; those in between are computed again on the way back. groups: the batches are split into this many groups;
    the walk goes through the model once for each, with the sums of all layers, or the scores, on disk in between.
    overlap: while one layer is computed, the weights of the next are read and the result of the last is written; this
    takes memory for all of them.
    """

    batch_size: int = 8
    every: int = 1
    groups: int = 1
    overlap: bool = True

    def __post_init__(self) -> None:
        if min(self.batch_size, self.every, self.groups) < 1:
            raise InputError(f"{self!r}: batch size, every and groups must be at least 1")

    def of_group(self, batches: Sequence[_T], group: int) -> Sequence[_T]:
        """The batches of a data set that belong to ``group``."""
        begin, end = (k * len(batches) // self.groups for k in (group, group + 1))
        return batches[begin:end]

    def __str__(self) -> str:
        kept = "every boundary" if self.every == 1 else f"one boundary in {self.every}"
        return (
            f"batches of {self.batch_size}, hidden states kept at {kept}, "
            f"{self.groups} group{'s' * (self.groups > 1)}, {'' if self.overlap else 'no '}overlap"
        )
