"""What a model scores on the labelled tokens of one sample. It needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def _none(dtype: str) -> "NDArray[Any]":
    import numpy as np

    return np.empty(0, dtype=dtype)


@dataclass(frozen=True)
class TokenScores:
    """Scores of one sample's L labelled tokens, each given the tokens before it.

    log_probs: (L,) float32, nats. hits: (L,) bool, whether the token is the likeliest. standardised: (L,) float32,
    (log p - mean) / deviation of log p over the vocabulary, by the model's probabilities. The last two only if asked
    for; ``standardised`` costs a few passes over all logits.
    """

    log_probs: "NDArray[np.float32]"
    hits: "NDArray[np.bool_]" = field(default_factory=lambda: _none("bool"))
    standardised: "NDArray[np.float32]" = field(default_factory=lambda: _none("float32"))

    @classmethod
    def joined(cls, scores: "Sequence[TokenScores]") -> "TokenScores":
        """The scores of all labelled tokens of a row, one sample after the other."""
        import numpy as np

        if len(scores) == 1:
            return scores[0]
        names = ("log_probs", "hits", "standardised")
        return cls(*(np.concatenate([getattr(score, name) for score in scores]) for name in names))
