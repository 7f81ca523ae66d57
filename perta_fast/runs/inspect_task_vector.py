"""Whether a checkpoint or an adapter differs from the checkpoint that it was tuned from, for ``perta inspect``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from perta_fast.checkpoints.adapters import is_adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.quantised import open_plain
from perta_fast.errors import InputError
from perta_fast.files.reading import exists
from perta_fast.importance import ratio as ratios
from perta_fast.importance.store import STEM
from perta_fast.progress import Bar, Progress
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.task_vector import count_changes, zero_because


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
