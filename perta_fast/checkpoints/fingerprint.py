"""By what a run that goes on knows that the weights it reads are those that it began with."""

from typing import Any

from blake3 import blake3

from perta_fast.checkpoints.checkpoint import Checkpoint

Fingerprint = dict[str, Any]
PUT_BACK = "put the old file back, with its time of change (cp -p keeps it)"


def fingerprint(checkpoint: Checkpoint) -> dict[str, Fingerprint]:
    """Size, time of change and hash of the header of every shard, by name, as they were when it was opened."""
    return {
        name: {"bytes": shard.size, "mtime_ns": shard.mtime_ns, "header": blake3(shard.header).hexdigest()}
        for name, shard in checkpoint.shards.items()
    }
