"""The sizes of a study on real models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The rows that are used, the length of each training, and what is measured.

    authors, forgotten: authors of TOFU that theta_full is tuned on, and those of them to forget; 20 rows each.
    epochs, rate: of theta_full and gold. tuned_epochs: of theta_f, which takes the same rate. lora_*: of a LoRA.
    measured_forget, measured_retain: rows by whose loss the points of a curve are measured, evenly spread.
    scored: rows of each kind for what is measured once, where a method forgets as much as gold.
    relearned, relearning_rate: steps on a tenth of the forget rows, 8 rows each, and their rate.
    limits: rises of the retain loss, in nats, at which methods are compared.
    steps, check_every, rates, steering_rates: of a rival that trains, the last of RMU; each step takes ``batch_size``
    rows of each set.
    """

    authors: int = 12
    forgotten: int = 2
    batch_size: int = 8
    context: int = 256
    epochs: int = 6
    rate: float = 1e-4
    tuned_epochs: int = 10
    lora_rank: int = 16
    lora_rate: float = 1e-3
    lora_epochs: int = 15
    measured_forget: int = 20
    measured_retain: int = 40
    scored: int = 40
    limits: tuple[float, ...] = (0.05, 0.1, 0.6931)
    largest_strength: float = 4096.0
    steps: int = 24
    check_every: int = 4
    rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4)
    steering_rates: tuple[float, ...] = (1e-3, 3e-3)
    relearned: tuple[int, ...] = (5, 20)
    relearning_rate: float = 1e-5
    few_rows: int = 8


SMALL = "small"  # the size that is meant where none is named
SIZES = {
    SMALL: Settings(),
    "middle": Settings(authors=60, forgotten=6, epochs=5, tuned_epochs=8, measured_forget=40, measured_retain=80),
    "large": Settings(
        authors=200, forgotten=20, batch_size=16, epochs=5, tuned_epochs=5, measured_forget=100, measured_retain=200,
        scored=400, steps=120, check_every=10,
    ),
}  # fmt: skip
