"""``unlearn`` in two steps: both importances to disk, then the subtraction."""

import time
from contextlib import ExitStack

from perta_fast.files.new_directory import OutputDirectory, importance_path
from perta_fast.records.report import Report
from perta_fast.runs.apply import apply_sources
from perta_fast.runs.estimate import estimate_on
from perta_fast.runs.unlearn_inputs import Loaded
from perta_fast.subtraction.in_place import is_open
from perta_fast.subtraction.inputs import Sources, open_importances
from perta_fast.subtraction.unfinished import has_begun


def unlearn_in_memory(loaded: Loaded) -> Report:
    """Estimate the importances with the model in memory, or streamed if the run is in place; then subtract."""
    opened = loaded.opened
    options, ranks, final = opened.options, opened.ranks, opened.settings.destination
    kept = options.save_importance is not None
    with ExitStack() as entered:
        with ranks.together("the directory of the importances"):
            beside = importance_path(final)  # removed after the run
            importances = OutputDirectory(options.save_importance or beside, overwrite=kept and options.overwrite)
            if ranks.first:
                entered.enter_context(importances)
        for role, samples in loaded.samples.items():
            started = time.perf_counter()
            name = f"{role} importance"
            how = loaded.how_for(role)
            estimate_on(how, samples, loaded.hashes[role], out=importances.path / role, description=name)
            loaded.phases[name] = time.perf_counter() - started
            del how  # it holds the model
        loaded.release()
        with ranks.together("the importances"):
            if kept and ranks.first:
                importances.commit()
        directory = importances.final if kept else importances.path
        loaded.choose_strength({role: directory / role for role in loaded.samples})
        opened = loaded.opened
        with ranks.together("the importances"):
            estimated = open_importances(opened.rule, directory / "forget", directory / "retain")
            three = options.model, options.base, options.tuned
            sources = Sources.open(*three, estimated, options.common_rows, options.scope)
        try:
            return apply_sources(
                sources, opened.rule, opened.settings, annotate=loaded.annotate, temporary=not kept, ranks=ranks
            )
        except BaseException:
            importances.keep = has_begun(final) or is_open(final)
            raise
