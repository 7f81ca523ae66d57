"""Importances that can be added up: means over known rows, at the same weights, with the same prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.data.chat import Told, shown
from perta_fast.dtypes import KERNEL_CODES
from perta_fast.errors import InputError, tensors_named
from perta_fast.importance.row_digests import RowDigests
from perta_fast.importance.store import STEM, Importance, ImportanceMetadata

AGAIN = "estimate one of them again"


@dataclass(frozen=True)
class Addable:
    """An opened importance, with the rows that it is a mean over."""

    checkpoint: Checkpoint
    metadata: ImportanceMetadata
    rows: RowDigests

    @classmethod
    def open(cls, directory: str | Path) -> "Addable":
        """Read headers and rows. Raises InputError if rows or weights are not known, or a type has no arithmetic."""
        checkpoint = Checkpoint.open(directory, STEM)
        metadata = Importance.of_checkpoint(checkpoint).metadata
        if not metadata.sample_count:
            raise InputError(f"{checkpoint.path}: its metadata says that it is a mean over no rows; estimate it again")
        rows = RowDigests.read(checkpoint.path, metadata.rows_hash, metadata.sample_count)
        if not metadata.weights_hash:
            raise InputError(
                f"{checkpoint.path}: does not know the weights that it was taken at ({metadata.evaluated_at}); "
                "estimate it from a checkpoint directory"
            )
        for entry in checkpoint.tensors.values():
            if entry.dtype not in KERNEL_CODES:
                raise InputError(
                    f"{entry.path}: tensor {entry.name} is {entry.dtype}; an importance is float32, or was saved as "
                    "bfloat16 or float16"
                )
        return cls(checkpoint, metadata, rows)

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.checkpoint.path

    def check_fits(self, other: "Addable") -> None:
        """Raise InputError, with the reason, unless the two are means of the same thing over different rows."""
        mine, its = self.metadata, other.metadata
        both = f"{self.path} and {other.path}"
        if mine.estimator != its.estimator:
            raise InputError(
                f"{both}: one holds estimator {mine.estimator}, the other {its.estimator}, which do not add up; {AGAIN}"
            )
        if mine.weights_hash != its.weights_hash:
            raise InputError(
                f"{both}: were taken at different weights, {mine.evaluated_at} and {its.evaluated_at}; {AGAIN}, "
                "at the weights of the other"
            )
        if mine.dtype != its.dtype:
            raise InputError(
                f"{both}: the model was run in {mine.dtype} and in {its.dtype}; {AGAIN}, with the ‹dtype› of the other"
            )
        if reason := different_prompts(mine.told, its.told):
            raise InputError(f"{both}: {reason}; {AGAIN}, with the prompts of the other")
        self._check_same_tensors(other)

    def _check_same_tensors(self, other: "Addable") -> None:
        for holder, lacking in ((self, other), (other, self)):
            missing = [name for name in holder.checkpoint.tensors if name not in lacking.checkpoint.tensors]
            if missing:
                raise InputError(f"{lacking.path}: lacks {tensors_named(missing)}, which {holder.path} has; {AGAIN}")
        for name, entry in self.checkpoint.tensors.items():
            another = other.checkpoint.tensors[name]
            if entry.shape != another.shape:
                raise InputError(
                    f"tensor {name}: shape {list(entry.shape)} in {entry.path}, {list(another.shape)} in "
                    f"{another.path}; these are not of one model"
                )


def different_prompts(first: Told, second: Told) -> str:
    """In what the prompts of two data sets differ; "" if they do not, or one set went through no chat template."""
    if not (first.chat_template and second.chat_template):
        return ""
    if first.system_prompt != second.system_prompt:
        prompts = ["none" if told.system_prompt is None else shown(told.system_prompt) for told in (first, second)]
        return f"the system prompts differ, {prompts[0]} and {prompts[1]}"
    if first.day is not None and second.day is not None and first.day != second.day:
        return f"the chat template was told different dates, {first.date} and {second.date}"
    return ""


def check_no_row_twice(importances: Sequence[Addable]) -> None:
    """Raise InputError if two importances have a row in common, which would count twice."""
    for number, one in enumerate(importances):
        for other in importances[:number]:
            common = (one.rows.counts & other.rows.counts).total()
            if common:
                raise InputError(
                    f"{one.path}: {common} of its {one.rows.count} rows are among those of {other.path} and would "
                    "count twice; leave them out of one of the data files and estimate that again"
                )


def check_all_in(part: Addable, whole: RowDigests, where: Path) -> None:
    """Raise InputError unless all rows of ``part`` are in ``whole``, the rows of ``where``, each as often."""
    absent = (part.rows - whole).count
    if absent:
        raise InputError(
            f"{part.path}: {absent} of its {part.rows.count} rows are not among those of {where}, so they cannot be "
            "taken out of it; they are other rows or were removed before, or the prompts, the tokenizer or the length "
            "limit differ"
        )
