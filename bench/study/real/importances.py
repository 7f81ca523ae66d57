"""Importance of the forget and the retain rows, as pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.study.real.data import spread
from bench.study.real.models import Models, load_model
from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.data.samples import IGNORED, Sample
from perta_fast.importance.gradients import accumulate
from perta_fast.models.in_use import measuring
from perta_fast.ops.reference import weights
from perta_fast.rules import Rule

_ROLES = ("forget", "retain")
_FILE = "importance.safetensors"
_BATCH_SIZE = 8


@dataclass(frozen=True)
class Weighing:
    """How w is found: a rule, and where its importance comes from.

    at: "base" takes gradients at theta_0, "full" at theta_full. drawn: labels are drawn from the model there instead of
    the data's, which makes the squares those of the true Fisher. count: rows of each set, spread evenly; None: all.
    """

    rule: str = "tv"
    alpha: float = 1.0
    at: str = "base"
    drawn: bool = False
    count: int | None = None


def importances(models: Models, weighing: Weighing) -> list[Path]:
    """The pieces of forget and retain importance; none for ``tv``."""
    estimator = Rule.of(weighing.rule, 0.0).estimator
    if estimator is None:
        return []
    model = {"base": models.base, "full": models.full}[weighing.at]()
    folder = models.shared_folder if weighing.at == "base" and not weighing.drawn else models.folder
    pieces = []
    for role in _ROLES:
        rows = getattr(models.rows, role)
        rows = rows if weighing.count is None else spread(rows, weighing.count)
        labels = ", labels drawn" if weighing.drawn else ""
        name = f"importance/{estimator} of {len(rows)} {role} rows at {weighing.at}{labels}"
        made_of = {"model": models.store.relative(model), "rows": models.rows.digest, "count": len(rows)}

        def make(folder: Path, rows: Sequence[dict[str, str]] = rows) -> None:
            samples = models.samples(rows)
            module = load_model(model)
            if weighing.drawn:
                samples = drawn(module, samples, models.seed)
            with _bfloat16_products(), measuring(module):
                # Not ``estimate_importance``, which takes no labels but the data's own.
                found = accumulate(module, samples, estimator, _BATCH_SIZE, progress=False)
            save_file({name: tensor.cpu() for name, tensor in found.means.items()}, folder / _FILE)

        pieces.append(models.store.piece(f"{folder}/{name}", made_of, make))
    return pieces


def weights_by_name(models: Models, weighing: Weighing) -> Mapping[str, Tensor] | None:
    """w of every parameter by its name; None for ``tv``."""
    directories = importances(models, weighing)
    if not directories:
        return None
    forget, retain = (load_file(piece / _FILE) for piece in directories)
    rescaling = Rule.of(weighing.rule, 0.0, None, weighing.alpha).rescaling
    return {name: weights(forget[name], retain[name], rescaling) for name in forget}


@torch.no_grad()
def drawn(module: Any, samples: Sequence[Sample], seed: int) -> list[Sample]:
    """``samples`` with every label drawn from what the module predicts there, given the tokens of the data."""
    random = torch.Generator().manual_seed(seed)
    changed = list(samples)
    for numbers in batches_by_length(samples, 8):
        batch = Batch.of([samples[k] for k in numbers], next(module.parameters()).device)
        logits = module(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        for k, of_sample in zip(numbers, logits.float().cpu(), strict=True):
            labels = torch.tensor(samples[k].labels)
            labelled = (labels[1:] != IGNORED).nonzero()[:, 0]
            labels[labelled + 1] = torch.multinomial(of_sample[labelled].softmax(-1), 1, generator=random)[:, 0]
            changed[k] = replace(samples[k], labels=tuple(labels.tolist()))
    return changed


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Products of float32 matrices on the CPU take bfloat16 inputs, where the processor is faster with them."""
    products: Any = torch.backends.mkldnn
    before = products.matmul.fp32_precision
    products.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.matmul.fp32_precision = before
