"""What a run has learnt of its rows by tokenising some of them, where no gradient is taken on them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from perta_fast.data.samples import Sample, row_count, truncated_count


@dataclass
class EncodedRows:
    """By role, how many rows were tokenised, and how many of these were cut to the length limit."""

    count: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)

    def note(self, role: str, samples: Sequence[Sample]) -> None:
        """Keep what the samples of one role tell."""
        self.count[role], self.cut[role] = row_count(samples), truncated_count(samples)
