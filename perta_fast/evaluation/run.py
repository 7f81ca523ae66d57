"""An evaluation that is checked, done: with its parts kept, and written."""

import os
from collections.abc import Callable
from datetime import date
from pathlib import Path

from perta_fast.data.chat import parse_date, today
from perta_fast.data.given import same_call
from perta_fast.errors import Interrupted, RunError, is_out_of_memory
from perta_fast.evaluation.begun import Begun
from perta_fast.evaluation.checks import Checked
from perta_fast.evaluation.open_unlearning_files import write_open_unlearning_files
from perta_fast.evaluation.results import Evaluation
from perta_fast.files.kept_parts import KeptParts
from perta_fast.records.versions import now

# Given what is kept, when the evaluation was started, and the day for chat templates that ask for the date.
Measure = Callable[[KeptParts | None, str, date], Evaluation]


def run(checked: Checked, measure: Measure, *, repeatable: bool, overwrite: bool) -> Evaluation:
    """Measure, and write the result, if there is a place for it.

    repeatable: whether the same call would measure the same; then finished parts are kept. overwrite: replace a
    result, and give up what is kept of an earlier evaluation; without it that goes on.
    """
    request = checked.request
    out = None if request.out is None else Path(request.out)
    if out is None or not repeatable or out.is_symlink():  # a link is replaced itself
        result = measure(None, now(), today())
        write_open_unlearning_files(request, result)
        if out is not None:
            result.save(out, overwrite=overwrite)
        return result
    return _run_kept(checked, Path(os.path.realpath(out)), measure, overwrite=overwrite)


def _run_kept(checked: Checked, final: Path, measure: Measure, *, overwrite: bool) -> Evaluation:
    """Keep each part that is finished beside ``final``, and go on with those that are there, unless ``overwrite``."""
    begun = Begun.now(checked.request, checked.table, now(), overwrite)
    earlier = None if overwrite else Begun.load(final)
    if earlier is not None:
        earlier.check_same(final, begun)
        begun = earlier
    day = parse_date(begun.day)
    again = same_call(begun.overwrite) if checked.request.is_of_given_rows else None
    with KeptParts(final, begun.record(), resume=earlier is not None, again=again) as kept:
        try:
            result = measure(kept, begun.started, day)
        except KeyboardInterrupt:
            if not kept.any:
                raise
            raise Interrupted(f"interrupted; {kept.going_on()}") from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or not kept.any:
                raise
            raise RunError(f"out of memory; {kept.going_on()}") from error
        write_open_unlearning_files(checked.request, result)
        kept.finish(result.as_json())
    return result
