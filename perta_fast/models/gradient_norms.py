"""How large the gradient of each row's loss is, tensor by tensor."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from perta_fast.data.batches import Batch
from perta_fast.data.samples import IGNORED, Sample
from perta_fast.errors import InputError
from perta_fast.files.kept_rows import KeptRows
from perta_fast.models.losses import token_logits
from perta_fast.models.token_scores import device_of
from perta_fast.progress import Bar, Progress


def gradient_norms(
    module: nn.Module,
    rows: Sequence[Sequence[Sample]],
    *,
    kept: KeptRows | None = None,
    progress: Progress = False,
    description: str = "gradient norms",
) -> list[float]:
    """For each row, the mean over the parameters of the 2-norm of the gradient of its mean token loss, float32.

    rows: the samples of each row. Its last label, the end of the answer, does not count; a row without another label
    has NaN. kept: norms that are known already, and the place for others. Each gradient is dropped as soon as its norm
    is known; gradients that the module had are put back. Raises InputError if no parameter takes a gradient.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("mia_gradnorm: no parameter of the model takes a gradient; leave this metric out")
    kept = KeptRows() if kept is None else kept
    norms: dict[int, float] = dict(kept.done)
    with Bar(len(rows), description, progress, "sample", done=len(norms)) as bar, _norms_of(parameters) as found:
        for number, samples in enumerate(rows):
            if number in kept.done:
                continue
            batch = Batch.of(_without_last_label(samples), device_of(module))
            if (batch.labels[:, 1:] == IGNORED).all():
                norms[number] = math.nan
            else:
                with torch.enable_grad():
                    logits, targets, _ = token_logits(module, batch)
                    nn.functional.cross_entropy(logits, targets).backward()
                norms[number] = torch.stack(found).mean().item()
                found.clear()
            kept.add({number: norms[number]})
            bar.update(1)
    return [norms[number] for number in range(len(rows))]


def _without_last_label(samples: Sequence[Sample]) -> list[Sample]:
    last = samples[-1]
    end = max(k for k, label in enumerate(last.labels) if label != IGNORED)
    labels = tuple(IGNORED if k == end else label for k, label in enumerate(last.labels))
    return [*samples[:-1], Sample(last.input_ids, labels)]


@contextmanager
def _norms_of(parameters: Sequence[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
    """A list that gets the norm of every gradient that is made; the gradient itself is dropped."""
    norms: list[torch.Tensor] = []

    def note(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        parameter.grad = None

    own = [parameter.grad for parameter in parameters]
    handles = [parameter.register_post_accumulate_grad_hook(note) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield norms
    finally:
        for handle, parameter, gradient in zip(handles, parameters, own, strict=True):
            handle.remove()
            parameter.grad = gradient
