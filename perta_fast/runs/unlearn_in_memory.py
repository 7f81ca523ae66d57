"""``unlearn`` in two steps: both importances to disk, then the subtraction."""

import time
from contextlib import ExitStack

from perta_fast.files.new_directory import OutputDirectory
from perta_fast.records.report import Report
from perta_fast.runs.apply import apply_sources
from perta_fast.runs.estimate import estimate_on
from perta_fast.runs.unlearn_inputs import Loaded, Opened
from perta_fast.subtraction.in_place import is_open
from perta_fast.subtraction.inputs import Sources, open_importances
from perta_fast.subtraction.unfinished import has_begun


def unlearn_in_memory(loaded: Loaded) -> Report:
    """Estimate the importances with the model in memory, or streamed if the run is in place; then subtract."""
    opened = loaded.opened
    options, ranks = opened.options, opened.ranks
    kept = options.save_importance is not None
    with ExitStack() as entered:
        with ranks.together("the directory of the importances"):
            importances = _importance_directory(opened)
            if ranks.first:
                entered.enter_context(importances)
        for role, samples in loaded.samples.items():
            started = time.perf_counter()
            name = f"{role} importance"
            estimate_on(loaded.how, samples, loaded.hashes[role], out=importances.path / role, description=name)
            loaded.phases[name] = time.perf_counter() - started
        loaded.release()
        with ranks.together("the importances"):
            if kept and ranks.first:
                importances.commit()
        directory = importances.final if kept else importances.path
        with ranks.together("the importances"):
            estimated = open_importances(opened.rule, directory / "forget", directory / "retain")
            sources = Sources.open(options.model, options.base, options.tuned, estimated)
        try:
            return apply_sources(
                sources, opened.rule, opened.settings, annotate=loaded.annotate, temporary=not kept, ranks=ranks
            )
        except BaseException:
            place = opened.settings.place
            importances.keep = has_begun(place) or is_open(place)
            raise


def _importance_directory(opened: Opened) -> OutputDirectory:
    """Where the importances go: where they are kept, or beside the result, to be removed after the run."""
    kept, place = opened.options.save_importance, opened.settings.place
    if kept is not None:
        return OutputDirectory(kept, overwrite=opened.options.overwrite)
    return OutputDirectory(place.with_name(f".{place.name}.perta-importance"))
