"""What settings are chosen by. Apart from all else, as the command line knows it before any command runs."""

LOSS = "loss"  # the metric that grows as a model forgets; every other one shrinks
METRICS = (LOSS, "Q_A_Prob", "Q_A_ROUGE", "extraction_strength", "exact_memorization")  # as in ``evaluation``
SELECTIONS = ("best-forget", "closest")
