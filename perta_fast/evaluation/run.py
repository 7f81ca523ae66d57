"""``evaluate``: everything is checked before the model is loaded. lm-evaluation-harness is called, not rewritten."""

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.quantised import open_plain
from perta_fast.data.chat import ChatSettings, parse_date, today, told
from perta_fast.data.forms import Fields
from perta_fast.dtypes import torch_dtype
from perta_fast.errors import InputError, Interrupted, RunError, is_out_of_memory
from perta_fast.evaluation.attacks import offer_attacks
from perta_fast.evaluation.benchmark_files import DataFile
from perta_fast.evaluation.changed_codes import changed_codes
from perta_fast.evaluation.conventions import Conventions
from perta_fast.evaluation.examinee import Examinee
from perta_fast.evaluation.kept_passes import kept_part
from perta_fast.evaluation.metric_table import MetricTable
from perta_fast.evaluation.metrics import MIN_K
from perta_fast.evaluation.muse import MuseMetrics, read_muse
from perta_fast.evaluation.own_data import OwnData
from perta_fast.evaluation.request import Begun, Request
from perta_fast.evaluation.results import Evaluation, EvaluationFile, files_read
from perta_fast.evaluation.stress import check_stress, stressed
from perta_fast.evaluation.tofu import TofuMetrics, read_tofu
from perta_fast.files.identity import is_same
from perta_fast.files.kept_parts import KeptParts
from perta_fast.files.new_directory import EVALUATION_STATE
from perta_fast.files.new_file import check_output_file
from perta_fast.models.in_use import measuring
from perta_fast.models.loading import Subject, check_sizes, load_subject
from perta_fast.models.token_scores import evaluation_mode
from perta_fast.progress import Progress
from perta_fast.records.versions import installed_versions, now

PathLike = str | Path


def evaluate(
    model_or_path: PathLike | nn.Module,
    *,
    suite: Literal["tofu", "muse"] | None = None,
    data: PathLike | None = None,
    split: str = "forget10",
    forget: PathLike | None = None,
    retain: PathLike | None = None,
    holdout: PathLike | None = None,
    fields: Fields | None = None,
    download: bool = False,
    reference: PathLike | None = None,
    reference_model: PathLike | None = None,
    min_k: float = MIN_K,
    metrics: Sequence[str] | None = None,
    lm_eval: Sequence[str] = (),
    tokenizer: Any = None,
    batch_size: int = 16,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    system_prompt: str | None = None,
    date_string: str | None = None,
    compatible: Literal["open-unlearning"] | None = None,
    stress: Sequence[str] | None = None,
    against: PathLike | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    out: PathLike | None = None,
    overwrite: bool = False,
    show_text: bool = False,
    progress: Progress = True,
) -> Evaluation:
    """Measure what a causal language model has forgotten and kept, under open-unlearning's names.

    model_or_path: a checkpoint directory, or a model of transformers with its ``tokenizer``; the model does not
    change. suite, data: TOFU, with the forget set ``split``, or MUSE, in a directory with the data set's own file
    names. Without a suite: forget, retain, holdout, data files as for ``unlearn``, as are fields and download; forget
    is needed.
    reference: the result file of a gold model, for forget quality and PrivLeak. reference_model: a checkpoint with the
    same tokens, for the membership score ``mia_reference``. min_k: share of the tokens for Min-K and Min-K++.
    metrics: names of the metrics to compute, patterns such as ``forget_*``, or groups (``metric_table.GROUPS``).
    None: all that the data allows, but those that are only computed when they are named.
    lm_eval: tasks for lm-evaluation-harness. max_new_tokens: length of greedy answers; None takes the suite's own.
    system_prompt, date_string: for the tokenizer's chat template, with every question; not for MUSE. Without a date, a
    template that asks for one is told that of the start; ``settings["date"]`` of the result is what it was told.
    compatible: measure as open-unlearning does where it differs (docs/evaluation.md), to set beside published tables;
    not for MUSE, nor with max_length. If the model has a repetition penalty, answers then depend on batch_size.
    stress: what is done to the model, and undone, before its teacher-forced metrics are computed again: ``int8`` and
    ``int4`` round the weights of linear maps (``models.rounding``), ``relearn=20`` takes 20 steps on a tenth of the
    forget rows (``models.relearning``). against: with it, the checkpoint of which codes are counted that differ; None
    takes the one that the model's report names, if that is still there and weights are rounded.
    out: file to write, ending in .json. It holds no text of any set unless ``show_text``. Of a checkpoint, finished
    parts are kept beside it until then: the same call, or ``resume``, goes on with a stopped evaluation. overwrite:
    replace the file, start over.
    batch_size, max_length, device, dtype, progress: as for ``estimate_importance``.

    Raises InputError for bad input, before the model is loaded where possible, or an input that changed since a stopped
    evaluation began; RunError if ``out`` cannot be written; ``errors.Interrupted`` if it is stopped with a part
    finished. Memory: the model, the reference model while it is scored, and the logits of one batch, which are
    compared in float32. Under a stress, a second copy of the weights that it changes; ``relearn`` takes 12 more
    bytes for each parameter, 18 if it has 16 bits.
    """
    request = Request.of(locals())
    model = model_or_path if request.model is None else request.model
    return _run(request, model, tokenizer, progress, overwrite=overwrite)


def resume_evaluation(final: Path, progress: Progress) -> Evaluation:
    """Go on with the stopped evaluation to ``final``."""
    begun = Begun.load(final)
    if begun is None or begun.request.out is None or not is_same(begun.request.out, final):
        raise InputError(f"{final}: the evaluation to finish was one to another file; give it that name again")
    assert begun.request.model is not None
    return _run(begun.request, begun.request.model, None, progress, overwrite=True, earlier=begun)


def _run(
    request: Request,
    model_or_path: PathLike | nn.Module,
    tokenizer: Any,
    progress: Progress,
    *,
    overwrite: bool,
    earlier: Begun | None = None,
) -> Evaluation:
    """Check everything, go on with what is kept of ``earlier`` or of the same request, measure, and write."""
    check_sizes(request.batch_size, request.max_length, max_new_tokens=request.max_new_tokens)
    if not 0 < request.min_k <= 1:
        raise InputError(f"min_k is {request.min_k}; it must be a share of the tokens, above 0 and at most 1")
    ChatSettings.of(request.system_prompt, request.date_string)
    if request.suite == "muse" and not (request.system_prompt is request.date_string is None):
        raise InputError("system_prompt and date_string are for a chat template, and MUSE asks without one")
    conventions = _conventions(request)
    out = None if request.out is None else Path(request.out)
    if out is not None:
        again = "" if overwrite and earlier is None else EVALUATION_STATE
        inputs = files_read(request.paths(), out)
        check_output_file(out, (".json",), overwrite=overwrite, inputs=inputs, again=again)
    gold = None if request.reference is None else EvaluationFile.read(request.reference)
    table = _table(request, gold)
    if request.reference_model is not None:
        Checkpoint.open(request.reference_model)
    offer_attacks(table, request.reference_model, conventions)
    _check_stress(request, table)
    names, notes = table.chosen(request.metrics), list[str]()
    if gold is not None:
        notes += gold.compared_with(conventions.name)
        given = {"system_prompt": request.system_prompt, "date_string": request.date_string}
        notes += gold.differences(given, {role: file.digest for role, file in table.files.items()})
        _check_reference(gold, table, names, request.min_k)
    for name in ("rouge_score", "scipy", "sklearn"):
        if find_spec(name) is None:
            raise InputError(f"{name} is not installed: pip install 'perta-fast[eval]'")
    if request.lm_eval:
        _check_harness(request.lm_eval)
    measure = partial(_measure, request, table, names, model_or_path, tokenizer, progress, notes)
    # A model in memory may be another one at the next call; a link is replaced itself.
    if out is None or request.model is None or tokenizer is not None or out.is_symlink():
        result = measure(None, now(), today())
        if out is not None:
            result.save(out, overwrite=overwrite)
        return result
    return _measure_kept(request, table, measure, overwrite=overwrite and earlier is None)


def _measure_kept(
    request: Request, table: MetricTable, measure: Callable[[KeptParts, str, date], Evaluation], *, overwrite: bool
) -> Evaluation:
    """Keep each part that is finished beside ``out``, and go on with those that are there, unless ``overwrite``."""
    assert request.out is not None
    final = Path(os.path.realpath(request.out))
    begun, earlier = Begun.now(request, table, now()), None if overwrite else Begun.load(final)
    if earlier is not None:
        earlier.check_same(final, begun)
        begun = earlier
    day = parse_date(begun.day) if begun.day else today()
    with KeptParts(final, begun.record(), resume=earlier is not None) as kept:
        try:
            result = measure(kept, begun.started, day)
        except KeyboardInterrupt:
            if not kept.any:
                raise
            raise Interrupted(f"interrupted; {kept.going_on()}") from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or not kept.any:
                raise
            raise RunError(f"out of memory; {kept.going_on()}") from error
        kept.finish(result.as_json())
    return result


def _measure(
    request: Request,
    table: MetricTable,
    names: Sequence[str],
    model_or_path: PathLike | nn.Module,
    tokenizer: Any,
    progress: Progress,
    notes: Sequence[str],
    kept: KeptParts | None,
    started: str,
    day: date,
) -> Evaluation:
    """Load the model and measure it. notes: of what was checked before. day: for templates that ask for the date."""
    dtype = None if request.dtype is None else torch_dtype(request.dtype)
    subject = _subject(model_or_path, tokenizer, request.device, dtype)
    spoken = ChatSettings.of(request.system_prompt, request.date_string, day).given_to(subject.tokenizer)
    subject = replace(subject, tokenizer=spoken)
    if request.stress is not None:
        check_stress(request.stress, subject.module)
    examinee = Examinee(
        subject,
        request.batch_size,
        request.max_length,
        progress,
        request.max_new_tokens,
        request.show_text,
        kept,
        request.min_k,
        Conventions.named(request.compatible),
        notes=list(notes),
    )
    with measuring(subject.module), evaluation_mode(subject.module):
        under_stress = _codes(request, examinee)
        measured, general = table.measure(examinee, names), {}
        if request.lm_eval:
            general = kept_part(
                kept, "general", request.lm_eval, lambda: _general_ability(subject, request.lm_eval, request.batch_size)
            )
        if request.stress is not None:
            under_stress |= stressed(table, request.stress)
    return Evaluation(
        measured,
        subject.origin,
        request.settings() | {"date": told(spoken).date, "prompt": examinee.prompt},
        examinee.data,
        general,
        installed_versions(),
        examinee.notes,
        started,
        now(),
        under_stress,
    )


def _check_stress(request: Request, table: MetricTable) -> None:
    """Raise InputError for stresses that the request does not allow."""
    if request.against is not None:
        if request.stress is None:
            raise InputError("against is for counting codes that have changed; name what to measure with stress too")
        if request.model is None:
            raise InputError("against compares two checkpoints, and the model is one in memory; give its directory")
        open_plain(request.against)
    if request.stress is None:
        return
    if table.forget_file not in table.files:
        raise InputError(f"stress needs the file {table.forget_file}")
    if request.model is not None:
        open_plain(request.model)


def _codes(request: Request, examinee: Examinee) -> dict[str, Any]:
    """``changed_codes``, under ``codes``, if there is a model to compare with; a note if its report's does not fit."""
    before = request.counted_against
    if before is None:
        return {}
    assert request.model is not None
    count = partial(
        changed_codes, examinee.subject.module, Path(request.model), Path(before), progress=examinee.progress
    )
    try:
        return {"codes": kept_part(examinee.kept, "codes", before, count)}
    except InputError as error:
        if request.against is not None:
            raise
        examinee.notes.append(f"codes were not compared with {before}, which the model's report names: {error}")
        return {}


def _conventions(request: Request) -> Conventions:
    """Raises InputError for a request that they do not cover."""
    conventions = Conventions.named(request.compatible)
    if conventions.name is not None and request.suite == "muse":
        raise InputError(f"compatible {conventions.name} is for TOFU and data of your own, not for MUSE; leave it out")
    if conventions.name is not None and request.max_length is not None:
        raise InputError(f"max_length: {conventions.name} has limits of its own; leave out the one or the other")
    return conventions


def _table(request: Request, gold: EvaluationFile | None) -> MetricTable:
    """Read and check all data; returns what can be measured on it."""
    suite = request.suite
    if suite not in (None, "tofu", "muse"):
        raise InputError(f"suite is {suite!r}; it must be tofu or muse")
    given = {role: path for role in ("forget", "retain", "holdout") if (path := getattr(request, role)) is not None}
    if suite is None:
        if "forget" not in given:
            raise InputError("forget is missing: give a suite with its data, or your own forget data")
        if request.data is not None:
            raise InputError("data is the directory of a suite; name the suite too")
        if gold is not None and "holdout" not in given:
            raise InputError("without a suite, reference serves PrivLeak alone, which needs holdout")
        return OwnData({role: DataFile.read(path, request.fields) for role, path in given.items()}, gold)
    if given:
        raise InputError(f"{', '.join(given)}: the suite has its own sets; leave out the one or the other")
    if request.fields is not None:
        raise InputError("fields is for data of your own; the suite has its own names of fields")
    if request.data is None:
        raise InputError("data is missing: the directory with the files of the suite")
    if suite == "tofu":
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
                f"{gold.path}: has Min-K of {gold.min_k} of the tokens; evaluate with --min-k {gold.min_k}"
            )


def _subject(
    model_or_path: PathLike | nn.Module, tokenizer: Any, device: str | torch.device | None, dtype: torch.dtype | None
) -> Subject:
    if not isinstance(model_or_path, nn.Module):
        return load_subject(Path(model_or_path), device, dtype, tokenizer)
    if device is not None or dtype is not None:
        raise InputError("device and dtype are for checkpoints; move or convert the module itself")
    if tokenizer is None:
        raise InputError("a tokenizer is needed with a module; pass tokenizer=")
    return Subject(model_or_path, tokenizer, "live module")


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


def _general_ability(subject: Subject, tasks: Sequence[str], batch_size: int) -> dict[str, dict[str, Any]]:
    """The results of lm-evaluation-harness by task, under its own names. It loads its own data."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer = deepcopy(subject.tokenizer)  # the harness gives it a padding token
    model = HFLM(pretrained=subject.module, tokenizer=tokenizer, batch_size=batch_size)
    results = simple_evaluate(model=model, tasks=list(tasks))
    return {task: dict(numbers) for task, numbers in results["results"].items()}
