"""``describe``, as data for a program."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perta_fast.checkpoints.adapters import Adapter, is_adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.quantised import Quantisation
from perta_fast.importance import ratio as ratios
from perta_fast.importance.store import STEM, read_metadata
from perta_fast.progress import Progress
from perta_fast.records.report import FILE_NAME, Report
from perta_fast.runs.inspect import is_importance, task_vector
from perta_fast.subtraction.task_vector import adds


def inspection(
    path: str | Path, *, every_tensor: bool = False, base: str | Path | None = None, progress: Progress = False
) -> dict[str, Any]:
    """What ``describe`` says, as a table of which JSON can be made; the arguments and the errors are the same."""
    path = Path(path)
    if is_adapter(path):
        adapter = Adapter.open(path)
        checkpoint, record = adapter.checkpoint, _of_adapter(adapter)
    else:
        importance, ratio = is_importance(path), ratios.is_ratio(path)
        checkpoint = Checkpoint.open(path, STEM if importance else ratios.STEM if ratio else "model")
        record = {"kind": "importance" if importance else "ratio" if ratio else "checkpoint"}
        if importance:
            record["metadata"] = read_metadata(checkpoint)
        elif ratio:
            record["metadata"] = ratios.read_ratio_metadata(checkpoint)
        elif quantisation := Quantisation.of(path, checkpoint.tensors):
            record["quantised"] = quantisation.method
        if (path / FILE_NAME).exists():
            record["report"] = Report.load(path).as_record()
    record = {"path": str(path), **_totals(checkpoint), **record}
    if every_tensor:
        record["tensors"] = [
            {"name": entry.stored_name or name, "dtype": entry.dtype, "shape": entry.shape, "file": entry.path.name}
            for name, entry in checkpoint.tensors.items()
        ]
    if base is not None:
        record["task_vector"] = asdict(task_vector(path, Path(base), progress))
    return record


def _of_adapter(adapter: Adapter) -> dict[str, Any]:
    factors = adapter.low_rank.values()
    ranks = Counter((factor.a.shape[0], factor.scale) for factor in factors)
    return {
        "kind": "adapter",
        "peft_type": adapter.settings["peft_type"],
        "matrices": [{"rank": rank, "scale": scale, "count": count} for (rank, scale), count in ranks.items()],
        "whole_tensors": len(adapter.whole),
        "merged_by_peft": len(adapter.by_peft),
        "adds_nothing": bool(factors) and not any(map(adds, factors)),
    }


def _totals(checkpoint: Checkpoint) -> dict[str, Any]:
    elements: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        elements[entry.dtype] += entry.count
    return {
        "tensor_count": len(checkpoint.tensors),
        "shards": len(checkpoint.shards),
        "bytes": checkpoint.size,
        "elements": dict(elements.most_common()),
    }
