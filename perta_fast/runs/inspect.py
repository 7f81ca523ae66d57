"""What a directory holds: a checkpoint, an adapter, an importance, or the output of a run."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perta_fast.checkpoints.adapters import Adapter, is_adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.quantised import Quantisation
from perta_fast.errors import printable_lines
from perta_fast.importance import ratio as ratios
from perta_fast.importance.store import STEM, read_metadata
from perta_fast.progress import Progress
from perta_fast.records.report import FILE_NAME, Report, data_place
from perta_fast.runs.inspect_task_vector import TaskVector, is_importance, task_vector
from perta_fast.subtraction.task_vector import adds

_KINDS = {"ratio": "ratio of importances"}  # in words, where that is not the name


@dataclass(frozen=True)
class Inspection:
    """What was found. record: all of it, for a program. quantisation, report, task_vector: those in it, if any."""

    record: dict[str, Any]
    quantisation: Quantisation | None = None
    report: Report | None = None
    task_vector: TaskVector | None = None

    def text(self) -> str:
        """For a person."""
        record = self.record
        kind = _KINDS.get(record["kind"], record["kind"])
        if kind == "adapter":
            kind = f"{'LoRA' if record['peft_type'] == 'LORA' else record['peft_type']} adapter"
        elements = ", ".join(f"{count:,} {dtype}" for dtype, count in record["elements"].items())
        lines = [
            f"{record['path']}: {kind}",
            f"  {_counted(record['tensor_count'], 'tensor')} in {_counted(record['shards'], 'shard')}, "
            f"{record['bytes'] / 1e9:.3f} GB",
            f"  elements: {elements}",
        ]
        lines += _adapter_lines(record) if record["kind"] == "adapter" else []
        for key, value in sorted(record.get("metadata", {}).items()):
            tables = isinstance(value, dict)  # of a ratio: one for each importance
            lines += [f"  {key} {name}: {value[name]}" for name in sorted(value)] if tables else [f"  {key}: {value}"]
        if self.quantisation is not None:
            lines.append(f"  quantised: {self.quantisation.method} ({self.quantisation.places})")
            lines.append(f"  {self.quantisation.advice}")
        lines += [] if self.report is None else _report_lines(self.report)
        lines += [
            f"  {row['name']}  {row['dtype']}  {list(row['shape'])}  {row['file']}" for row in record.get("tensors", ())
        ]
        lines += [] if self.task_vector is None else self.task_vector.lines()
        return printable_lines(lines)


def inspect(
    path: str | Path, *, every_tensor: bool = False, base: str | Path | None = None, progress: Progress = False
) -> Inspection:
    """Headers and reports are read, and of an adapter the factors; other weights are not.

    every_tensor: list each tensor too. base: say too what the task vector from this checkpoint is: weights are read
    until they differ. Raises InputError if ``path`` is none of these or is damaged, or ``base`` is no checkpoint.
    """
    path, quantisation, report = Path(path), None, None
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
            report = Report.load(path)
            record["report"] = report.as_record()
    record = {"path": str(path), **_totals(checkpoint), **record}
    if every_tensor:
        record["tensors"] = [
            {"name": entry.stored_name or name, "dtype": entry.dtype, "shape": entry.shape, "file": entry.path.name}
            for name, entry in checkpoint.tensors.items()
        ]
    vector = None if base is None else task_vector(path, Path(base), progress)
    if vector is not None:
        record["task_vector"] = asdict(vector)
    return Inspection(record, quantisation, report, vector)


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


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _adapter_lines(record: dict[str, Any]) -> list[str]:
    lines = [
        f"  {factors['count']} matrices of rank {factors['rank']}, scale {factors['scale']:g}"
        for factors in record["matrices"]
    ]
    if record["adds_nothing"]:
        lines.append("  these add nothing: factors A or B are zero, as before training")
    if record["whole_tensors"]:
        lines.append(f"  {record['whole_tensors']} whole tensors")
    if record["merged_by_peft"]:
        lines.append(f"  {record['merged_by_peft']} tensors that peft merges")
    return lines


def _report_lines(report: Report) -> list[str]:
    lines = [f"{'merged' if report.merged else 'unlearned'} with perta_fast:"]
    lines += [f"  {report.started} to {report.finished}"]
    lines += [f"  {line}" for line in report.summary().split("\n")]
    lines += [f"  {role}: {found['path']}" for role, found in report.inputs.items()]
    return lines + [
        f"  {role} data: {found['samples']} samples, {data_place(found)}" for role, found in report.data.items()
    ]


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
