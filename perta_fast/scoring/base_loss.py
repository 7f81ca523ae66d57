"""How little theta_0, which has not seen the forget data, knows of it: beyond that nothing more is forgotten.

A strength that takes the forget loss further only shows that something was removed.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from perta_fast.errors import InputError
from perta_fast.records.check import FORGOTTEN_RISE

BOUND_ALONE = "Give a bound on what is retained, such as ‹max_retain_rise›, without ‹up_to_base›"  # of a sweep


@dataclass(frozen=True)
class ForgetLimit:
    """The largest forget loss that a setting may have, that of theta_0, in nats; None if there is no such limit.

    warning: why there is none, if there was to be one.
    """

    loss: float | None = None
    warning: str = ""

    @classmethod
    def of(cls, base: float | None, model: float) -> "ForgetLimit":
        """From the forget losses of theta_0, None if it is not asked for, and of theta_full."""
        if base is None or base - model >= FORGOTTEN_RISE:
            return cls(base)
        return cls(
            None,
            f"the forget loss of model is {model:.4g}, and that of base {base:.4g}: the model has learnt nothing of "
            "the forget data that base does not know, so the bound alone has decided. Is base the checkpoint that "
            "model was tuned from?",
        )


def not_scored(base: Path, why: str, instead: str = BOUND_ALONE) -> InputError:
    """For a theta_0 that has no loss on the forget data. instead: what to do."""
    return InputError(f"{base}: base cannot be scored on the forget data ({why.removesuffix('.')}). {instead}")


def checked_base_loss(base: Path, loss: float, instead: str = BOUND_ALONE) -> float:
    """``loss``. Raises InputError if it is not finite. instead: as in ``not_scored``."""
    if not math.isfinite(loss):
        raise not_scored(base, "its loss is not finite", instead)
    return loss
