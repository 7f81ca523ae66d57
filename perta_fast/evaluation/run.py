"""An evaluation that is checked, done: on a loaded model, with its parts kept. lm-evaluation-harness is called too."""

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perta_fast.data.chat import parse_date, today
from perta_fast.data.given import SAME_CALL
from perta_fast.dtypes import torch_dtype
from perta_fast.errors import InputError, Interrupted, RunError, is_out_of_memory
from perta_fast.evaluation.changed_codes import changed_codes
from perta_fast.evaluation.checks import Checked
from perta_fast.evaluation.examinee import Examinee
from perta_fast.evaluation.kept_passes import kept_part
from perta_fast.evaluation.open_unlearning_files import write_open_unlearning_files
from perta_fast.evaluation.request import Begun, Request
from perta_fast.evaluation.results import Evaluation
from perta_fast.evaluation.stress import check_stress, stressed
from perta_fast.files.kept_parts import KeptParts
from perta_fast.models.in_use import measuring
from perta_fast.models.loading import Subject, load_subject
from perta_fast.models.token_scores import evaluation_mode
from perta_fast.progress import Progress
from perta_fast.records.versions import now

# Given what is kept, when the evaluation was started, and the day for chat templates that ask for the date.
Measure = Callable[[KeptParts | None, str, date], Evaluation]


def run(checked: Checked, measure: Measure, *, repeatable: bool, overwrite: bool) -> Evaluation:
    """Measure, and write the result, if there is a place for it.

    repeatable: whether the same call would measure the same; then finished parts are kept. overwrite: replace a
    result, and give up what is kept of an earlier evaluation; without it that goes on.
    """
    request = checked.request
    out = None if request.out is None else Path(request.out)
    if out is None or not repeatable or out.is_symlink():  # a link is replaced itself
        result = measure(None, now(), today())
        write_open_unlearning_files(request, result)
        if out is not None:
            result.save(out, overwrite=overwrite)
        return result
    return _run_kept(checked, Path(os.path.realpath(out)), measure, overwrite=overwrite)


def _run_kept(checked: Checked, final: Path, measure: Measure, *, overwrite: bool) -> Evaluation:
    """Keep each part that is finished beside ``final``, and go on with those that are there, unless ``overwrite``."""
    begun, earlier = Begun.now(checked.request, checked.table, now()), None if overwrite else Begun.load(final)
    if earlier is not None:
        earlier.check_same(final, begun)
        begun = earlier
    day = parse_date(begun.day) if begun.day else today()
    again = SAME_CALL if checked.request.is_of_given_rows else None
    with KeptParts(final, begun.record(), resume=earlier is not None, again=again) as kept:
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
        write_open_unlearning_files(checked.request, result)
        kept.finish(result.as_json())
    return result


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
    dtype = None if request.dtype is None else torch_dtype(request.dtype)
    subject = checked.subject_on(_subject(model_or_path, tokenizer, request.device, dtype, progress), day)
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


def _subject(
    model_or_path: str | Path | nn.Module,
    tokenizer: Any,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    progress: Progress,
) -> Subject:
    if not isinstance(model_or_path, nn.Module):
        return load_subject(Path(model_or_path), device, dtype, tokenizer, progress=progress)
    if device is not None or dtype is not None:
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
