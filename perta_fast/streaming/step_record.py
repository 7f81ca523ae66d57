"""How far a run has come, in one record for each rank, of which no two differ by more than one step.

No rank records a step before all have run it, or goes on before all have recorded it. So the run resumes from the last
step that all have recorded: a rank that was one step ahead goes back to the step before, which its record holds too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError
from perta_fast.files.durable import read_record, remove, write_record


def rank_path(folder: Path, name: str, rank: int) -> Path:
    """A rank's file or directory of an unfinished run; ``name`` itself for rank 0, and so for one process."""
    return folder / (f"{rank}-{name}" if rank else name)


def record_step(path: Path, state: Any, before: Any, ranks: Ranks) -> None:
    """Write, durably, what a step has come to. state: with ``done``, a number of steps. before: that of the last."""
    kept = {} if before is None or ranks.world == 1 else {"before": before}
    write_record(path, {**state, **kept})


def resume_step(path: Path, is_valid: Callable[[Any], bool], ranks: Ranks) -> Any:
    """The state that this rank goes on from; None: from the beginning.

    is_valid: of a state as it was read. Raises InputError if a record is damaged, or the ranks' records are not of one
    run.
    """
    with ranks.together("resume the walk"):
        state = read_record(path) if path.exists() else None
        if state is not None and not all(map(is_valid, (state, state.get("before", state)))):
            raise InputError(f"{path}: is not the record of a walk")
    done = min(ranks.gather(0 if state is None else state["done"]))
    with ranks.together("resume the walk"):
        if state is not None and state["done"] != done:
            state = _step_back(path, state, done)
    if state is not None:
        state.pop("before", None)  # no rank goes back to it any more
    return state


def _step_back(path: Path, state: Any, done: int) -> Any:
    """Put the record of the step before ``state`` in its place on disk, and return it."""
    if done == 0 and state["done"] == 1:
        remove(path)
        return None
    before = state.get("before")
    if before is None or before["done"] != done:
        raise InputError(f"{path}: does not go with the records of the other processes; start over with ‹overwrite›")
    write_record(path, before)
    return before
