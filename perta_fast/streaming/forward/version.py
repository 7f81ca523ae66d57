"""One state of a model's weights, and what it scores."""

from dataclasses import dataclass

from perta_fast.models.scores import TokenScores
from perta_fast.rules import Rescaling
from perta_fast.subtraction.inputs import Sources


@dataclass(frozen=True)
class Version:
    """Weights to score: those of the model as it is, or with a subtraction. name: for messages.

    sources: with the importances that weigh, or none; ``sources.model`` is the model that is walked.
    """

    name: str
    sources: Sources | None = None
    rescaling: Rescaling | None = None


@dataclass(frozen=True)
class VersionScores:
    """What a version scores.

    scores: by set, of each row, as ``score_rows`` gives them. changed: share of the elements, in [0, 1], whose stored
    value differs from the model's. not_finite: where something was no longer finite for the first time, or "". If it
    was a weight, all scores are NaN. seconds: of this version alone.
    """

    scores: dict[str, list[TokenScores]]
    changed: float
    not_finite: str
    seconds: float
