"""By what a run that goes on knows that the weights it reads are those that it began with."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.safetensors_file import SafetensorsFile
from perta_fast.errors import PertaError, RunError
from perta_fast.files.hashing import hash_file

WEIGHTS = ".safetensors"
Fingerprint = dict[str, Any]
PUT_BACK = "put the old file back, with its time of change (cp -p keeps it)"


def fingerprint(checkpoint: Checkpoint) -> dict[str, Fingerprint]:
    """Size, time of change and hash of the header of every shard, by name, as they were when it was opened."""
    return {name: _of_shard(shard) for name, shard in checkpoint.shards.items()}


def _of_shard(shard: SafetensorsFile) -> Fingerprint:
    return {"bytes": shard.size, "mtime_ns": shard.mtime_ns, "header": blake3(shard.header).hexdigest()}


def fingerprint_files(directory: Path) -> dict[str, Fingerprint]:
    """The same of every file below ``directory``, by its path there; of files without weights, the hash."""
    paths = (Path(folder, name) for folder, _, names in os.walk(directory) for name in names)
    return {str(path.relative_to(directory)): _of_file(path) for path in paths}


def changed_file(directory: Path, before: Mapping[str, Fingerprint]) -> Path | None:
    """A file that is gone, or no longer what ``fingerprint_files`` saw; None if there is none."""
    for name, known in before.items():
        try:
            if _of_file(directory / name) == known:
                continue
        except PertaError:
            pass
        return directory / name
    return None


def _of_file(path: Path) -> Fingerprint:
    if path.suffix == WEIGHTS:
        return _of_shard(SafetensorsFile.open(path))
    return {"hash": hash_file(path)}


def check_as_opened(checkpoints: Iterable[Checkpoint]) -> None:
    """Raise RunError if a shard has changed since it was opened: what was read may be half old and half new."""
    for checkpoint in checkpoints:
        if (path := checkpoint.changed_shard) is not None:
            raise RunError(f"{path}: has changed during the run; run the same command again")
