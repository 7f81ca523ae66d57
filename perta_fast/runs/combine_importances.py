"""Importances added up and taken apart: means over rows, so no row is run through a model again."""

from collections.abc import Sequence
from pathlib import Path

from perta_fast.arguments import listed
from perta_fast.errors import InputError
from perta_fast.importance.addable import Addable
from perta_fast.importance.combining import Combination
from perta_fast.importance.store import Importance, directory_of
from perta_fast.progress import Progress


def merge_importances(
    importances: "Sequence[str | Path | Importance]",
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = True,
) -> Importance:
    """Write the importance of the rows of all ``importances`` together: sum of n_k I_k over sum of n_k.

    importances: two or more directories of ``estimate_importance``, or what it returned with ``out``. out: directory to
    make, with float32 tensors; overwrite: replace it if it is not empty. progress: as in ``apply``. All must be of one
    estimator, of the same weights run in the same type, with the same prompts, and no two may have a row in common.

    Computed in float64, chunk by chunk, without torch; about 4 MiB of memory. Raises InputError, naming the two and
    what to do, if they do not fit together, or one does not know its rows, as those of earlier versions; RunError if
    the disk fails. Then, and after Ctrl-C, nothing is left behind.
    """
    given = listed(importances)  # a path alone is one
    if len(given) < 2:
        raise InputError("‹merge› takes two importances or more")
    combination = Combination.sum_of([Addable.open(directory_of(importance)) for importance in given])
    return combination.write(out, overwrite=overwrite, progress=progress, description="merge importances")


def remove_importances(
    whole: "str | Path | Importance",
    parts: "str | Path | Importance | Sequence[str | Path | Importance]",
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = True,
) -> Importance:
    """Write the importance of the rows of ``whole`` that are not in ``parts``: (n I - sum of n_k I_k) / (n - sum n_k).

    Every row of a part must be among those of the whole, as often as the parts have it. A square that rounding has made
    negative becomes 0. The absolute error of an element is about n / (n - n_k) times the rounding of the whole's
    (docs/mathematics.md). Arguments and errors as in ``merge_importances``; also refused are parts that leave nothing,
    and squares that were not in the whole.
    """
    given = listed(parts)
    if not given:
        raise InputError("‹remove› takes one importance or more")
    opened = [Addable.open(directory_of(importance)) for importance in (whole, *given)]
    combination = Combination.rest_of(opened[0], opened[1:])
    return combination.write(out, overwrite=overwrite, progress=progress, description="remove importances")
