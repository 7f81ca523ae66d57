"""Signs of an unfinished run beside its output."""

from pathlib import Path

from perta_fast.files.journal import JOB
from perta_fast.files.new_directory import RUN_STATE, has_record, partial_path
from perta_fast.subtraction.job import Job
from perta_fast.subtraction.parts import begun_shards

STATE = RUN_STATE
WALK = "walk.json"  # in the state of a streamed run: how far it has come


def has_begun(final: Path) -> bool:
    """Whether an unfinished run to ``final`` has work that can be resumed."""
    state = partial_path(final) / STATE
    return (state / JOB).exists() and ((state / WALK).exists() or bool(begun_shards(state)))


def begun_job(final: Path) -> Job:
    """The unfinished run to ``final``."""
    return Job.load(partial_path(final) / STATE / JOB)


def may_replace(final: Path, overwrite: bool) -> bool:
    """``overwrite``, or what the unfinished run to ``final`` was told when it began."""
    return overwrite or (has_record(final, STATE) and has_begun(final) and begun_job(final).overwrite)
