"""Scores of tokens as one array, which a scratch file holds."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perta_fast.models.scores import TokenScores


def as_columns(scores: Sequence[TokenScores], detailed: bool) -> Tensor:
    """Scores of several samples as one float32 array: a row for each of the three, or for ``log_probs`` alone."""
    names = ("log_probs", "hits", "standardised") if detailed else ("log_probs",)
    rows = [[getattr(score, name).astype(np.float32) for score in scores] for name in names]
    return torch.from_numpy(np.stack([np.concatenate([np.empty(0, np.float32), *row]) for row in rows]))


def from_columns(columns: NDArray[np.float32]) -> TokenScores:
    """The scores of one sample."""
    if len(columns) == 1:
        return TokenScores(columns[0].copy())
    log_probs, hits, standardised = columns
    return TokenScores(log_probs.copy(), hits == 1, standardised.copy())
