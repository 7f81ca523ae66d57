"""θ_f: a base tuned on the forget data alone, by the trainer and the adapters of others."""

from perta_fast.tuning.record import Tuning
from perta_fast.tuning.run import tune

__all__ = ["Tuning", "tune"]
