"""The rows by which a run checks what it has forgotten and kept, and how they are measured."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.data.chat import ChatSettings
from perta_fast.data.formats import data_files
from perta_fast.data.given import IN_WORDS
from perta_fast.data.rows import Row, evenly_spread, read_data
from perta_fast.data.samples import IGNORED
from perta_fast.errors import InputError
from perta_fast.memory import available_bytes, format_size
from perta_fast.progress import Progress
from perta_fast.records.check import Measured
from perta_fast.records.report import Report
from perta_fast.runs.encoded_rows import EncodedRows

if TYPE_CHECKING:
    import torch

    from perta_fast.models.loading import Subject

ROWS = 24  # of each data set that are measured before and after
ROLES = ("forget", "retain")


@dataclass(frozen=True)
class Checkpoints:
    """What is loaded, and how."""

    model: Path
    base: Path
    tuned: Path
    common_rows: bool
    device: "str | torch.device | None"
    dtype: "torch.dtype | None"


@dataclass(frozen=True)
class Rows:
    """The rows to measure, by role, of so many. chat, max_length: how they become tokens. encoded: as they have."""

    by_role: Mapping[str, Sequence[Row]]
    totals: Mapping[str, int]
    chat: ChatSettings
    max_length: int | None
    batch_size: int
    progress: Progress
    encoded: EncodedRows = field(default_factory=EncodedRows)

    @classmethod
    def of(cls, data: Mapping[str, Sequence[Row]], **how: Any) -> "Rows":
        """Evenly spread rows of ``data``."""
        chosen = {role: [rows[k] for k in evenly_spread(len(rows), ROWS)] for role, rows in data.items()}
        return cls(chosen, {role: len(rows) for role, rows in data.items()}, **how)

    def measure(self, subject: "Subject", role: str, when: str, most: int | None = None) -> Measured:
        """Loss and exact answers of a loaded model on (the first ``most`` of) the rows of one role."""
        from perta_fast.models.loading import samples_and_told
        from perta_fast.models.token_scores import evaluation_mode, score_rows

        rows = self.by_role[role][:most]
        samples, told = samples_and_told(subject, rows, self.max_length, self.chat)
        if most is None:
            self.encoded.note(role, samples, told)
        with evaluation_mode(subject.module):
            scores = score_rows(
                subject.module,
                samples,
                batch_size=self.batch_size,
                hits=True,
                progress=self.progress,
                description=f"{when}, {role} data",
            )
        loss = -sum(float(score.log_probs.mean()) for score in scores) / len(scores)
        exact = sum(bool(score.hits.all()) for row, score in zip(rows, scores, strict=True) if has_answer(row))
        return Measured(loss if abs(loss) < float("inf") else None, exact)


def load_checked(path: Path, checkpoints: Checkpoints) -> "Subject":
    """Load a checkpoint as the run would. Raises InputError if the memory would not hold it."""
    from perta_fast.models.loading import load_subject

    size, available = Checkpoint.open(path).size, available_bytes()
    if available is not None and size > available:
        raise InputError(f"the model has {format_size(size)}, and only {format_size(available)} of the memory are free")
    return load_subject(path, checkpoints.device, checkpoints.dtype)


def read_again(report: Report, role: str, fields: Any) -> list[Row]:
    """The rows that a run has read. Raises InputError if the data is gone or has changed since."""
    record = report.data[role]
    if not record["path"]:
        raise InputError(f"the {role} data were {IN_WORDS}, which are not kept")
    gone = InputError(f"the {role} data {record['path']} is gone, or has changed since the run began")
    if not all(map(os.path.isfile, data_files(record["path"]))):  # a pipe would be waited for
        raise gone
    rows, digest = read_data(record["path"], fields)
    if digest != record["blake3"]:
        raise gone
    return rows


def has_answer(row: Row) -> bool:
    """Whether something of the row carries no loss: what is answered to."""
    if row.is_tokenised:
        return any(IGNORED in sample.labels for sample in row.content["samples"])
    return "text" not in row.content
