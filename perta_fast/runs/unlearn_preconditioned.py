"""``unlearn`` by rule ``preconditioned``: a θ_f that hardly touches what is retained to disk, then the subtraction."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

from perta_fast.data.chat import ChatSettings, parse_date, told_date
from perta_fast.data.rows import Row
from perta_fast.errors import InputError, Interrupted
from perta_fast.files.identity import lies_in
from perta_fast.files.new_directory import (
    OutputDirectory,
    check_output,
    check_unfinished,
    discard_unfinished,
    kept_if_stopped,
    unfinished_advice,
)
from perta_fast.preconditioning.input_moments import PHASE
from perta_fast.preconditioning.record import Preconditioning
from perta_fast.preconditioning.unfinished import LAYERS_KEPT, Begun, Work, check_record, commit_walk, going_on
from perta_fast.records.recipe_of_run import as_recipe
from perta_fast.records.report import Report, truncation_warnings
from perta_fast.runs import strength
from perta_fast.runs.apply import apply_sources
from perta_fast.runs.check import Checking
from perta_fast.runs.making_tuned import Making
from perta_fast.runs.precondition import check_scope, check_tuned, given_files, vector_size
from perta_fast.runs.settings import threads_for
from perta_fast.runs.stopped_walk import is_walked, vector_place
from perta_fast.runs.unlearn_inputs import Opened, data_records, encoded_rows
from perta_fast.runs.unlearn_options import Options
from perta_fast.streaming.kept_walk import KeptWalk
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
    threads = threads_for(asked.threads, ranks)
    with ranks.together("the opening of the inputs"):
        _check(opened)
        begun = opened.begun
        day = day if begun is None else parse_date(begun.day)
        walking = _Walking.of(opened, hashes["retain"], _making(opened, day, threads), begun)
        opened = replace(opened, settings=replace(opened.settings, overwrite=walking.overwrite))
        search = strength.StrengthSearch.begin(opened, rows, day)
    checking = Checking.of(asked, rows, day, ranks)
    kept = asked.save_tuned is not None
    with ranks.together("the directory of theta_f"):
        target = walking.target(final)
    stopped = kept_if_stopped(target, LAYERS_KEPT, walking.going_on, passed_on=Interrupted)
    with stopped, ExitStack() as entered:
        with ranks.together("the directory of theta_f"):
            if ranks.first:
                if asked.overwrite and not asked.in_place:
                    discard_unfinished(final)  # it would need the θ_f that is given up here
                entered.enter_context(target)
                check_record(target, begun)
        directory = target.path if kept else target.path / "tuned"
        record: Preconditioning | None = None
        with ranks.together(PHASE):
            if ranks.first:
                directory.mkdir(exist_ok=True)
                record = walking.make(rows["retain"], directory, target)
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
        if kept:  # only now, so that a run that is stopped earlier leaves nothing, or its walk to go on with
            with ranks.together("the directory of theta_f"):
                if ranks.first:
                    commit_walk(target)
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
        except BaseException as error:
            target.keep = target.keep or has_begun(final) or is_open(final)
            if kept and isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted):
                raise Interrupted(
                    f"interrupted; the preconditioned θ_f is complete, in {target.final}, and nothing was made of it. "
                    "Subtract it with perta apply, rule tv and the strength"
                ) from None
            raise
        target.keep = False
    return report if checking is None else checking.finish(report)


@dataclass(frozen=True)
class _Walking:
    """The making of θ_f: in memory, or in a walk that goes on with what a stopped one has ``begun``."""

    opened: Opened
    making: Making
    digest: str
    begun: Begun | None
    work: Work | None

    @classmethod
    def of(cls, opened: Opened, digest: str, making: Making, begun: Begun | None) -> "_Walking":
        """Raises InputError if ``begun`` is of other work. digest: of the retain data."""
        options, work = opened.options, None
        if is_walked(options):
            work = making.work(_mu(options), digest, options.fields, opened.sources)
            if begun is not None:
                begun.check_work(work, opened.settings.destination)
        return cls(opened, making.going_on(begun), digest, begun, work)

    @property
    def overwrite(self) -> bool:
        """Whether the run was told to replace what is at its place, or the stopped one was that it goes on with."""
        return self.opened.options.overwrite or (self.begun is not None and self.begun.overwrite)

    @property
    def going_on(self) -> str:
        """What goes on with the run once some of the walk is kept."""
        return going_on(self.opened.options.data["retain"], self.overwrite)

    def target(self, final: Path) -> OutputDirectory:
        """The directory that θ_f is made in; it is removed after the run, unless it is kept."""
        options = self.opened.options
        place = vector_place(options, final)
        return OutputDirectory(
            place,
            overwrite=options.save_tuned is not None and self.overwrite,
            resume=self.begun is not None,
            walk=place if options.overwrite else None,  # it is given up
            going_on=self.going_on if is_walked(options) else "",
        )

    def make(self, rows: list[Row], directory: Path, target: OutputDirectory) -> Preconditioning:
        """Write θ_f into ``directory``, and the state of the walk into ``target``."""
        walk = None
        if self.work is not None:
            unchanged = partial(check_sources_as_opened, self.opened.sources)
            walk = KeptWalk.below(target, self.work, self.begun, self.overwrite, unchanged)
        (record,) = self.making.run(rows, self.digest, {_mu(self.opened.options): directory}, walk).values()
        if walk is not None:
            target.keep_on_error()  # a run with another strength, or other parameters to change, needs no walk
        return record


def _mu(options: Options) -> float:
    assert options.mu is not None
    return float(options.mu)


def _check(opened: Opened) -> None:
    """Raise InputError for what only this rule needs, RunError if a disk is too small."""
    options, final = opened.options, opened.settings.destination
    if not options.in_place and not options.overwrite and has_begun(final):
        raise InputError(unfinished_advice(final))
    place = vector_place(options, final)
    if options.save_tuned is not None:
        _check_apart(place, opened)
        replaces = options.overwrite or (opened.begun is not None and opened.begun.overwrite)
        check_output(place, overwrite=replaces, inputs=[*options.paths, final])
        check_unfinished(place, overwrite=options.overwrite, walk=place if is_walked(options) else None)
        if not options.in_place:
            check_output(final, overwrite=replaces, inputs=[place])
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


def _making(opened: Opened, day: date, threads: int) -> Making:
    """How θ_f is made. day: for chat templates that ask for the date."""
    options = opened.options
    return Making(
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
