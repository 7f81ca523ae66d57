"""Samples that are scored together."""

from collections.abc import Sequence
from dataclasses import dataclass

from perta_fast.data.samples import Sample


@dataclass(frozen=True)
class SampleSet:
    """Samples in batches of their own, as ``score_tokens`` makes them. name: different from those of other sets.

    detailed, hidden: as in ``score_tokens``.
    """

    name: str
    samples: Sequence[Sample]
    detailed: bool = False
    hidden: int | None = None
