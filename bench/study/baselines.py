"""Unlearning by training: gradient ascent, gradient difference and NPO.

Losses are those of open-unlearning (its weights gamma and alpha are 1, NPO's beta 0.1), with one difference: it takes
the mean over the tokens of a batch, and here it is the mean over samples of the mean token loss. Sources: gradient
difference from Liu et al. (arXiv 2203.12817) and TOFU (arXiv 2401.06121); NPO from Zhang et al. (arXiv 2404.05868),
with the retain loss that open-unlearning adds to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.study.models import load_model
from bench.study.selection import KEPT, choose
from bench.study.training import all_losses, losses_of
from bench.study.trial import Trial, write_candidates
from perta_fast.data.batches import Batch
from perta_fast.demo.training import descend_

BETA = 0.1


@dataclass(frozen=True)
class Losses:
    """The losses of one batch. forget, retain: (N,) mean token loss of each sample.

    count: (N,) tokens in the answers of the forget samples. reference: (N,) their mean token loss under theta_full.
    """

    forget: Tensor
    count: Tensor
    reference: Tensor
    retain: Tensor


def gradient_ascent(losses: Losses) -> Tensor:
    """-L_f."""
    return -losses.forget.mean()


def gradient_difference(losses: Losses) -> Tensor:
    """-L_f + L_r."""
    return -losses.forget.mean() + losses.retain.mean()


def npo(losses: Losses) -> Tensor:
    """-2 / beta · log sigmoid(-beta log(p / p_full)) + L_r, where p is the probability of a whole answer."""
    log_ratio = losses.count * (losses.reference - losses.forget)
    return -2 / BETA * functional.logsigmoid(-BETA * log_ratio).mean() + losses.retain.mean()


BASELINES: Mapping[str, Callable[[Losses], Tensor]] = {
    "gradient ascent": gradient_ascent,
    "gradient difference": gradient_difference,
    "NPO": npo,
}


def runs(trial: Trial, method: str, kept: float = KEPT) -> dict[float, Path]:
    """The runs of one method by learning rate: pieces with the candidates and the best model as a checkpoint.

    The first seed tries all rates, the others only the rate that the first has chosen for ``kept``.
    """
    rates: Sequence[float] = trial.models.settings.unlearning_rates
    if trial.first is not None:
        pieces = list(runs(trial.first, method).values())
        rates = [trial.first.choice(pieces, kept).setting["rate"]]
    return {rate: _run(trial, method, rate) for rate in rates}


def score_baseline(trial: Trial, method: str) -> Path:
    """The piece with the scores of a method, at the learning rate and the step that are chosen for it."""
    pieces = runs(trial, method)
    best = pieces[trial.choice(list(pieces.values())).setting["rate"]]
    return trial.score(method, {"model": trial.name_of(best)}, lambda: load_model(best))


def _run(trial: Trial, method: str, rate: float) -> Path:
    settings, full = trial.models.settings, trial.models.full()
    limits = trial.limits()
    made_of = {
        "full": trial.name_of(full),
        "data": trial.name_of(trial.split.folder),
        "method": method,
        "rate": rate,
        "seed": trial.models.seed,
        "limits": asdict(limits),
        "steps": [settings.unlearning_steps, settings.unlearning_warm_up, settings.check_every],
        "batch_size": settings.batch_size,
    }

    def make(folder: Path) -> None:
        module = load_model(full)
        candidates = [trial.measure(module, {"rate": rate, "step": 0})]
        module.save_pretrained(folder)
        for step in _train_(trial, module, method, rate):
            if step % settings.check_every == 0:
                candidates.append(trial.measure(module, {"rate": rate, "step": step}))
                if choose(candidates, limits) is candidates[-1]:
                    module.save_pretrained(folder)
        write_candidates(folder, candidates)

    return trial.piece(f"{method}/rate {rate:g}", made_of, make)


def _train_(trial: Trial, module: Any, method: str, rate: float) -> Iterator[int]:
    """Train, and yield the number of steps after each. A step takes as many retained samples as forget samples."""
    settings, seed = trial.models.settings, trial.models.seed
    forget, retain = trial.samples("forget"), trial.samples("retain")
    reference = all_losses(module, forget, settings.scoring_batch)
    count = torch.tensor([float(sample.label_count) for sample in forget])
    device = next(module.parameters()).device

    def loss(numbers: tuple[list[int], list[int]]) -> Tensor:
        of_forget, of_retain = numbers
        losses = Losses(
            losses_of(module, Batch.of([forget[k] for k in of_forget], device)),
            count[of_forget].to(device),
            reference[of_forget].to(device),
            losses_of(module, Batch.of([retain[k] for k in of_retain], device))
            if method != "gradient ascent"  # which uses no retained samples
            else torch.zeros(1),
        )
        return BASELINES[method](losses)

    size, steps = settings.batch_size, settings.unlearning_steps
    batches = list(zip(_batches(len(forget), size, steps, seed), _batches(len(retain), size, steps, seed), strict=True))
    warm_up = settings.unlearning_warm_up
    yield from descend_(module, batches, loss, lambda step: rate * min(1.0, (step + 1) / warm_up))


def _batches(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """``steps`` batches of at most ``size`` numbers of samples, every epoch in a new random order."""
    order = torch.Generator().manual_seed(seed)
    batches: list[list[int]] = []
    while len(batches) < steps:
        batches += [batch.tolist() for batch in torch.randperm(count, generator=order).split(size)]
    return batches[:steps]
