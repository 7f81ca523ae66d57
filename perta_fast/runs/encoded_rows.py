"""What a run has learnt of its rows by tokenising some of them, where no gradient is taken on them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from perta_fast.data.chat import Told
from perta_fast.data.samples import Sample, row_count, truncated_count


@dataclass
class EncodedRows:
    """By role, how many rows were tokenised, how many of these were cut to the length limit, and what was told."""

    count: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    told: dict[str, Told] = field(default_factory=dict)

    def note(self, role: str, samples: Sequence[Sample], told: Told) -> None:
        """Keep what the samples of one role tell. told: to the chat template."""
        self.count[role], self.cut[role], self.told[role] = row_count(samples), truncated_count(samples), told
