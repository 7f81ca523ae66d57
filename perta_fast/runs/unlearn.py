"""The whole job: importance on forget and retain data, then the subtraction."""

import os
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from perta_fast.data.chat import Told, today, told_date
from perta_fast.data.forms import Fields
from perta_fast.data.given_data import Data
from perta_fast.data.rows import Row
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError
from perta_fast.files.new_directory import check_output, check_unfinished, unfinished_advice
from perta_fast.files.reading import checked_path
from perta_fast.importance.store import Importance, directory_of
from perta_fast.progress import Progress
from perta_fast.records.declared import checked_arguments
from perta_fast.records.recipe_of_run import as_recipe
from perta_fast.records.report import Report, truncation_warnings
from perta_fast.records.versions import now
from perta_fast.rules import DEFAULT_ALPHA, PRECONDITIONED, AnyRule, Place
from perta_fast.runs import strength
from perta_fast.runs.apply import apply_sources
from perta_fast.runs.check import Checking
from perta_fast.runs.unlearn_inputs import Loaded, Opened, data_records, encoded_rows, streamed_on
from perta_fast.runs.unlearn_options import Options
from perta_fast.runs.whole_importance import check_retained
from perta_fast.subtraction.job import Job
from perta_fast.subtraction.scope import Patterns
from perta_fast.subtraction.unfinished import begun_job, has_begun, may_replace

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


@checked_arguments
def unlearn(
    model: str | Path,
    base: str | Path,
    tuned: str | Path,
    forget: Data | None = None,
    retain: Data | None = None,
    *,
    fields: Fields | None = None,
    download: bool = False,
    rule: AnyRule = PRECONDITIONED,
    lam: float | None = None,
    max_retain_rise: float | None = None,
    mu: float | None = None,
    p: float | None = None,
    alpha: float = DEFAULT_ALPHA,
    threshold: float | None = None,
    only: Patterns = None,
    leave: Patterns = None,
    at: Place | None = None,
    out: str | Path | None = None,
    in_place: bool = False,
    overwrite: bool = False,
    link_unchanged: bool = False,
    drop_cache: bool | None = None,
    whole_importance: "str | Path | Importance | None" = None,
    save_importance: str | Path | None = None,
    save_as: Literal["pair", "ratio"] | None = None,
    importance_dtype: Literal["float32", "bfloat16"] | None = None,
    save_tuned: str | Path | None = None,
    check: bool = True,
    stream: bool = False,
    memory: int | None = None,
    device_memory: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    system_prompt: str | None = None,
    date_string: str | None = None,
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
    threads: int | None = None,
    common_rows: bool = False,
    allow_zero: bool = False,
    leave_others: bool = False,
    progress: Progress = True,
    group: "ProcessGroup | None" = None,
) -> Report:
    """Unlearn ``forget`` from a checkpoint, to ``out`` or in place.

    rule: ``preconditioned`` subtracts the task vector of a θ_f that ``precondition`` makes first, with ``mu`` (10);
    ``tv`` the plain one; the others one that is rescaled by importances (PerTA, arXiv 2601.22030). forget, retain: data
    files, or rows as ``estimate_importance`` takes them (documentation, "Data"). The rules with importances need both,
    ``preconditioned`` needs ``retain``; of one that is not needed, the report only names hash and count. Each is read
    once, so a file can be a pipe. Of rows the report has hash and count, and no path.
    fields: names of their fields, as in {"question": "prompt", "answer": "completion"}, for question, answer, text,
    messages and tools; None knows the usual ones. Models and data may be names of the Hugging Face hub, ORG/NAME, that
    lie in the local cache; download: fetch them there first.
    lam: None searches for the largest at which the mean loss on the forget data is at most that of ``base``, and on the
    retain data at most 0.05 nats above that of ``model`` (at most 200 rows of each). max_retain_rise: it may rise by so
    many nats, and then the loss of ``base`` sets no limit. A search needs the whole model in memory, and both data
    files for every rule. at: the gradients are taken at ``base`` (None, the paper's choice) or at ``model``; or the
    inputs of linear maps are seen at ``model`` (None) or at ``base``. whole_importance: of all rows, those to forget
    among them, taken where this run takes its gradients: only the forget importance is then estimated, with the prompts
    that the whole had, and the retain importance is what remains (``remove_importances``). ``retain`` is then for the
    check and the search of lam alone, and may be None. save_importance: directory to keep the two importances in, as
    ``forget`` and ``retain`` (save_as ``pair``, the default), or their ratio (``ratio``); importance_dtype: the type to
    keep them in, float32, or bfloat16 of a ratio. The run subtracts with what it keeps. save_tuned: a directory for the
    preconditioned θ_f. Without them they lie in a temporary directory beside the result. check: measure a few rows of
    both data sets before and after, for the verdict in the report; not for streamed runs. stream: hold one decoder
    layer in memory at a time; weigh, subtract and write each layer as soon as its importances are complete. memory,
    device_memory: bytes that this may take; None sets no limit. Other arguments as in ``apply`` and
    ``estimate_importance``.

    Everything is checked before the first gradient. Returns the report, which is also in ``out``. Raises InputError for
    bad input, RunError if the run fails, ``errors.Interrupted`` if it is stopped with work that goes on: its text says
    whether ``resume`` or the same call does so. Otherwise nothing is left behind except a finished ``save_importance``.
    Disk: the output and, during the run, 8 bytes a parameter; with ``stream`` hidden states instead (in place or with
    ``whole_importance``, both).
    Rule ``preconditioned`` takes 4 bytes for each number in ``tuned``.
    """
    if whole_importance is not None:
        whole_importance = directory_of(whole_importance)
    return _run(Options(**locals()))  # the arguments, by name


def _run(options: Options) -> Report:
    started, ranks = now(), Ranks.of(options.group)
    day = ranks.share(today())
    with ranks.together("the opening of the inputs"):
        options.check_arguments()
        opened = Opened.open(options.located(), ranks, started)
        contents = opened.read_data() if opened.rule.estimator is None else None
    if contents is not None and opened.options.preconditions:
        from perta_fast.runs.unlearn_preconditioned import unlearn_preconditioned

        return unlearn_preconditioned(opened, *contents, day)
    if contents is not None:
        return _task_vector_alone(opened, *contents, day)
    loaded = _load(opened, day)
    if options.in_one_walk:
        from perta_fast.runs.unlearn_streamed import unlearn_streamed

        return unlearn_streamed(loaded)
    from perta_fast.runs.unlearn_in_memory import unlearn_in_memory

    report = unlearn_in_memory(loaded)
    return report if loaded.checking is None else loaded.checking.finish(report)


def _task_vector_alone(opened: Opened, rows: dict[str, list[Row]], hashes: dict[str, str], day: date) -> Report:
    """Rule tv: the data is for the report and the check, and for the search if there is no strength."""
    with opened.ranks.together(strength.PHASE):
        begun = _begun(opened)
        day = (begun and Told.read(begun.begun_report().settings).day) or day  # the same prompts as before
        if begun is None:
            opened.check_disk({})
        search = strength.StrengthSearch.begin(opened, rows, day)
    if search is not None:
        opened = opened.at(search.find(None).after.lam)
    options = opened.options
    checking = Checking.of(options, rows, day, opened.ranks)
    if checking is not None:
        checking.before()

    def annotate(report: Report) -> None:
        encoded = encoded_rows(search, checking)
        date = told_date(encoded.told.values())
        report.recipe = as_recipe(vars(options) | {"date_string": options.date_string or date})
        told = {"system_prompt": options.system_prompt, "date_string": options.date_string}
        report.settings = told | {"date": date}
        strength.annotate(report, search)
        report.data = data_records(options, rows, hashes, encoded)
        for warning in truncation_warnings(report.data):
            report.warn(warning)
        if checking is not None:
            checking.annotate(report)

    report = apply_sources(opened.sources, opened.rule, opened.settings, annotate=annotate, ranks=opened.ranks)
    return report if checking is None else checking.finish(report)


def _begun(opened: Opened) -> Job | None:
    """The unfinished run to the same directory, if this one may go on with it."""
    options, final = opened.options, opened.settings.destination
    if options.overwrite or options.in_place or not has_begun(final):
        return None
    return begun_job(final)


def _load(opened: Opened, day: date) -> Loaded:
    """Check everything that can be wrong before the first gradient, and load model and data. day: today."""
    options, ranks, final = opened.options, opened.ranks, opened.settings.destination
    with ranks.together("the loading of model and data"):
        streamed = options.in_one_walk
        begun = _begun(opened)
        if begun is not None and not (streamed and begun.stream):
            raise InputError(unfinished_advice(final))
        rows, hashes = opened.read_data()
        if opened.whole is not None and "retain" in rows:
            check_retained(rows["forget"], rows["retain"])
        if options.save_importance is not None:
            kept = Path(os.path.realpath(checked_path(options.save_importance)))
            # A run that is resumed may have committed its importances already.
            if begun is None or begun.stream.get("save") != str(kept):
                check_output(kept, overwrite=options.overwrite, inputs=[*options.paths, final])
                check_unfinished(kept, overwrite=options.overwrite, run=final)  # which has no work to keep
            if not options.in_place:
                check_output(final, overwrite=may_replace(final, options.overwrite), inputs=[kept])
        if not streamed:  # whose schedule checks the disk, as it knows the samples
            opened.check_disk(opened.importance_sizes)
        day = (begun and streamed_on(begun.stream)) or day  # the same prompts as before it was stopped
        day = (opened.whole and opened.whole.day) or day  # and as the whole had
        search = strength.StrengthSearch.begin(opened, rows, day)
        loaded = Loaded.load(opened, rows, hashes, day)
        loaded.search = search
    with ranks.together("the data"):
        if any(other != hashes for other in ranks.gather(hashes)):
            raise InputError("not all processes see the same data files")
    return loaded
