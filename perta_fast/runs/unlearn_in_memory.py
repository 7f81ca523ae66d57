"""``unlearn`` in two steps: both importances to disk, estimated or taken from a whole one; then the subtraction."""

import time
from contextlib import ExitStack
from pathlib import Path

from perta_fast.data.samples import row_count
from perta_fast.files.new_directory import OutputDirectory, importance_path
from perta_fast.records.removal import Removal
from perta_fast.records.report import Report
from perta_fast.runs.apply import apply_sources
from perta_fast.runs.estimate import estimate_on
from perta_fast.runs.settings import threads_for
from perta_fast.runs.unlearn_inputs import Loaded
from perta_fast.runs.whole_importance import PHASE, WholeImportance
from perta_fast.subtraction.in_place import is_open
from perta_fast.subtraction.inputs import Sources, open_importances
from perta_fast.subtraction.unfinished import has_begun


def unlearn_in_memory(loaded: Loaded) -> Report:
    """Estimate the importances, with the model in memory or streamed, and then subtract.

    From a whole importance, only the forget importance is estimated, and the retain importance is what remains of it.
    """
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
        if opened.whole is not None:
            _take_from_whole(loaded, opened.whole, importances.path)
        with ranks.together("the importances"):
            if kept and ranks.first:
                importances.commit()
        directory = importances.final if kept else importances.path
        loaded.choose_strength({role: directory / role for role in ("forget", "retain")})
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


def _take_from_whole(loaded: Loaded, whole: WholeImportance, directory: Path) -> None:
    """Write the retain importance: the first rank does. directory: of both importances."""
    opened = loaded.opened
    ranks, threads = opened.ranks, threads_for(opened.settings.threads, opened.ranks)
    started = time.perf_counter()
    removal: Removal | None = None
    with ranks.together(PHASE):
        if ranks.first:
            progress = opened.options.progress
            whole.remove(directory / "forget", directory / "retain", progress)
            removal = whole.record(row_count(loaded.samples["forget"]), threads, progress)
    loaded.removal = ranks.share(removal)
    loaded.phases[PHASE] = time.perf_counter() - started
