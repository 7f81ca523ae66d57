"""By what a run that goes on knows that its inputs are what they were when it began: their states."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.companions import CARD, companions
from perta_fast.checkpoints.safetensors_file import SafetensorsFile
from perta_fast.errors import InputError, PertaError, RunError
from perta_fast.files.hashing import hash_file
from perta_fast.files.reading import checked_path, exists

WEIGHTS = ".safetensors"
Fingerprint = dict[str, Any]
PUT_BACK = "put the old file back, with its time of change (cp -p keeps it)"
_SMALL = 1 << 20  # bytes of an input of any kind that is hashed


def fingerprint(checkpoint: Checkpoint) -> dict[str, Fingerprint]:
    """Size, time of change and hash of the header of every shard, by name, as they were when it was opened."""
    return {name: _of_shard(shard) for name, shard in checkpoint.shards.items()}


def _of_shard(shard: SafetensorsFile) -> Fingerprint:
    return {"bytes": shard.size, "mtime_ns": shard.mtime_ns, "header": blake3(shard.header).hexdigest()}


def shard_states(checkpoint: Checkpoint) -> dict[str, Fingerprint]:
    """``fingerprint`` by path."""
    return {str(checkpoint.path / name): state for name, state in fingerprint(checkpoint).items()}


def input_files(checkpoint: Checkpoint) -> dict[str, Fingerprint]:
    """The states of all that a model is loaded from, by path: shards, index, and the ``companions`` but the card."""
    beside = [path for name, path in companions(checkpoint.path).items() if name != CARD]
    beside += [] if checkpoint.index is None else [checkpoint.index]
    return shard_states(checkpoint) | {str(path): state_of_file(path) for path in beside}


def state_of_file(path: Path, largest: int | None = None) -> Fingerprint:
    """The state of a shard as ``fingerprint`` has it, of another file its hash.

    largest: if it has more bytes, size and time of change stand for the hash.
    """
    if path.suffix == WEIGHTS:
        with suppress(InputError):  # none of ours, or damaged
            return _of_shard(SafetensorsFile.open(path))
    if largest is not None and (status := path.stat()).st_size > largest:
        return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    return {"hash": hash_file(path)}


def state_of_input(path: Path, folders: Sequence[str] = ()) -> dict[str, Any] | None:
    """The state of any input, in which only small files are hashed; None if it is not there.

    Of a directory, by the name of each file in it, and in those of its ``folders`` that it has.
    """
    if path.is_dir():
        inside = [folder for folder in (path, *(path / name for name in folders)) if folder.is_dir()]
        files = [file for folder in inside for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
        return {str(file.relative_to(path)): state_of_file(file, _SMALL) for file in files if file.is_file()}
    return state_of_file(path, _SMALL) if exists(path) else None


def states_below(directory: Path) -> dict[str, Fingerprint]:
    """The state of every file below ``directory``, by its path there."""
    paths = (Path(folder, name) for folder, _, names in os.walk(directory) for name in names)
    return {str(path.relative_to(directory)): state_of_file(path) for path in paths}


def changed_file(directory: Path, before: Mapping[str, Fingerprint]) -> Path | None:
    """A file that is gone, or no longer what ``states_below`` saw; None if there is none."""
    for name, known in before.items():
        try:
            if state_of_file(checked_path(directory / name)) == known:
                continue
        except PertaError:
            pass
        return directory / name
    return None


def check_inputs(before: Mapping[str, Any], now: Mapping[str, Any], run: str) -> None:
    """Raise InputError, naming it, if an input is not what it was. run: what began then, such as "sweep"."""
    for path in sorted(before.keys() | now.keys()):
        if before.get(path) != now.get(path):
            raise InputError(
                f"{path}: has changed since the {run} began; {PUT_BACK} to go on with it, or start over with "
                "‹overwrite›"
            )


def check_as_opened(checkpoints: Iterable[Checkpoint]) -> None:
    """Raise RunError if a shard has changed since it was opened: what was read may be half old and half new."""
    for checkpoint in checkpoints:
        if (path := checkpoint.changed_shard) is not None:
            raise changed_meanwhile(path)


def changed_meanwhile(path: Path) -> RunError:
    """Of an input that is no longer what was opened, where nothing is kept that was made of it."""
    return RunError(f"{path}: has changed during the run; run the same command again")
