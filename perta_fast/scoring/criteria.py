"""What settings are chosen by. The command line imports this file at its start, so it needs nothing else."""

LOSS = "loss"  # it grows as a model forgets; all other metrics shrink
METRICS = (LOSS, "Q_A_Prob", "Q_A_ROUGE", "extraction_strength", "exact_memorization")  # as in ``evaluation``
GENERATED_METRICS = ("Q_A_ROUGE",)  # of answers that the model generates
SELECTIONS = ("best-forget", "closest")
