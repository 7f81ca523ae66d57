"""What holds a model on retained rows while it is tuned: the divergence of its next tokens from the base's."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from perta_fast.data.batches import Batch
from perta_fast.data.samples import Sample
from perta_fast.models.losses import token_logits
from perta_fast.models.token_scores import evaluation_mode


class Retained:
    """``weight`` times KL(base ‖ tuned), the mean over labelled tokens of retained rows, for each backward pass.

    The idea is that of θ_mem in MOX (arXiv 2602.06441): a θ_f that has learnt the forget data and nothing else. The
    base is the model without its adapter. Of a model that is tuned whole a frozen copy is kept, 4 bytes a parameter.
    """

    def __init__(
        self, module: Any, samples: Sequence[Sample], weight: float, at_a_time: int, seed: int, mixed: bool = False
    ) -> None:
        """mixed: whether ``module`` will compute in bfloat16, so that its frozen copy has to as well."""
        self.weight, self._mixed = weight, mixed
        self._samples, self._at_a_time, self._seed = samples, at_a_time, seed
        self._copy = None if hasattr(module, "disable_adapter") else deepcopy(module).requires_grad_(False).eval()
        self._order: tuple[int, list[int]] = (-1, [])  # of one pass over the rows

    def divergence(self, module: Any, number: int) -> Tensor:
        """The divergence on the rows of backward pass ``number``; which rows these are depends on the seed alone."""
        rows = (self._row(number * self._at_a_time + k) for k in range(min(self._at_a_time, len(self._samples))))
        device = next(module.parameters()).device
        return divergence(module, self._copy, Batch.of(list(rows), device), self._mixed)

    def _row(self, position: int) -> Sample:
        turn, place = divmod(position, len(self._samples))
        if self._order[0] != turn:
            drawn = torch.randperm(len(self._samples), generator=torch.Generator().manual_seed(self._seed + turn))
            self._order = turn, drawn.tolist()
        return self._samples[self._order[1][place]]


def divergence(module: Any, copy: nn.Module | None, batch: Batch, mixed: bool = False) -> Tensor:
    """KL(base ‖ tuned) in nats, the mean over labelled tokens.

    copy: the base, if it is not ``module`` itself. mixed: whether it computes in bfloat16, as accelerate wraps
    ``module`` to do.
    """
    device = batch.input_ids.device.type
    as_base = module.disable_adapter() if copy is None else torch.autocast(device, torch.bfloat16, enabled=mixed)
    with torch.no_grad(), evaluation_mode(module), as_base:
        expected = token_logits(copy or module, batch)[0].log_softmax(-1)
    found = token_logits(module, batch)[0].log_softmax(-1)
    return functional.kl_div(found, expected, reduction="sum", log_target=True) / len(found)
