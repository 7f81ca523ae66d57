"""Metrics of a model that is not loaded: first which samples they ask for, then their values from its scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from perta_fast.data.samples import Sample, by_row
from perta_fast.evaluation.examinee import Examinee
from perta_fast.files.kept_rows import KeptRows
from perta_fast.models.scores import TokenScores
from perta_fast.streaming.forward.sample_set import SampleSet


@dataclass
class Asking(Examinee):
    """Notes what it is to score, and gives zeros. The subject needs no weights.

    sets: for the model, by role, in the order in which they are asked for. reference_sets: for the reference model.
    Notes and numbers that are made of the zeros mean nothing.
    """

    sets: dict[str, SampleSet] = field(default_factory=dict)
    reference_sets: dict[str, SampleSet] = field(default_factory=dict)

    def score_by(self, reference: Path, sets: Mapping[str, Sequence[Sample]]) -> dict[str, list[TokenScores]]:
        return {role: self._note(self.reference_sets, samples, role, False) for role, samples in sets.items()}

    def _score(
        self, samples: Sequence[Sample], description: str, *, detailed: bool, rows: KeptRows | None = None
    ) -> list[TokenScores]:
        return self._note(self.sets, samples, description, detailed)

    def _note(
        self, sets: dict[str, SampleSet], samples: Sequence[Sample], name: str, detailed: bool
    ) -> list[TokenScores]:
        asked = SampleSet(name, samples, detailed, self.hidden)
        if sets.setdefault(name, asked) != asked:
            raise ValueError(f"two sets of samples have the name {name}")
        return [_zeros(sum(samples[k].label_count for k in numbers), detailed) for numbers in by_row(samples)]


@dataclass
class Answering(Examinee):
    """Gives the scores that were found for what an ``Asking`` was asked for, by the same names."""

    scores: Mapping[str, list[TokenScores]] = field(default_factory=dict)
    reference_scores: Mapping[str, list[TokenScores]] = field(default_factory=dict)

    def score_by(self, reference: Path, sets: Mapping[str, Sequence[Sample]]) -> dict[str, list[TokenScores]]:
        return {role: self.reference_scores[role] for role in sets}

    def _score(
        self, samples: Sequence[Sample], description: str, *, detailed: bool, rows: KeptRows | None = None
    ) -> list[TokenScores]:
        return self.scores[description]


def _zeros(count: int, detailed: bool) -> TokenScores:
    """Scores of ``count`` labelled tokens."""
    log_probs = np.zeros(count, dtype=np.float32)
    return TokenScores(log_probs, np.zeros(count, dtype=np.bool_), log_probs) if detailed else TokenScores(log_probs)
