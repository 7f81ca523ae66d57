"""What a run does with a model that does not fit in memory: one decoder layer at a time."""
