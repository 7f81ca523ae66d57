"""Where a result goes and how the work is done."""

import os
from dataclasses import dataclass
from pathlib import Path

from perta_fast import compiled
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.companions import other_weights
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError, names_shown
from perta_fast.files.reading import checked_path
from perta_fast.progress import Progress
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.task_vector import check_task_vector


@dataclass(frozen=True)
class Settings:
    """Where the result goes and how the work is done; see ``apply``. started: when the run began, as ``now`` has it."""

    destination: Path
    started: str
    in_place: bool = False
    overwrite: bool = False
    link_unchanged: bool = False
    drop_cache: bool | None = None
    threads: int | None = None
    allow_zero: bool = False
    leave_others: bool = False
    progress: Progress = True


def check_one_result(out: str | Path | None, in_place: bool, leave_others: bool = False) -> None:
    """Raise InputError unless exactly one result is named, and others are left in a model that is changed in place."""
    if in_place == (out is not None):
        raise InputError("give either ‹out›, a directory to make, or ‹in_place›")
    if leave_others and not in_place:
        raise InputError("‹leave_others› is for a change in place; leave it out, or give ‹in_place› instead of ‹out›")


def destination(model: str | Path, out: str | Path | None, in_place: bool, ranks: Ranks = Ranks.ALONE) -> Path:
    """The directory that a run makes or changes, with links resolved.

    Raises InputError unless exactly one is named, and if many processes would change one in place.
    """
    check_one_result(out, in_place)
    if in_place and ranks.world > 1:
        raise InputError("a model is changed in place by one process alone; give ‹out›, a directory to make")
    return Path(os.path.realpath(checked_path(model if out is None else out)))


def threads_for(asked: int | None, ranks: Ranks) -> int:
    """The number of threads asked for, or this process's share of the machine's; every rank calls it."""
    return asked or max(1, compiled.kernels().available_threads() // ranks.on_this_machine())


def check_changes(sources: Sources, allow_zero: bool) -> None:
    """Raise InputError, with the cause, if the run would change nothing and this was not allowed."""
    if not allow_zero:
        check_task_vector(sources, ", or pass ‹allow_zero› for a copy of the model")


def check_others(model: Checkpoint, in_place: bool, leave_others: bool) -> None:
    """Raise InputError if a run in place would leave other weights beside the shards and this was not allowed."""
    others = other_weights(model) if in_place and not leave_others else []
    if others:
        raise InputError(
            f"{model.path}: beside its shards lie other weights, which keep what is to be forgotten: "
            f"{names_shown(others)}; move them away, write to a new directory with ‹out›, or pass ‹leave_others› to "
            "leave them as they are"
        )


def check_threads(threads: int | None) -> None:
    """Raise InputError unless ``threads`` is None or at least 1."""
    if threads is not None and threads < 1:
        raise InputError(f"‹threads› is {threads}; it must be at least 1")
