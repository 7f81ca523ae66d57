"""What a run of ``unlearn`` opens and loads before the first gradient."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.checkpoints.configuration import check_configured
from perta_fast.data.chat import ChatSettings, Told, parse_date, told_date
from perta_fast.data.forms import read_as
from perta_fast.data.rows import Row, read_data
from perta_fast.data.samples import row_count, truncated_count
from perta_fast.distributed.ranks import Ranks
from perta_fast.dtypes import torch_name
from perta_fast.files.apart import check_inputs_stay
from perta_fast.files.disk_space import FREE_MARGIN, check_space
from perta_fast.files.journal import JOURNAL
from perta_fast.files.new_directory import check_output, check_unfinished, importance_path, leftovers, scratch_path
from perta_fast.files.own import check_own
from perta_fast.files.reading import checked_path
from perta_fast.importance.kept_form import KeptForm
from perta_fast.preconditioning.unfinished import Begun
from perta_fast.records.recipe_of_run import as_recipe
from perta_fast.records.removal import Removal
from perta_fast.records.report import DataRecord, EstimationSettings, Report, data_record, truncation_warnings
from perta_fast.records.typed_json import fits
from perta_fast.rules import Rule
from perta_fast.runs import strength
from perta_fast.runs.check import Checking
from perta_fast.runs.encoded_rows import EncodedRows
from perta_fast.runs.settings import Settings, check_changes, check_others, destination
from perta_fast.runs.stopped_walk import is_walked, stopped_walk, vector_place
from perta_fast.runs.unlearn_options import Options
from perta_fast.runs.whole_importance import WholeImportance
from perta_fast.subtraction.in_place import check_in_place
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.unfinished import STATE, may_replace

if TYPE_CHECKING:
    from perta_fast.data.samples import Sample
    from perta_fast.runs.estimate import Estimation
    from perta_fast.streaming.schedule import Schedule


# Why a tensor is copied that has an importance all the same; None: it is not.
_COVERED = (None, "left alone by choice", "task vector is zero")


@dataclass(frozen=True)
class Opened:
    """Checked options, and the opened checkpoints that they name.

    rule: at lam 0 until it is chosen. begun: the stopped walk where θ_f is made; the run goes on with it or is refused.
    """

    options: Options
    rule: Rule
    settings: Settings
    sources: Sources
    ranks: Ranks
    whole: WholeImportance | None = None
    begun: Begun | None = None

    @classmethod
    def open(cls, options: Options, ranks: Ranks, started: str) -> "Opened":
        """options: checked. started: when the run began. Raises InputError if anything is wrong with checkpoints."""
        rule = options.subtracting_rule()
        final = destination(options.model, options.out, options.in_place, ranks)
        three = options.model, options.base, options.tuned
        sources = Sources.open(*three, common_rows=options.common_rows, scope=options.scope)
        check_others(sources.model, options.in_place, options.leave_others)
        for path in options.loaded(rule):
            check_configured(path)
        walk = vector_place(options, final) if is_walked(options) else None
        begun = stopped_walk(options, final)
        if options.in_place:
            check_in_place(sources, walk=walk)
            check_inputs_stay(final, [final / JOURNAL], options.paths)
        else:
            replaces = may_replace(final, options.overwrite) or (begun is not None and begun.overwrite)
            check_output(final, overwrite=replaces, inputs=options.paths)
            # ``unlearn`` looks at runs itself
            check_unfinished(final, overwrite=options.overwrite, again=STATE, walk=walk)
        if (rule.estimator is not None or options.preconditions) and options.makes_temporary:
            check_own(importance_path(final))
            check_own(scratch_path(final))
            check_inputs_stay(final, (importance_path(final), scratch_path(final)), options.paths)
        names = (
            "in_place",
            "overwrite",
            "link_unchanged",
            "drop_cache",
            "threads",
            "allow_zero",
            "leave_others",
            "progress",
        )
        settings = Settings(final, started, **{name: getattr(options, name) for name in names})
        whole = WholeImportance.open(options, rule)
        options = options if whole is None else whole.prompts_for(options)
        return cls(options, rule, settings, sources, ranks, whole, begun)

    def read_data(self) -> tuple[dict[str, list[Row]], dict[str, str]]:
        """Rows and hashes of the data, by role. Raises InputError, too, if the run would change nothing."""
        contents = _read_all(self.options)
        check_changes(self.sources, self.options.allow_zero)  # reads weights: after the data, which needs no NumPy
        return contents

    def check_disk(self, beside: Mapping[Path, int]) -> None:
        """Raise RunError unless the disks have room for the result, and for so many bytes in directories beside it."""
        needed, final = dict(beside), self.settings.destination
        if not self.options.in_place:
            needed[final] = self.sources.model.size + FREE_MARGIN
        check_space(needed, [path for directory in needed for path in leftovers(directory)])

    @property
    def importance_sizes(self) -> dict[Path, int]:
        """Bytes of the importances that are written before the subtraction, by the directory that they lie in."""
        options, matches = self.options, self.sources.matches
        covered = sum(match.theta.count for match in matches if match.copied in _COVERED)
        sizes = {}
        if options.makes_temporary:
            sizes[importance_path(self.settings.destination)] = KeptForm().width * covered
        if options.save_importance is not None:
            sizes[checked_path(options.save_importance)] = options.kept_form.width * covered
        return sizes

    def at(self, lam: float) -> "Opened":
        """With a strength that was searched for, as if it had been given."""
        return replace(
            self, options=replace(self.options, lam=lam, max_retain_rise=None), rule=self.rule.at(float(lam))
        )


@dataclass
class Loaded:
    """Opened inputs with the loaded model, and the data in tokens.

    hashes: of the data files. told: to the chat template. max_length: the resolved limit. device, dtype: of the
    gradients. phases: seconds so far. read_as: of the data, by role, see ``Row``. search: for lam, if none was given.
    checking: the check, if there is one. other_rows: those that no gradient is taken on, by role. removal: of the rows
    to forget from the whole importance, if there is one.
    """

    opened: Opened
    how: "Estimation"
    samples: "dict[str, list[Sample]]"
    hashes: dict[str, str]
    told: dict[str, Told]
    max_length: int | None
    device: str
    dtype: str
    phases: dict[str, float]
    read_as: dict[str, str]
    checking: Checking | None = None
    search: strength.StrengthSearch | None = None
    schedule: "Schedule | None" = None
    other_rows: dict[str, list[Row]] = field(default_factory=dict)
    removal: Removal | None = None

    @classmethod
    def load(cls, opened: Opened, rows: dict[str, list[Row]], hashes: dict[str, str], day: date) -> "Loaded":
        """Load the model that the gradients are taken at. day: when the run began."""
        from perta_fast.models.loading import length_limit, load_subject, samples_and_told
        from perta_fast.runs.estimate import Estimation, open_skeleton

        options, estimator = opened.options, opened.rule.estimator
        assert estimator is not None
        started = time.perf_counter()
        path = Path(options.model if options.at == "model" else options.base)
        skeleton = open_skeleton(path, options.device, options.dtype) if options.stream else None
        structure = None if skeleton is None else skeleton.model
        shown = opened.ranks.first and options.progress
        subject = load_subject(path, options.device, options.dtype, structure=structure, progress=shown)
        how = Estimation(
            subject,
            estimator,
            options.batch_size,
            options.progress,
            opened.ranks,
            skeleton,
            options.memory,
            options.device_memory,
        )
        chat = ChatSettings.of(options.system_prompt, options.date_string, day)
        samples, told = {}, {}
        measured = rows if opened.whole is None else {"forget": rows["forget"]}
        for role in measured:
            samples[role], told[role] = samples_and_told(subject, rows[role], options.max_length, chat, shown)
        max_length, dtype = length_limit(subject, options.max_length), torch_name(subject.module.dtype)
        if opened.whole is not None:
            opened.whole.check(rows["forget"], samples["forget"], dtype)
        phases = {"load": time.perf_counter() - started}
        taken = {role: read_as(rows[role]) for role in rows}
        checking = Checking.of(options, rows, day, opened.ranks)
        loaded = cls(opened, how, samples, hashes, told, max_length, str(how.device), dtype, phases, taken, checking)
        loaded.other_rows = {role: rows[role] for role in rows.keys() - measured.keys()}
        return loaded

    def how_for(self, role: str) -> "Estimation":
        """``how``, with what is known of the data of one role."""
        return replace(self.how, read_as=self.read_as[role], told=self.told[role])

    def release(self) -> None:
        """Free the model, once the check has seen it: the subtraction needs its memory for the page cache."""
        if self.checking is not None and self.how.skeleton is None:
            self.checking.look(self.how.subject, self.how.subject.origin)
        del self.how
        if self.checking is not None:
            self.checking.before()

    def choose_strength(self, importances: Path) -> None:
        """Search for lam, if none was given. importances: the directory with both, or with their ratio."""
        if self.search is not None:
            self.opened = self.opened.at(self.search.find(importances).after.lam)

    def annotate(self, report: Report) -> None:
        """Put in the report how, and on what, the importances are estimated."""
        options, encoded = self.opened.options, encoded_rows(self.search, self.checking)
        for name, seconds in self.phases.items():
            report.add_phase(name, seconds, 0)
        date = told_date([*self.told.values(), *encoded.told.values()])
        report.recipe = as_recipe(vars(options) | {"date_string": options.date_string or date})
        counts = {role: (row_count(samples), truncated_count(samples)) for role, samples in self.samples.items()}
        report.data = {
            role: data_record(options.data[role], self.hashes[role], *counts[role], self.read_as[role])
            for role in self.samples
        } | data_records(options, self.other_rows, self.hashes, encoded)
        report.removal = self.removal
        report.settings = EstimationSettings(
            at=str(options.at),
            estimator=str(self.opened.rule.estimator),
            batch_size=options.batch_size,
            max_length=self.max_length,
            dtype=self.dtype,
            device=self.device,
            stream=options.stream,
            schedule=None if self.schedule is None else vars(self.schedule),
            processes=self.opened.ranks.world,
            system_prompt=options.system_prompt,
            date_string=options.date_string,
            date=date,
        )
        strength.annotate(report, self.search)
        for warning in truncation_warnings(report.data):
            report.warn(warning)
        if self.checking is not None:
            self.checking.annotate(report)


def streamed_on(stream: Mapping[str, Any]) -> date | None:
    """The date that the chat template was told in a streamed run of these settings; None if it did not ask."""
    metadata = stream.get("metadata")
    if metadata is None or not fits(metadata, dict[str, dict[str, str]]):
        return None
    return next((parse_date(table["date"]) for table in metadata.values() if "date" in table), None)


def _read_all(options: Options) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Rows and hashes of the data, by role; a file is read once, so it can be a pipe."""
    rows, hashes = {}, {}
    for role, path in options.data.items():
        rows[role], hashes[role] = read_data(path, options.fields)
    return rows, hashes


def encoded_rows(search: "strength.StrengthSearch | None", checking: Checking | None) -> EncodedRows:
    """Of the search for lam, which tokenises most rows; else of the check."""
    if search is not None:
        return search.encoded
    return EncodedRows() if checking is None or checking.rows is None else checking.rows.encoded


def data_records(
    options: Options, rows: Mapping[str, list[Row]], hashes: Mapping[str, str], encoded: EncodedRows
) -> dict[str, DataRecord]:
    """The records of data that no gradient is taken on, by role."""
    records = {}
    for role, of_role in rows.items():
        total, cut = len(of_role), encoded.cut.get(role, 0)
        records[role] = data_record(options.data[role], hashes[role], total, cut, read_as(of_role))
        if 0 < (count := encoded.count.get(role, 0)) < total:
            records[role]["tokenised"] = count
    return records
