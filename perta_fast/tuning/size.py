"""The size of a tuned checkpoint. It needs no torch."""

from perta_fast.checkpoints.checkpoint import Checkpoint


def tuned_size(base: Checkpoint) -> int:
    """Bytes that ``write_tuned`` writes, at most."""
    return sum(max(4 * entry.count, entry.size) for entry in base.tensors.values())
