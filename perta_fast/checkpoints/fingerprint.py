"""By what a run that goes on knows that the weights it reads are those that it began with."""

from collections.abc import Iterable
from typing import Any

from blake3 import blake3

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.errors import RunError

Fingerprint = dict[str, Any]
PUT_BACK = "put the old file back, with its time of change (cp -p keeps it)"


def fingerprint(checkpoint: Checkpoint) -> dict[str, Fingerprint]:
    """Size, time of change and hash of the header of every shard, by name, as they were when it was opened."""
    return {
        name: {"bytes": shard.size, "mtime_ns": shard.mtime_ns, "header": blake3(shard.header).hexdigest()}
        for name, shard in checkpoint.shards.items()
    }


def check_as_opened(checkpoints: Iterable[Checkpoint]) -> None:
    """Raise RunError if a shard has changed since it was opened: what was read may be half old and half new."""
    for checkpoint in checkpoints:
        if (path := checkpoint.changed_shard) is not None:
            raise RunError(f"{path}: has changed during the run; run the same command again")
