"""What a directory holds: a checkpoint, an adapter, an importance, or the output of a run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from perta_fast.checkpoints.adapters import Adapter, is_adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.quantised import Quantisation, open_plain
from perta_fast.errors import InputError, printable_lines
from perta_fast.files.reading import exists
from perta_fast.importance import ratio as ratios
from perta_fast.importance.store import STEM, read_metadata
from perta_fast.progress import Bar, Progress
from perta_fast.records.report import FILE_NAME, Report, data_place
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.task_vector import adds, count_changes, zero_because


def describe(
    path: str | Path, *, every_tensor: bool = False, base: str | Path | None = None, progress: Progress = False
) -> str:
    """Text for a person; headers and reports are read, and of an adapter the factors; other weights are not.

    every_tensor: list each tensor too. base: say too what the task vector from this checkpoint is: weights are read
    until they differ. Raises InputError if ``path`` is none of these or is damaged, or ``base`` is no checkpoint.
    """
    path = Path(path)
    if base is None:
        return _describe(path, every_tensor)
    return f"{_describe(path, every_tensor)}\n{printable_lines(task_vector(path, Path(base), progress).lines())}"


def _describe(path: Path, every_tensor: bool) -> str:
    if is_adapter(path):
        return printable_lines(_adapter_lines(Adapter.open(path), every_tensor))
    importance, is_ratio = is_importance(path), ratios.is_ratio(path)
    checkpoint = Checkpoint.open(path, STEM if importance else ratios.STEM if is_ratio else "model")
    kind = "importance" if importance else "ratio of importances" if is_ratio else "checkpoint"
    lines = [f"{path}: {kind}", *_totals(checkpoint)]
    if importance:
        lines += [f"  {key}: {value}" for key, value in sorted(read_metadata(checkpoint).items())]
    elif is_ratio:
        tables = ratios.read_ratio_metadata(checkpoint)
        lines += [f"  {side} {key}: {value}" for side in tables for key, value in sorted(tables[side].items())]
    elif quantisation := Quantisation.of(path, checkpoint.tensors):
        lines += [f"  quantised: {quantisation.method} ({quantisation.places})", f"  {quantisation.advice}"]
    if (path / FILE_NAME).exists():
        report = Report.load(path)
        done = "merged" if report.merged else "unlearned"
        lines += [f"{done} with perta_fast:", f"  {report.started} to {report.finished}"]
        lines += [f"  {line}" for line in report.summary().split("\n")]
        lines += [f"  {role}: {found['path']}" for role, found in report.inputs.items()]
        lines += [
            f"  {role} data: {found['samples']} samples, {data_place(found)}" for role, found in report.data.items()
        ]
    if every_tensor:
        lines += _every_tensor(checkpoint)
    return printable_lines(lines)


@dataclass(frozen=True)
class TaskVector:
    """Whether a checkpoint or adapter differs from a base, tensor by tensor.

    none: why there is no task vector, "" if there is one. zero_because: why it is zero, "" if it is not. aside: how
    many tensors have no part in it, by reason. resized: tensors of which only the rows in common count.
    """

    base: str
    none: str = ""
    differ: int = 0
    same: int = 0
    zero_because: str = ""
    aside: Mapping[str, int] = field(default_factory=dict)
    resized: Sequence[str] = ()

    def lines(self) -> list[str]:
        """For a person."""
        if self.none:
            return [f"task vector from {self.base}: none, {self.none}"]
        if self.differ:
            what = f"not zero: {self.differ} tensors differ, {self.same} are the same"
        elif self.same:
            what = f"zero in all {self.same} tensors: {self.zero_because}"
        else:
            what = "none: no tensor can be compared"
        lines = [f"task vector from {self.base}: {what}"]
        lines += [f"  {count} tensors left aside: {reason}" for reason, count in self.aside.items()]
        return lines + [f"  {name}: rows in common only, the vocabulary was resized" for name in self.resized]


def task_vector(path: Path, base: Path, progress: Progress) -> TaskVector:
    """What ``path``, as tuned, adds to ``base``; where the two do not belong together, why not."""
    checkpoint = open_plain(base)
    if is_importance(path) or ratios.is_ratio(path):
        raise InputError(f"{path}: an importance is not tuned from a base; leave out ‹base›")
    try:
        sources = Sources.open(base, base, path, common_rows=True)
        total = sum(match.theta.size for match in sources.matches)
        with Bar(total, "comparing", progress) as bar:
            counts = count_changes(sources, bar.update)
    except InputError as error:
        nothing = "" if is_adapter(path) or _has_any_of(path, checkpoint) else "no tensor has the same name; "
        return TaskVector(str(base), none=f"{nothing}{error!s}")
    because = zero_because(sources) if counts.same and not counts.differ else ""
    resized = [match.theta.name for match in sources.matches if match.is_resized]
    return TaskVector(str(base), "", counts.differ, counts.same, because, counts.aside, resized)


def is_importance(path: Path) -> bool:
    """Whether a directory holds an importance."""
    return any(exists(path / f"{STEM}.safetensors{ending}") for ending in ("", ".index.json"))


def _has_any_of(path: Path, base: Checkpoint) -> bool:
    return bool(Checkpoint.open(path).tensors.keys() & base.tensors.keys())


def _adapter_lines(adapter: Adapter, every_tensor: bool) -> list[str]:
    checkpoint = adapter.checkpoint
    kinds = Counter((each.a.shape[0], each.scale) for each in adapter.low_rank.values())
    name = "LoRA" if adapter.settings["peft_type"] == "LORA" else adapter.settings["peft_type"]
    lines = [f"{checkpoint.path}: {name} adapter", *_totals(checkpoint)]
    lines += [f"  {count} matrices of rank {rank}, scale {scale:g}" for (rank, scale), count in kinds.items()]
    if adapter.low_rank and not any(map(adds, adapter.low_rank.values())):
        lines.append("  these add nothing: factors A or B are zero, as before training")
    if adapter.whole:
        lines.append(f"  {len(adapter.whole)} whole tensors")
    if adapter.by_peft:
        lines.append(f"  {len(adapter.by_peft)} tensors that peft merges")
    return lines + (_every_tensor(checkpoint) if every_tensor else [])


def _every_tensor(checkpoint: Checkpoint) -> list[str]:
    return [
        f"  {entry.stored_name or name}  {entry.dtype}  {list(entry.shape)}  {entry.path.name}"
        for name, entry in checkpoint.tensors.items()
    ]


def _totals(checkpoint: Checkpoint) -> list[str]:
    elements: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        elements[entry.dtype] += entry.count
    parts = ", ".join(f"{count:,} {dtype}" for dtype, count in elements.most_common())
    return [
        f"  {len(checkpoint.tensors)} tensors in {len(checkpoint.shards)} shards, {checkpoint.size / 1e9:.3f} GB",
        f"  elements: {parts}",
    ]
