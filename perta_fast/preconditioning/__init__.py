"""θ_f with less of the task vector along the inputs of retained rows (SAGE, arXiv 2606.18309)."""
