"""What a streamed sweep will take, from the headers of its inputs and its data: ``--dry-run``."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.data.chat import today
from perta_fast.files.new_directory import OutputDirectory, has_record
from perta_fast.sweeping.chosen_checkpoint import check_result
from perta_fast.sweeping.keeping import check_kept, check_places
from perta_fast.sweeping.opened import OpenedSweep
from perta_fast.sweeping.request import Request
from perta_fast.sweeping.unfinished import STATE, check_unchanged, load_begun

if TYPE_CHECKING:
    from perta_fast.streaming.forecast.dry_run import Conditions
    from perta_fast.streaming.forecast.forecast import Forecast


def preview_sweep(arguments: Mapping[str, Any], conditions: "Conditions", world: int = 1) -> "Forecast":
    """The costs of each walk: of each missing importance, each θ_f, and all settings.

    arguments: of ``sweep``. conditions: the same, for the importances. world: processes; the costs are those of one.
    Raises InputError for bad input, and if memory or disk are too small. A file is written to measure the disk, and
    removed; nothing else is.
    """
    request = Request.of(arguments)
    request.check_arguments()
    opened = OpenedSweep.open(request.located(arguments["download"]), False, today())
    _check_places(opened, world)
    # Imported late: what is wrong so far was said without waiting for torch.
    from perta_fast.streaming.forecast.forecast import Forecast
    from perta_fast.sweeping.walk_costs import walks

    return Forecast.joined(walks(opened, conditions, world))


def _check_places(opened: OpenedSweep, processes: int) -> None:
    """Raise InputError if the sweep could not write its record or its result; one that goes on has its places."""
    request = opened.request
    final = Path(os.path.realpath(str(request.out)))
    begun = load_begun(final) if has_record(final, STATE) and not request.overwrite else None
    if begun is not None:
        begun.check_request(request, final)
        check_unchanged(begun.inputs, opened.state_of_inputs())
        begun.check_processes(processes, final)
    overwrite = (request if begun is None else begun.request).overwrite
    OutputDirectory(final, overwrite=overwrite, inputs=opened.paths(), resume=begun is not None)
    if begun is None:
        check_places(request, final)
        check_result(opened)
        check_kept(opened)
        opened.check_base()
