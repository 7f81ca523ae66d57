"""What a model has forgotten and what it has kept: TOFU, MUSE, or a user's own data."""

from perta_fast.evaluation.results import Evaluation
from perta_fast.evaluation.run import evaluate

__all__ = ["Evaluation", "evaluate"]
