"""The sizes of a study."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The use of the authors, the shape of the models, and the length of each training.

    pretraining_authors, validation_authors: the first and the last, counted from 1 in the order of ``full``. TOFU
    tests retained knowledge by authors 1 to 20, so they are retained here too.
    unlearning_rates: the learning rates that are tried for each method that trains. It takes ``unlearning_steps``
    steps, the first ``unlearning_warm_up`` at a lower rate. After every ``check_every`` steps the model is a candidate.
    alphas: the values of alpha that are tried where alpha is chosen.
    """

    rows_per_author: int = 20
    pretraining_authors: tuple[int, int] = (21, 100)
    validation_authors: tuple[int, int] = (101, 110)
    vocabulary: int = 4096
    hidden_size: int = 192
    layers: int = 4
    heads: int = 6
    context: int = 256
    batch_size: int = 16
    pretraining_epochs: int = 15
    pretraining_rate: float = 2e-3
    tuning_epochs: int = 10
    tuning_rate: float = 1e-3
    unlearning_steps: int = 128
    unlearning_warm_up: int = 16
    check_every: int = 8
    unlearning_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    alphas: tuple[float, ...] = (1.0, 4.0, 16.0, 64.0, 256.0)
    scoring_batch: int = 64
    new_tokens: int = 96


SIZES = {
    "small": Settings(),
    "large": Settings(hidden_size=768, layers=12, heads=12, batch_size=32, pretraining_rate=5e-4, tuning_rate=2e-4),
}
