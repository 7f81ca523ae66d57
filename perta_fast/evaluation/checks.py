"""An evaluation whose arguments, data and reference are checked: all that is done before a model is loaded."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.configuration import check_configured
from perta_fast.checkpoints.quantised import open_plain
from perta_fast.data.chat import ChatSettings, told
from perta_fast.data.given import NOTHING_GIVEN, Given
from perta_fast.errors import InputError
from perta_fast.evaluation.attacks import offer_attacks
from perta_fast.evaluation.begun import Begun
from perta_fast.evaluation.benchmark_files import DataFile
from perta_fast.evaluation.conventions import Conventions
from perta_fast.evaluation.examinee import Examinee
from perta_fast.evaluation.metric_table import MetricTable
from perta_fast.evaluation.muse import MuseMetrics, read_muse
from perta_fast.evaluation.open_unlearning_files import check_open_unlearning_files
from perta_fast.evaluation.own_data import OwnData
from perta_fast.evaluation.request import ROLES, Request
from perta_fast.evaluation.results import Evaluation, EvaluationFile, Metric, files_read
from perta_fast.evaluation.tofu import TofuMetrics, read_tofu
from perta_fast.files.kept_parts import KeptParts
from perta_fast.files.new_directory import EVALUATION_STATE
from perta_fast.files.new_file import check_output_file
from perta_fast.files.reading import checked_path
from perta_fast.progress import Progress
from perta_fast.records.versions import installed_versions, now

if TYPE_CHECKING:
    from perta_fast.models.loading import Subject

E = TypeVar("E", bound=Examinee)


@dataclass(frozen=True)
class Checked:
    """What is measured, and how. names: of the metrics. notes: of the checks. gold: results to compare with."""

    request: Request
    table: MetricTable
    names: list[str]
    notes: list[str]
    conventions: Conventions
    gold: EvaluationFile | None

    @classmethod
    def of(cls, request: Request, *, overwrite: bool, resume: bool, given: Given = NOTHING_GIVEN) -> "Checked":
        """Read and check everything. resume: go on with a stopped evaluation to the same file. given: rows of Python.

        Raises InputError for bad arguments or data, RunError if the result could not be written.
        """
        request.check()
        _check_walkable(request)
        conventions = Conventions.named(request.compatible)
        replaces = overwrite or (request.out is not None and _goes_on_to_replace(request, Path(request.out)))
        _check_out(request, replaces, EVALUATION_STATE if resume or not overwrite else "")
        check_open_unlearning_files(request, overwrite=replaces or resume)
        gold = None if request.reference is None else EvaluationFile.read(request.reference)
        table = _table(request, gold, given)
        if request.reference_model is not None:
            check_configured(Checkpoint.open(request.reference_model).path)
        offer_attacks(table, request.reference_model, conventions)
        _check_stress(request, table)
        if request.model is not None:
            check_configured(Checkpoint.open(request.model).path)
        names, notes = _chosen(request, table)
        if gold is not None:
            notes += gold.compared_with(conventions.name)
            _check_reference(gold, table, names, request.min_k)
        for name in ("rouge_score", "scipy", "sklearn"):
            if find_spec(name) is None:
                raise InputError(f"{name} is not installed: pip install 'perta-fast[eval]'")
        if request.lm_eval:
            _check_harness(request.lm_eval)
        return cls(request, table, names, notes, conventions, gold)

    def subject_on(self, subject: "Subject", day: date) -> "Subject":
        """With the request's settings for the chat template. day: for templates that ask for the date."""
        chat = ChatSettings.of(self.request.system_prompt, self.request.date_string, day)
        return replace(subject, tokenizer=chat.given_to(subject.tokenizer))

    def examinee(
        self, kind: type[E], subject: "Subject", progress: Progress, kept: KeptParts | None = None, **found: Any
    ) -> E:
        """The model as it is examined. found: what this kind of examinee takes beside."""
        request = self.request
        return kind(
            subject,
            request.batch_size,
            request.max_length,
            progress,
            request.max_new_tokens,
            request.show_text,
            kept,
            request.min_k,
            self.conventions,
            notes=list(self.notes),
            asked_type=request.asked_type,
            **found,
        )

    def result(
        self,
        examinee: Examinee,
        measured: dict[str, Metric],
        started: str,
        general: dict[str, dict[str, Any]] | None = None,
        under_stress: dict[str, Any] | None = None,
    ) -> Evaluation:
        """The record of the evaluation, which ends now."""
        date = told(examinee.subject.tokenizer).date
        return Evaluation(
            measured,
            examinee.subject.origin,
            self.request.settings() | {"date": date, "prompt": examinee.prompt},
            examinee.data,
            general or {},
            installed_versions(),
            [*examinee.notes, *self._differences(date)],
            started,
            now(),
            under_stress or {},
        )

    def _differences(self, date: str | None) -> list[str]:
        """Notes on what the gold model was measured with. date: what the chat template was told, if it asked."""
        if self.gold is None:
            return []
        prompts = {"system_prompt": self.request.system_prompt, "date": date}
        return self.gold.differences(prompts, {role: file.digest for role, file in self.table.files.items()})


def _check_walkable(request: Request) -> None:
    """Raise InputError for a checkpoint that a streamed evaluation cannot walk through."""
    for directory in (request.model, request.reference_model) if request.stream else ():
        if directory is not None:
            open_plain(directory)


def _goes_on_to_replace(request: Request, out: Path) -> bool:
    """Whether this very evaluation was stopped, and was told that it may replace ``out``."""
    begun = Begun.load(Path(os.path.realpath(checked_path(out))))
    return begun is not None and begun.overwrite and begun.request == request


def _check_out(request: Request, overwrite: bool, again: str) -> None:
    """again: the state of an unfinished evaluation that is gone on with."""
    if request.out is None:
        return
    out = Path(request.out)
    inputs = files_read(request.paths(), out)
    check_output_file(out, (".json",), overwrite=overwrite, inputs=inputs, again=again)


def _chosen(request: Request, table: MetricTable) -> tuple[list[str], list[str]]:
    """The names of the metrics to compute, and a note on those that a streamed evaluation leaves out."""
    if not request.stream:
        return table.chosen(request.metrics), []
    names, rest = table.chosen_of_scores(request.metrics)
    return names, [f"not computed, since they need more than token scores: {', '.join(rest)}"] if rest else []


def _check_stress(request: Request, table: MetricTable) -> None:
    """Raise InputError for stresses that data or checkpoints do not allow."""
    if request.against is not None:
        open_plain(request.against)
    if request.stress is None:
        return
    if table.forget_file not in table.files:
        raise InputError(f"‹stress› needs the file {table.forget_file}")
    if request.model is not None:
        open_plain(request.model)


def _table(request: Request, gold: EvaluationFile | None, rows: Given) -> MetricTable:
    """Read and check all data; returns what can be measured on it."""
    if request.suite is None:
        given = {role: path for role in ROLES if (path := getattr(request, role)) is not None}
        return OwnData({role: DataFile.read(path, request.fields, rows) for role, path in given.items()}, gold)
    assert request.data is not None
    if request.suite == "tofu":
        return TofuMetrics(read_tofu(Path(request.data), request.split), gold)
    return MuseMetrics(read_muse(Path(request.data), partly=request.metrics is not None), gold)


def _check_reference(gold: EvaluationFile, table: MetricTable, names: Sequence[str], min_k: float) -> None:
    """Raise InputError unless the gold results have all that the metrics of these names read."""
    if any(name.startswith("forget_quality") for name in names):
        gold.values("forget_truth_ratio", "score", len(table.files["forget"].rows))
    if "privleak" in names:
        gold.value("mia_min_k")
        if gold.min_k not in (None, min_k):
            raise InputError(
                f"{gold.path}: has Min-K of {gold.min_k} of the tokens; evaluate with ‹min_k› {gold.min_k}"
            )


def _check_harness(tasks: Sequence[str]) -> None:
    """Raise InputError if lm-evaluation-harness cannot be imported or lacks a task."""
    try:
        from lm_eval.models.huggingface import HFLM  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"lm-evaluation-harness cannot be imported ({error}): pip install 'perta-fast[lm-eval]'"
        ) from error
    known = TaskManager().all_tasks
    if unknown := [task for task in tasks if task not in known]:
        raise InputError(f"lm-evaluation-harness has no task {', '.join(unknown)}")
