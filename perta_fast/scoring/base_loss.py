"""How little theta_0, which has not seen the forget data, knows of it: beyond that nothing more is forgotten.

A strength that takes the forget loss further only shows that something was removed.
"""

import math
from dataclasses import dataclass

from perta_fast.errors import InputError
from perta_fast.records.check import FORGOTTEN_RISE

_BOUND_ALONE = "the bound alone has decided"


@dataclass(frozen=True)
class BaseLoss:
    """The forget loss of theta_0, a mean over the rows in nats; None if it is no limit, and then ``warning`` says why.

    With neither, it is not asked for.
    """

    loss: float | None = None
    warning: str = ""

    @classmethod
    def unscored(cls, error: InputError) -> "BaseLoss":
        """Of a model that cannot be scored."""
        return cls(None, f"base cannot be scored on the forget data, so {_BOUND_ALONE}: {error}")

    @classmethod
    def measured(cls, loss: float) -> "BaseLoss":
        """``loss``, if it is finite."""
        if math.isfinite(loss):
            return cls(loss)
        return cls(None, f"the loss of base on the forget data is not finite, so {_BOUND_ALONE}")

    def above(self, forget_loss: float) -> "BaseLoss":
        """Without the loss, if theta_full knows no more of the forget data. forget_loss: of theta_full."""
        if self.loss is None or self.loss - forget_loss >= FORGOTTEN_RISE:
            return self
        return BaseLoss(
            None,
            f"the forget loss of model is {forget_loss:.4g}, and that of base {self.loss:.4g}: the model has learnt "
            f"nothing of the forget data that base does not know, so {_BOUND_ALONE}. Is base the checkpoint that "
            "model was tuned from?",
        )
