"""The subtraction over files: theta - lam * w * (theta_f - theta_0), chunk by chunk.

It reads every byte of the inputs once and writes every byte of the output once. Torch is not imported.
"""

import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from perta_fast.checkpoints.companions import PRECONDITIONING
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError, names_shown
from perta_fast.files.hub import local_model
from perta_fast.files.new_directory import OutputDirectory, check_output, unfinished_advice
from perta_fast.files.reading import exists
from perta_fast.importance.ratio import ImportanceRatio
from perta_fast.importance.store import Importance, directory_of
from perta_fast.progress import Progress
from perta_fast.records.declared import checked_arguments
from perta_fast.records.report import Report
from perta_fast.records.versions import now, this_version
from perta_fast.rules import DEFAULT_ALPHA, DEFAULT_LAM, DEFAULT_RULE, Rule, RuleName
from perta_fast.runs.settings import (
    Settings,
    check_changes,
    check_one_result,
    check_others,
    check_threads,
    destination,
    threads_for,
)
from perta_fast.subtraction.compute import bytes_moved, chunk_elements
from perta_fast.subtraction.in_place import change_in_place
from perta_fast.subtraction.inputs import ADVICE, Sources, open_importances
from perta_fast.subtraction.job import Job, fingerprints, match_names, reopen
from perta_fast.subtraction.read_beside import companion_records
from perta_fast.subtraction.report_entries import begin_report
from perta_fast.subtraction.scope import Patterns, Scope
from perta_fast.subtraction.to_directory import Fill, run_to_directory, write_directory, write_shards
from perta_fast.subtraction.unfinished import begun_job, has_begun, may_replace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from perta_fast.streaming.streamed_run import StreamedRun


@checked_arguments
def apply(
    model: str | Path,
    base: str | Path,
    tuned: str | Path,
    forget_importance: "str | Path | Importance | None" = None,
    retain_importance: "str | Path | Importance | None" = None,
    *,
    importance: "str | Path | ImportanceRatio | None" = None,
    download: bool = False,
    rule: RuleName = DEFAULT_RULE,
    lam: float = DEFAULT_LAM,
    p: float | None = None,
    alpha: float = DEFAULT_ALPHA,
    threshold: float | None = None,
    only: Patterns = None,
    leave: Patterns = None,
    out: str | Path | None = None,
    in_place: bool = False,
    overwrite: bool = False,
    link_unchanged: bool = False,
    drop_cache: bool | None = None,
    threads: int | None = None,
    common_rows: bool = False,
    allow_zero: bool = False,
    leave_others: bool = False,
    progress: Progress = True,
    group: "ProcessGroup | None" = None,
) -> Report:
    """Write theta_full - lam * w * (theta_f - theta_0), to a new checkpoint or in place (arXiv 2601.22030).

    model, base, tuned: directories with safetensors weights that agree in tensor names and shapes; or names of the
    Hugging Face hub, ORG/NAME, that lie in the local cache. download: fetch these there first.
    forget_importance, retain_importance: what ``estimate_importance`` saved (or returned with ``out``); both needed by
    every rule but ``tv``, which takes none. importance: in place of the two, a directory that ``save_importance`` made,
    which holds both or their ratio; or an ``ImportanceRatio`` that was saved. rule, lam, p, alpha, threshold: see
    ``rules.Rule``.
    only, leave: names of parameters in ``model``, or patterns of them with ``*``, ``?`` and ``[...]``, or the words
    ``embeddings`` and ``norms``; a list, or one text with commas. Only those of ``only`` are changed, or all; those of
    ``leave`` are copied byte for byte. A tied matrix goes by both its names.
    out: directory to make; it appears only when complete, with config, tokenizer, ``perta_report.json`` and a
    section in its model card. in_place: change ``model`` where it lies instead, through a journal beside its
    shards that takes up to 192 MiB. overwrite: replace a non-empty ``out``. link_unchanged: shards without a
    tensor to change are linked, not copied. drop_cache: read and written pages do not stay in the page cache;
    None does so if the run moves more than half of the memory. threads: None takes all processors, or this
    process's part of them. common_rows: rows of a resized vocabulary that not all inputs have stay as ``model`` has
    them. allow_zero: go on even if the task vector is zero, and make a copy. leave_others: change ``model`` in place
    though other weight files lie beside its shards. group: the processes that deal the work among them. Each calls
    this with the same arguments; inputs and ``out`` must lie where all see them. None: this process alone.
    progress: whether bars are drawn, on a terminal or in a notebook; or what is called with each ``Event``.

    Returns the report that was written. Raises InputError for bad input (nothing is written), RunError if the
    run fails, ``errors.Interrupted`` if it is stopped: its text, as a RunError's, says whether ``resume`` can
    finish the run. Memory: 3 to 6 MiB a thread, beside the interpreter.
    """
    started, ranks = now(), Ranks.of(group)
    with ranks.together("the opening of the inputs"):
        chosen, scope = Rule.of(rule, lam, p, alpha, threshold), Scope.of(only, leave)
        check_one_result(out, in_place, leave_others)
        model = local_model(model, download, in_place=in_place)
        base, tuned = local_model(base, download), local_model(tuned, download)
        final = destination(model, out, in_place, ranks)
        given = (forget_importance, retain_importance, importance)
        directories = (None if each is None else directory_of(each) for each in given)
        importances = open_importances(chosen, *directories, advice=_advice(tuned))
        sources = Sources.open(model, base, tuned, importances, common_rows, scope)
    settings = Settings(
        final, started, in_place, overwrite, link_unchanged, drop_cache, threads, allow_zero, leave_others, progress
    )
    return apply_sources(sources, chosen, settings, ranks=ranks)


def _advice(tuned: Path) -> str:
    """Where to get an importance that is missing; a preconditioned θ_f needs none."""
    if exists(tuned / PRECONDITIONING):
        return f"{tuned} is preconditioned: subtract it with ‹rule› tv"
    return ADVICE


def apply_sources(
    sources: Sources,
    rule: Rule,
    settings: Settings,
    *,
    annotate: Callable[[Report], None] | None = None,
    merging: bool = False,
    temporary: bool = False,
    streamed: "StreamedRun | None" = None,
    ranks: Ranks = Ranks.ALONE,
) -> Report:
    """``apply`` on opened inputs.

    annotate: adds to the report before the work begins. merging: the result is the base with its adapter (``merge``).
    temporary: the importances lie at ``scratch_path`` of the result and are removed when the run is done. streamed:
    estimates the importances during the run.
    """
    with ranks.together("the inputs"):
        check_threads(settings.threads)
        check_others(sources.model, settings.in_place, settings.leave_others)
        check_changes(sources, settings.allow_zero)
    threads = threads_for(settings.threads, ranks)
    report = begin_report(sources, rule, threads, settings.started, merging)
    if settings.in_place and report.other_weights:
        report.warn(f"left as they were, with what was to be forgotten: {names_shown(report.other_weights)}")
    if annotate is not None:
        annotate(report)
    moved = sum(bytes_moved(match, match.theta.count) for match in sources.matches)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own = Job(
        final=str(settings.destination),
        in_place=settings.in_place,
        overwrite=settings.overwrite,
        rule=rule,
        threads=threads,
        chunk=chunk_elements(threads),
        drop_cache=moved > memory // 2 if settings.drop_cache is None else settings.drop_cache,
        link_unchanged=settings.link_unchanged,
        directories={role: str(checkpoint.path.resolve()) for role, checkpoint in sources.named().items()},
        files=fingerprints(sources),
        matches=match_names(sources.matches),
        version=this_version(),
        temporary=temporary,
        companions=companion_records(sources, report),
        stream={} if streamed is None else dict(streamed.settings),
    )
    own.report = asdict(report)
    job: Job = ranks.share(own)  # the first rank's
    job.progress = ranks.first and settings.progress
    if settings.in_place:
        return change_in_place(job, sources)
    with ranks.together("the inputs"):
        if job.files != own.files:
            raise InputError("not all processes see the same input files")
        begun = ranks.first and _is_begun(job, sources)
    if ranks.share(begun):
        return resume_directory(settings.destination, settings.progress, ranks)
    if streamed is None:
        return write_directory(job, sources, partial(write_shards, ranks=ranks), ranks)
    return write_directory(job, sources, streamed.fill, ranks, streamed.keep_samples)


def resume_directory(final: Path, progress: Progress, ranks: Ranks = Ranks.ALONE) -> Report:
    """Finish a run to ``final``. Raises InputError if an input is not what it was."""
    with ranks.together("the unfinished run"):
        job = begun_job(final)
        job.progress = ranks.first and progress
        sources = reopen(job)
        fill: Fill = partial(write_shards, ranks=ranks)
        if job.stream:
            from perta_fast.streaming.streamed_run import StreamedRun

            fill = StreamedRun.reopened(job, ranks).fill
        target = OutputDirectory(final, overwrite=job.overwrite, resume=True)
    job.count_resume()
    return run_to_directory(job, sources, target, fill, ranks)


def _is_begun(job: Job, sources: Sources) -> bool:
    """Whether the same run was stopped and can be resumed. Raises InputError if its destination is not free."""
    final = Path(job.final)
    check_output(final, overwrite=may_replace(final, job.overwrite), inputs=sources.paths())
    if job.overwrite or not has_begun(final):
        return False
    if not job.same_work(begun_job(final)):
        raise InputError(unfinished_advice(final))
    return True
