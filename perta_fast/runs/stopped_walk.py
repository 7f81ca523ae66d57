"""A streamed ``unlearn`` by rule ``preconditioned`` that was stopped in its walk, or after it: where it lies."""

import os
from pathlib import Path

from perta_fast.checkpoints.companions import PRECONDITIONING
from perta_fast.files.new_directory import PRECONDITIONING_STATE, check_replaceable, importance_path, partial_path
from perta_fast.files.reading import checked_path
from perta_fast.preconditioning.unfinished import Begun
from perta_fast.records.report import FILE_NAME
from perta_fast.runs.unlearn_options import Options


def vector_place(options: Options, final: Path) -> Path:
    """The directory that θ_f is made in: one that is kept, or one beside the result ``final`` that is not."""
    if options.save_tuned is None:
        return importance_path(final)
    return Path(os.path.realpath(checked_path(options.save_tuned)))


def is_walked(options: Options) -> bool:
    """Whether θ_f is made in a walk that can go on."""
    return options.preconditions and options.stream


def stopped_walk(options: Options, final: Path) -> Begun | None:
    """The stopped walk that a run to ``final`` goes on with, if it is of the same work.

    Raises InputError if its record is damaged, or would replace what no run has written.
    """
    if options.overwrite or not is_walked(options):
        return None
    place = vector_place(options, final)
    begun = Begun.load(partial_path(place) / PRECONDITIONING_STATE)
    if begun is not None and begun.overwrite:
        if not options.in_place:
            check_replaceable(final, [FILE_NAME], f"the run to {final}")
        if options.save_tuned is not None:
            check_replaceable(place, [PRECONDITIONING], f"the run to {final}")
    return begun
