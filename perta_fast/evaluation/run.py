"""``evaluate``: everything is checked before the model is loaded. lm-evaluation-harness is called, not rewritten."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from perta_fast.data.chat import with_chat_settings
from perta_fast.errors import InputError
from perta_fast.evaluation.benchmark_files import DataFile
from perta_fast.evaluation.examinee import Examinee
from perta_fast.evaluation.metric_table import MetricTable
from perta_fast.evaluation.muse import MuseMetrics, read_muse
from perta_fast.evaluation.own_data import OwnData
from perta_fast.evaluation.results import Evaluation, EvaluationFile, files_read
from perta_fast.evaluation.tofu import TofuMetrics, read_tofu
from perta_fast.files.new_file import check_output_file
from perta_fast.files.reading import checked_path
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
    reference: PathLike | None = None,
    metrics: Sequence[str] | None = None,
    lm_eval: Sequence[str] = (),
    tokenizer: Any = None,
    batch_size: int = 16,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    system_prompt: str | None = None,
    date_string: str | None = None,
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
    names. Without a suite: forget, retain, holdout, JSON lines files as for ``unlearn``; forget is needed.
    reference: the result file of a gold model, for forget quality and PrivLeak.
    metrics: names of the metrics to compute, patterns such as ``forget_*``, or groups (``metric_table.GROUPS``).
    None: all that the data allows, but those that are only computed when they are named.
    lm_eval: tasks for lm-evaluation-harness. max_new_tokens: length of greedy answers; None takes the suite's own.
    system_prompt, date_string: for the tokenizer's chat template, with every question; not for MUSE.
    out: file to write, ending in .json. It holds no text of any set unless ``show_text``.
    batch_size, max_length, device, dtype, progress: as for ``estimate_importance``.

    Raises InputError for bad input, before the model is loaded where possible, RunError if ``out`` cannot be
    written. Memory: the model and the logits of one batch, which are compared in float32.
    """
    check_sizes(batch_size, max_length, max_new_tokens=max_new_tokens)
    if suite == "muse" and not (system_prompt is date_string is None):
        raise InputError("system_prompt and date_string are for a chat template, and MUSE asks without one")
    if out is not None:
        given = (model_or_path, data, forget, retain, holdout, reference)
        paths = [Path(path) for path in given if isinstance(path, str | Path)]
        check_output_file(checked_path(out), (".json",), overwrite=overwrite, inputs=files_read(paths, Path(out)))
    gold = None if reference is None else EvaluationFile.read(reference)
    table = _table(suite, data, split, {"forget": forget, "retain": retain, "holdout": holdout}, gold)
    names = table.chosen(metrics)
    if gold is not None:
        _check_reference(gold, table, names)
    for name in ("rouge_score", "scipy", "sklearn"):
        if find_spec(name) is None:
            raise InputError(f"{name} is not installed: pip install 'perta-fast[eval]'")
    if lm_eval:
        _check_harness(lm_eval)
    settings = {
        "suite": suite,
        "split": split if suite == "tofu" else None,
        "metrics": None if metrics is None else list(metrics),
        "reference": None if reference is None else str(Path(reference).resolve()),
        "batch_size": batch_size,
        "max_length": max_length,
        "max_new_tokens": max_new_tokens,
        "system_prompt": system_prompt,
        "date_string": date_string,
    }
    started = now()
    subject = _subject(model_or_path, tokenizer, device, dtype)
    subject = replace(subject, tokenizer=with_chat_settings(subject.tokenizer, system_prompt, date_string))
    examinee = Examinee(subject, batch_size, max_length, progress, max_new_tokens, show_text)
    with measuring(subject.module), evaluation_mode(subject.module):
        result = Evaluation(
            metrics=table.measure(examinee, names), model=subject.origin, settings=settings, started=started
        )
        if lm_eval:
            result.general = _general_ability(subject, lm_eval, batch_size)
    result.data, result.notes = examinee.data, examinee.notes
    result.versions, result.finished = installed_versions(), now()
    if out is not None:
        result.save(Path(out), overwrite=overwrite)
    return result


def _table(
    suite: str | None, data: PathLike | None, split: str, sets: dict[str, PathLike | None], gold: EvaluationFile | None
) -> MetricTable:
    """Read and check all data; returns what can be measured on it."""
    if suite not in (None, "tofu", "muse"):
        raise InputError(f"suite is {suite!r}; it must be tofu or muse")
    given = {role: Path(path) for role, path in sets.items() if path is not None}
    if suite is None:
        if "forget" not in given:
            raise InputError("forget is missing: give a suite with its data, or your own forget data")
        if data is not None:
            raise InputError("data is the directory of a suite; name the suite too")
        if gold is not None and "holdout" not in given:
            raise InputError("without a suite, reference serves PrivLeak alone, which needs holdout")
        return OwnData({role: DataFile.read(path) for role, path in given.items()}, gold)
    if given:
        raise InputError(f"{', '.join(given)}: the suite has its own sets; leave out the one or the other")
    if data is None:
        raise InputError("data is missing: the directory with the files of the suite")
    if suite == "tofu":
        return TofuMetrics(read_tofu(Path(data), split), gold)
    return MuseMetrics(read_muse(Path(data)), gold)


def _check_reference(gold: EvaluationFile, table: MetricTable, names: Sequence[str]) -> None:
    """Raise InputError unless the gold results have all that the metrics of these names read."""
    if any(name.startswith("forget_quality") for name in names):
        gold.values("forget_truth_ratio", "score", len(table.files["forget"].rows))
    if "privleak" in names:
        gold.value("mia_min_k")


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
