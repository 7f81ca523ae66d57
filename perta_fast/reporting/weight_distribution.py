"""The distribution of w over the parameters, from importances on disk, chunk by chunk."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.checkpoints.tied import tied_partner
from perta_fast.dtypes import ITEM_SIZES, KERNEL_CODES
from perta_fast.errors import InputError
from perta_fast.files.reading import exists
from perta_fast.models.same_names import named_as_model
from perta_fast.progress import Bar, Progress
from perta_fast.records.report import Report
from perta_fast.reporting.evidence import why_not_as_recorded
from perta_fast.rules import Rule
from perta_fast.subtraction.inputs import IMPORTANCES, RATIO, stem_of

if TYPE_CHECKING:
    import numpy as np

BINS = 50
_CHUNK = 1 << 20  # elements


@dataclass(frozen=True)
class Distribution:
    """w over all parameters that have one. counts: (BINS,), of equal parts of [0, 1]; above_half: w > 1/2."""

    counts: "np.ndarray[Any, np.dtype[np.int64]]"
    above_half: int
    total: int


def distribution(report: Report, progress: Progress) -> Distribution | str:
    """The distribution of w by the rule of ``report``, or why it cannot be computed.

    Every shard is hashed first: a page must not show weights that the run did not use. Raises InputError if the report
    contradicts itself or its importances. Memory: a few chunks of 2^20 elements.
    """
    try:
        rule = report.chosen_rule()
    except InputError as error:
        raise InputError(f"the run's report: {error}") from error
    if rule.estimator is None:
        return "rule tv has w = 1 everywhere"
    opened = []
    for role in (RATIO,) if RATIO in report.inputs else IMPORTANCES:
        record = report.inputs.get(role)
        if record is None:
            return f"the report names no {role}"
        if reason := why_not_as_recorded(record):
            keep = " (perta unlearn keeps importances with --save-importance)" if "kept" in record else ""
            return reason + keep
        importance = Checkpoint.open(record["path"], stem_of(role))
        if unknown := [name for name in importance.shards if name not in record["files"]]:
            return f"{importance.path / unknown[0]} was not there when the run was made"
        opened.append(_in_form_of_output(importance, report))
    return _count(report, rule, opened, progress)


def _count(report: Report, rule: Rule, importances: list[Checkpoint], progress: Progress) -> Distribution:
    import numpy as np

    from perta_fast.ops import reference

    pairs = [
        [_entry(importance, row.name, row.shape) for importance in importances]
        for row in report.tensors
        if row.mean_weight is not None
    ]
    counts, above_half, total = np.zeros(BINS, np.int64), 0, 0
    with Bar(sum(entry.size for pair in pairs for entry in pair), "weights", progress) as bar:
        for pair in pairs:
            for begin in range(0, pair[0].count, _CHUNK):
                count = min(_CHUNK, pair[0].count - begin)
                arrays = [
                    checkpoint.elements(entry, begin, count)
                    for checkpoint, entry in zip(importances, pair, strict=True)
                ]
                if len(arrays) == 1:
                    weights = reference.weights_of_ratio(arrays[0], rule.rescaling)
                else:
                    weights = reference.weights(arrays[0], arrays[1], rule.rescaling)
                w = weights.numpy()
                counts += np.histogram(w, BINS, (0.0, 1.0))[0]
                above_half += int((w > 0.5).sum())
                total += count
                bar.update(sum(count * ITEM_SIZES[entry.dtype] for entry in pair))
    return Distribution(counts, above_half, total)


def _in_form_of_output(importance: Checkpoint, report: Report) -> Checkpoint:
    """``importance`` with the tensors of the run's output, if it holds them under other names."""
    names = [row.name for row in report.tensors if row.mean_weight is not None]
    output = Path(report.output["path"])
    known = all(name in importance.tensors or tied_partner(name, importance.tensors) for name in names)
    return importance if known or not exists(output) else named_as_model(importance, Checkpoint.open(output))


def _entry(importance: Checkpoint, name: str, shape: list[int]) -> TensorEntry:
    partner = tied_partner(name, importance.tensors)
    entry = importance.tensors.get(name) or importance.tensors.get(partner or name)
    if entry is None or list(entry.shape) != shape or entry.dtype not in KERNEL_CODES:
        raise InputError(f"{importance.path}: has no importance of tensor {name}, of shape {shape}")
    return entry
