"""Benchmarks of perta_fast: limits, references, peers and ours, measured in one run."""
