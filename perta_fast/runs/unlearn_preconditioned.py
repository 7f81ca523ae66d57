"""``unlearn`` by rule ``preconditioned``: a θ_f that hardly touches what is retained to disk, then the subtraction."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from pathlib import Path

from perta_fast.data.chat import ChatSettings, told_date
from perta_fast.data.rows import Row
from perta_fast.errors import InputError
from perta_fast.files.identity import lies_in
from perta_fast.files.new_directory import (
    OutputDirectory,
    check_output,
    check_unfinished,
    importance_path,
    unfinished_advice,
)
from perta_fast.files.reading import checked_path
from perta_fast.preconditioning.input_moments import PHASE
from perta_fast.preconditioning.record import Preconditioning
from perta_fast.records.recipe_of_run import as_recipe
from perta_fast.records.report import Report, truncation_warnings
from perta_fast.runs import strength
from perta_fast.runs.apply import apply_sources
from perta_fast.runs.check import Checking
from perta_fast.runs.making_tuned import Making
from perta_fast.runs.precondition import check_scope, check_tuned, given_files, vector_size
from perta_fast.runs.settings import threads_for
from perta_fast.runs.unlearn_inputs import Opened, data_records, encoded_rows
from perta_fast.subtraction.changed_inputs import check_sources_as_opened
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.journal_directory import is_open
from perta_fast.subtraction.scope import EVERYTHING
from perta_fast.subtraction.unfinished import has_begun


def unlearn_preconditioned(
    opened: Opened, rows: Mapping[str, list[Row]], hashes: Mapping[str, str], day: date
) -> Report:
    """Precondition on the first rank, search for lam if none was given, subtract on all ranks. day: today."""
    asked, ranks, final = opened.options, opened.ranks, opened.settings.destination
    with ranks.together("the opening of the inputs"):
        _check(opened)
        search = strength.StrengthSearch.begin(opened, rows, day)
    checking = Checking.of(asked, rows, day, ranks)
    kept, threads = asked.save_tuned is not None, threads_for(asked.threads, ranks)
    with ExitStack() as entered:
        with ranks.together("the directory of theta_f"):
            beside = importance_path(final)  # removed after the run
            target = OutputDirectory(asked.save_tuned or beside, overwrite=kept and asked.overwrite)
            if ranks.first:
                entered.enter_context(target)
        directory = target.path if kept else target.path / "tuned"
        record: Preconditioning | None = None
        with ranks.together(PHASE):
            if ranks.first:
                directory.mkdir(exist_ok=True)
                record = _make(opened, rows["retain"], hashes["retain"], day, directory, threads)
        made: Preconditioning = ranks.share(record)
        given = opened.sources
        opened = _with_tuned(opened, directory, given)
        if search is not None:
            search = search.on(opened)
            opened = opened.at(search.find(None).after.lam)
        if checking is not None:
            checking.before()
        with ranks.together("the files of theta_f"):
            files = given_files(given, opened.settings.threads or 1, asked.progress) if ranks.first else {}
        described = replace(made.in_report(), files=files)
        if kept:  # only now, so that a run that is stopped earlier leaves nothing
            with ranks.together("the directory of theta_f"):
                if ranks.first:
                    target.commit()
            opened = _with_tuned(opened, target.final, given)

        def annotate(report: Report) -> None:
            report.add_phase(PHASE, made.seconds, 0)
            encoded = encoded_rows(search, checking)
            date = made.settings["date"] or told_date(encoded.told.values())
            as_given = {"tuned": asked.tuned, "date_string": asked.date_string or date}
            report.recipe = as_recipe(vars(opened.options) | as_given)
            report.preconditioned = described
            report.settings = {"at": asked.at, "date_string": asked.date_string, **made.settings, "date": date}
            report.data = data_records(asked, rows, hashes, encoded) | {"retain": made.retain}
            for warning in dict.fromkeys(truncation_warnings(report.data) + made.warnings):
                report.warn(warning)
            strength.annotate(report, search)
            if checking is not None:
                checking.annotate(report)

        try:
            report = apply_sources(
                opened.sources, opened.rule, opened.settings, annotate=annotate, temporary=not kept, ranks=ranks
            )
        except BaseException:
            target.keep = has_begun(final) or is_open(final)
            raise
    return report if checking is None else checking.finish(report)


def _check(opened: Opened) -> None:
    """Raise InputError for what only this rule needs, RunError if a disk is too small."""
    options, final = opened.options, opened.settings.destination
    if not options.in_place and not options.overwrite and has_begun(final):
        raise InputError(unfinished_advice(final))
    if options.save_tuned is None:
        place = importance_path(final)
    else:
        place = checked_path(options.save_tuned)
        _check_apart(place, opened)
        check_output(place, overwrite=options.overwrite, inputs=[*options.paths, final])
        check_unfinished(place, overwrite=options.overwrite)
        if not options.in_place:
            check_output(final, overwrite=options.overwrite, inputs=[place])
    check_tuned(Path(options.base), Path(options.tuned))
    opened.check_disk({place: vector_size(Path(options.base), Path(options.tuned))})


def _check_apart(place: Path, opened: Opened) -> None:
    """Raise InputError if ``save_tuned`` lies in an input, or one of it and the result in the other."""
    options, final = opened.options, opened.settings.destination
    for path in map(Path, (options.model, options.base, options.tuned)):
        if lies_in(place, path):
            raise InputError(f"‹save_tuned› is {place}, which is or lies in the input {path}; choose another directory")
    if lies_in(place, final) or lies_in(final, place):
        raise InputError(
            f"‹save_tuned› is {place}, and the result {final}; choose two directories, neither in the other"
        )


def _with_tuned(opened: Opened, directory: Path, given: Sources) -> Opened:
    """With another θ_f, which was made of ``given``. Every rank calls it.

    Raises InputError if the run would change nothing of it, RunError if what was given has changed meanwhile.
    """
    options = opened.options
    with opened.ranks.together("theta_f"):
        three = options.model, options.base, directory
        try:
            sources = Sources.open(*three, common_rows=options.common_rows, scope=options.scope)
        finally:  # so that what is open now is what θ_f was made of, and an error that a change explains is explained
            check_sources_as_opened(given)
        _check_scope(opened, sources)
    return replace(opened, options=replace(options, tuned=directory), sources=sources)


def _check_scope(opened: Opened, sources: Sources) -> None:
    """Raise InputError if the run would change nothing of the linear maps."""
    if opened.options.scope != EVERYTHING and not opened.settings.allow_zero:
        check_scope(sources)


def _make(opened: Opened, rows: list[Row], digest: str, day: date, directory: Path, threads: int) -> Preconditioning:
    """Write the preconditioned θ_f into ``directory``."""
    options = opened.options
    assert options.mu is not None
    making = Making(
        base=Path(options.base),
        tuned=Path(options.tuned),
        seen_at=Path(options.model if options.at == "model" else options.base),
        retain=options.data["retain"],
        batch_size=options.batch_size,
        max_length=None if options.max_length is None else int(options.max_length),
        chat=ChatSettings.of(options.system_prompt, options.date_string, day),
        device=options.device,
        dtype=options.dtype,
        progress=options.progress,
        stream=options.stream,
        allow_zero=options.allow_zero,
        memory=options.memory,
        device_memory=options.device_memory,
        subtract=not options.in_place,  # which needs no room for a second copy
        threads=threads,
    )
    (record,) = making.run(rows, digest, {float(options.mu): directory}).values()
    return record
