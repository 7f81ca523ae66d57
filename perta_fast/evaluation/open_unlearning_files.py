"""Results as open-unlearning lays them out: ``TOFU_EVAL.json`` and ``TOFU_SUMMARY.json``, or those of MUSE.

Only metrics that are defined as there are written, under its names; the documentation ("Evaluation") has the table.
Read for it: locuslab/open-unlearning, src/evals/base.py, src/evals/metrics/*.py and configs/eval.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perta_fast.errors import InputError, RunError
from perta_fast.evaluation.conventions import OPEN_UNLEARNING
from perta_fast.evaluation.metrics import MIN_K, mean
from perta_fast.evaluation.request import Request
from perta_fast.evaluation.results import Evaluation, Metric, files_read
from perta_fast.files.kept_parts import kept_record
from perta_fast.files.new_file import check_output_file, write_output_file
from perta_fast.files.reading import exists, read_json
from perta_fast.records.typed_json import with_nulls

_SETS = ("forget", "holdout")
_MEMBERSHIP = ("mia_loss", "mia_zlib", "mia_reference", "mia_gradnorm")
_MIN_K = ("mia_min_k", "mia_min_k_plus_plus", "privleak")  # of its share of the tokens
_MEMORISATION = ("extraction_strength", "exact_memorization")
_OF_SETS = ("Q_A_Prob", "Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")
_TOFU = {
    *_MEMORISATION,
    *("retain_extraction_strength", "forget_truth_ratio", "forget_quality", "model_utility"),
    *(f"{role}_{name}" for role in ("forget", "retain", "ra", "wf") for name in _OF_SETS),
}
_KNOWLEDGE = ("forget_knowmem_ROUGE", "retain_knowmem_ROUGE")  # it asks a chat model by its template
_OTHER_NAMES = {"privleak_without_gold": "privleak"}  # its privleak of a model without a gold one


def check_open_unlearning_files(request: Request, *, overwrite: bool) -> None:
    """Raise InputError if the request's results cannot have this layout, or the files may not be written."""
    if request.open_unlearning_dir is None:
        return
    if request.suite is None:
        raise InputError("‹open_unlearning_dir› is for the results of a suite, TOFU or MUSE; leave it out")
    if request.suite == "tofu" and request.compatible != OPEN_UNLEARNING:
        raise InputError(
            f"‹open_unlearning_dir› has numbers under the names of {OPEN_UNLEARNING}, which measures in another way; "
            f"add ‹compatible› {OPEN_UNLEARNING}"
        )
    folder = Path(request.open_unlearning_dir)
    if exists(folder) and not folder.is_dir():
        raise InputError(f"{folder}: is no directory; give one for {' and '.join(_names(request))}")
    if not folder.is_dir() and not folder.parent.is_dir():
        raise InputError(f"{folder.parent}: is not a directory")
    if folder.is_dir():
        going_on = request.out is not None and kept_record(Path(request.out)) is not None
        for path in (folder / name for name in _names(request)):
            inputs = files_read(request.paths(), path) + ([] if request.out is None else [Path(request.out)])
            check_output_file(path, (".json",), overwrite=overwrite or going_on, inputs=inputs)


def write_open_unlearning_files(request: Request, result: Evaluation) -> None:
    """Write both files, if the request names a directory for them. Raises RunError if that fails."""
    if request.open_unlearning_dir is None:
        return
    folder = Path(request.open_unlearning_dir)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be made: {error.strerror}") from error
    for name, content in zip(_names(request), as_laid_out(request, result), strict=True):
        write_output_file(folder / name, f"{json.dumps(content, indent=4)}\n".encode(), overwrite=True)


def as_laid_out(request: Request, result: Evaluation) -> tuple[dict[str, Any], dict[str, float]]:
    """Every metric with its samples, and the aggregates alone; both by name, in the order of the names."""
    allowed = _allowed(request)
    named = {_OTHER_NAMES.get(name, name): metric for name, metric in result.metrics.items()}
    chosen = {name: metric for name, metric in sorted(named.items()) if name in allowed}
    every: dict[str, Any] = with_nulls({name: _entry(name, metric) for name, metric in chosen.items()})
    return every, {name: entry["agg_value"] for name, entry in every.items() if entry["agg_value"] is not None}


def _entry(name: str, metric: Metric) -> dict[str, Any]:
    if name.startswith("mia_"):
        sets = {role: [sample["score"] for sample in metric.samples if sample["set"] == role] for role in _SETS}
        parts = {role: {"agg_value": mean(scores), **_by_index(_scores(scores))} for role, scores in sets.items()}
        return {**parts, "auc": metric.value, "agg_value": metric.value}
    return {"agg_value": metric.value, **(_by_index(metric.samples) if metric.samples else {})}


def _scores(values: list[float]) -> list[dict[str, float]]:
    return [{"score": value} for value in values]


def _by_index(samples: Any) -> dict[str, dict[str, Mapping[str, Any]]]:
    return {"value_by_index": {str(number): dict(sample) for number, sample in enumerate(samples)}}


def _allowed(request: Request) -> set[str]:
    """The names of the metrics that are defined, and computed, as in open-unlearning."""
    names = {*_MEMBERSHIP, *(_MIN_K if request.min_k == MIN_K else ())}
    as_long = request.max_new_tokens is None  # as its answers are
    if request.suite == "tofu":
        return names | {name for name in _TOFU if as_long or not (name.endswith("_ROUGE") or name == "model_utility")}
    chats = request.model is None or _has_chat_template(Path(request.model))
    return names | {*_MEMORISATION, *(_KNOWLEDGE if as_long and not chats else ())}


def _has_chat_template(model: Path) -> bool:
    if exists(model / "chat_template.jinja"):
        return True
    settings = model / "tokenizer_config.json"
    content = read_json(settings) if exists(settings) else None
    return isinstance(content, dict) and bool(content.get("chat_template"))


def _names(request: Request) -> list[str]:
    return [f"{str(request.suite).upper()}_{kind}.json" for kind in ("EVAL", "SUMMARY")]
