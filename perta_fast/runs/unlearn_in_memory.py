"""``unlearn`` in two steps: both importances to disk, estimated or taken from a whole one; then the subtraction."""

import time
from contextlib import ExitStack
from pathlib import Path

from perta_fast.checkpoints.fingerprint import check_as_opened
from perta_fast.data.samples import row_count
from perta_fast.files.new_directory import OutputDirectory, importance_path
from perta_fast.importance.ratio import SIDES, ImportanceRatio
from perta_fast.records.removal import Removal
from perta_fast.records.report import Report
from perta_fast.runs.apply import apply_sources
from perta_fast.runs.estimate import estimate_on
from perta_fast.runs.settings import threads_for
from perta_fast.runs.unlearn_inputs import Loaded
from perta_fast.runs.whole_importance import PHASE, WholeImportance
from perta_fast.subtraction.inputs import Sources, open_importances
from perta_fast.subtraction.journal_directory import is_open
from perta_fast.subtraction.unfinished import has_begun


def unlearn_in_memory(loaded: Loaded) -> Report:
    """Estimate the importances, with the model in memory or streamed, and then subtract.

    From a whole importance, only the forget importance is estimated, and the retain importance is what remains of it.
    """
    opened = loaded.opened
    options, ranks, final = opened.options, opened.ranks, opened.settings.destination
    kept, as_ratio = options.save_importance is not None, options.kept_form.as_ratio
    with ExitStack() as entered:
        with ranks.together("the directory of the importances"):
            place = importance_path(final) if options.makes_temporary else options.save_importance  # removed, or kept
            assert place is not None
            importances = OutputDirectory(
                place,
                overwrite=not options.makes_temporary and options.overwrite,
                walk=Path(place),  # of a run that is given up, as was checked
            )
            if ranks.first:
                entered.enter_context(importances)
        _estimate(loaded, importances.path)
        loaded.release()
        if opened.whole is not None:
            _take_from_whole(loaded, opened.whole, importances.path)
        with ranks.together("the importances"):
            if kept and not as_ratio and ranks.first:
                importances.commit()
        directory = importances.path if options.makes_temporary else importances.final
        if as_ratio:
            directory = _keep_ratio(loaded, directory)
            entered.close()  # the pair is removed
        loaded.choose_strength(directory)
        opened = loaded.opened
        with ranks.together("the importances"):
            check_as_opened(opened.sources.named().values())  # what the gradients were taken at
            estimated = open_importances(opened.rule, both=directory)
            three = options.model, options.base, options.tuned
            sources = Sources.open(*three, estimated, options.common_rows, options.scope)
        try:
            return apply_sources(
                sources, opened.rule, opened.settings, annotate=loaded.annotate, temporary=not kept, ranks=ranks
            )
        except BaseException:
            importances.keep = not as_ratio and (has_begun(final) or is_open(final))
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


def _estimate(loaded: Loaded, directory: Path) -> None:
    """Write both importances below ``directory``; those of which the ratio is kept are float32."""
    form = loaded.opened.options.kept_form
    for role, samples in loaded.samples.items():
        started = time.perf_counter()
        name = f"{role} importance"
        how = loaded.how_for(role)
        stored = "float32" if form.as_ratio else form.dtype
        estimate_on(how, samples, loaded.hashes[role], out=directory / role, description=name, stored=stored)
        loaded.phases[name] = time.perf_counter() - started
        del how  # it holds the model


def _keep_ratio(loaded: Loaded, pair: Path) -> Path:
    """Keep the ratio of the importances in ``pair``; returns where it lies."""
    options, ranks = loaded.opened.options, loaded.opened.ranks
    assert options.save_importance is not None
    started = time.perf_counter()
    with ranks.together("the ratio of the importances"):
        ratio = ImportanceRatio.of(*(pair / side for side in SIDES), dtype=options.kept_form.dtype)
    ratio.save(options.save_importance, overwrite=options.overwrite, progress=options.progress, group=ranks.group)
    assert ratio.directory is not None
    loaded.phases["ratio"] = time.perf_counter() - started
    return ratio.directory
