"""What settings are chosen by. The command line imports this file at its start, so it needs nothing else."""

from typing import Final, Literal, get_args

Metric = Literal["loss", "Q_A_Prob", "Q_A_ROUGE", "extraction_strength", "exact_memorization"]  # as in ``evaluation``
Selection = Literal["best-forget", "closest"]
LOSS: Final = "loss"  # it grows as a model forgets; all other metrics shrink
METRICS: tuple[Metric, ...] = get_args(Metric)
GENERATED_METRICS = ("Q_A_ROUGE",)  # of answers that the model generates
ORIGINAL: Final = "the model as it is"  # what messages and progress call theta_full at lambda 0
SELECTIONS: tuple[Selection, ...] = get_args(Selection)
