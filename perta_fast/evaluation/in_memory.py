"""A checked evaluation of a loaded model. lm-evaluation-harness is called too."""

from collections.abc import Sequence
from copy import deepcopy
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from perta_fast.dtypes import torch_name
from perta_fast.errors import InputError
from perta_fast.evaluation.changed_codes import changed_codes
from perta_fast.evaluation.checks import Checked
from perta_fast.evaluation.examinee import Examinee
from perta_fast.evaluation.kept_passes import kept_part
from perta_fast.evaluation.reference_model import reference_type
from perta_fast.evaluation.request import Request
from perta_fast.evaluation.results import Evaluation
from perta_fast.evaluation.stress import check_stress, stressed
from perta_fast.files.kept_parts import KeptParts
from perta_fast.models.in_use import measuring
from perta_fast.models.loading import Subject, load_subject
from perta_fast.models.token_scores import evaluation_mode
from perta_fast.progress import Progress


def measure_loaded(
    checked: Checked,
    model_or_path: str | Path | nn.Module,
    tokenizer: Any,
    progress: Progress,
    kept: KeptParts | None,
    started: str,
    day: date,
) -> Evaluation:
    """Load the model and measure it, as a ``Measure`` does."""
    request, table = checked.request, checked.table
    subject = checked.subject_on(_subject(model_or_path, tokenizer, request, progress), day)
    if kept is not None:
        kept.kind = _types(subject, request)
    if request.stress is not None:
        check_stress(request.stress, subject.module)
    examinee = checked.examinee(Examinee, subject, progress, kept)
    with measuring(subject.module), evaluation_mode(subject.module):
        under_stress = _codes(request, examinee)
        measured, general = table.measure(examinee, checked.names), {}
        if request.lm_eval:
            general = kept_part(
                kept, "general", request.lm_eval, lambda: _general_ability(subject, request.lm_eval, request.batch_size)
            )
        if request.stress is not None:
            under_stress |= stressed(table, request.stress)
    return checked.result(examinee, measured, started, general, under_stress)


def _types(subject: Subject, request: Request) -> str:
    """The types in which the model and the reference model run."""
    path = request.reference_model
    reference = [] if path is None else [reference_type(Path(path), subject.device, request.asked_type)]
    return " ".join(map(torch_name, [subject.module.dtype, *reference]))


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
        examinee.notes.append(f"codes were not compared with {before}, which the model's report names: {error!s}")
        return {}


def _subject(model_or_path: str | Path | nn.Module, tokenizer: Any, request: Request, progress: Progress) -> Subject:
    if not isinstance(model_or_path, nn.Module):
        return load_subject(Path(model_or_path), request.device, request.asked_type, tokenizer, progress=progress)
    if request.device is not None or request.dtype is not None:
        raise InputError("‹device› and ‹dtype› are for checkpoints; move or convert the module itself")
    if tokenizer is None:
        raise InputError("a tokenizer is needed with a module; pass tokenizer=")
    return Subject(model_or_path, tokenizer, "live module")


def _general_ability(subject: Subject, tasks: Sequence[str], batch_size: int) -> dict[str, dict[str, Any]]:
    """The results of lm-evaluation-harness by task, under its own names. It loads its own data."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer = deepcopy(subject.tokenizer)  # the harness gives it a padding token
    model = HFLM(pretrained=subject.module, tokenizer=tokenizer, batch_size=batch_size)
    results = simple_evaluate(model=model, tasks=list(tasks))
    return {task: dict(numbers) for task, numbers in results["results"].items()}
