"""Benchmarks of perta_fast. One run measures limits, references, other programs (peers) and this package (ours)."""
