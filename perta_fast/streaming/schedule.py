"""How a streamed run is cut: what it keeps in memory and on the scratch disk at one time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from perta_fast.errors import InputError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Schedule:
    """The choices that change a streamed run's cost; of its result they change only the order of sums.

    batch_size: samples that run together. every: hidden states are kept on disk at each ``every``-th boundary
    between layers; those between are computed again on the way back. groups: the samples are dealt into so many
    groups, each walked by itself, with the sums of every layer on disk in between. overlap: the next layer's
    weights are read, and the last layer's result is written, while one layer is computed; this takes memory for
    both.
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
