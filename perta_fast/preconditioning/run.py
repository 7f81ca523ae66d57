"""``precondition`` and its record; everything is checked before the model is loaded."""

import math
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from perta_fast.checkpoints.adapters import Adapter, is_adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.companions import PRECONDITIONING, TUNING
from perta_fast.checkpoints.quantised import open_plain
from perta_fast.data.chat import ChatSettings
from perta_fast.data.formats import data_files
from perta_fast.data.forms import Fields, check_fields, read_as
from perta_fast.data.rows import read_data
from perta_fast.data.samples import row_count, truncated_count
from perta_fast.errors import InputError, printable_lines
from perta_fast.files.apart import check_name
from perta_fast.files.hub import local_data, local_model
from perta_fast.files.new_directory import OutputDirectory, check_space
from perta_fast.files.reading import exists
from perta_fast.memory import PeakMemory
from perta_fast.models.loading import Subject, check_sizes, choose_device, load_subject, samples_and_told
from perta_fast.preconditioning.input_moments import input_moments
from perta_fast.preconditioning.solve import preconditioned
from perta_fast.preconditioning.vectors import FullVector, LowRankVector, TaskVector
from perta_fast.progress import Progress
from perta_fast.records.report import DataRecord, Scalar, data_record, read_as_lines
from perta_fast.records.typed_json import write_readable_json
from perta_fast.records.versions import installed_versions, now
from perta_fast.rules import DEFAULT_MU
from perta_fast.tuning.adapter import linear_maps, share_left_out
from perta_fast.tuning.checkpoint import tuned_size

FILE_NAME = PRECONDITIONING


@dataclass(frozen=True)
class Preconditioning:
    """The record of one preconditioning.

    base, tuned: absolute paths. retain: the data whose inputs were seen. kept: the norm of the task vector of all
    linear maps after, as a share of that before. linear_maps: how many were changed. memory: peaks in bytes.
    seconds: with loading.
    """

    base: str
    tuned: str
    retain: DataRecord
    settings: dict[str, Scalar | None]
    linear_maps: int
    kept: float
    warnings: list[str]
    seconds: float
    memory: dict[str, int]
    versions: dict[str, str]
    started: str
    finished: str

    def save(self, directory: Path) -> None:
        """Write ``perta_precondition.json`` into ``directory``."""
        write_readable_json(directory / FILE_NAME, asdict(self))

    def summary(self) -> str:
        """A few lines for a person."""
        lines = [
            f"{self.linear_maps} linear maps: {self.kept:.1%} of the norm of their task vector is left, "
            f"by the inputs of {self.retain['samples']} samples and mu {self.settings['mu']:g}, {self.seconds:.1f} s",
            "all other parameters are those of the base",
        ]
        lines += read_as_lines({"retain": self.retain})
        return printable_lines(lines + [f"warning: {warning}" for warning in self.warnings])


def precondition(
    base: str | Path,
    tuned: str | Path,
    retain: str | Path,
    out: str | Path,
    *,
    mu: float = DEFAULT_MU,
    fields: Fields | None = None,
    download: bool = False,
    batch_size: int = 8,
    max_length: int | None = None,
    system_prompt: str | None = None,
    date_string: str | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    progress: Progress = True,
) -> Preconditioning:
    """Make a θ_f whose task vector hardly touches what the retain data sends through the model.

    For every linear map but the output head, D = θ_f - θ_0 becomes D (I + mu A / a)⁻¹. A is the mean of x xᵀ over the
    inputs x of the map, at θ_0, on all tokens of the retain data; a is its mean eigenvalue. All other parameters become
    those of ``base``. Subtract the result by rule ``tv``, with a larger strength.

    base: a checkpoint directory, θ_0. tuned: θ_f, a checkpoint, or a LoRA adapter of ``base``, of which only A changes.
    retain: a data file, as for ``unlearn``, as are fields and download. out: directory to make, of the same kind as
    ``tuned``, with the record that is returned; what was changed is float32, and a checkpoint all of it. mu: at least
    0, which leaves the linear maps as they are. batch_size: samples, of one length, at a time. max_length: tokens that
    a sample is cut to, within the model's own limit. system_prompt, date_string: as for ``unlearn``. device: None takes
    CUDA if there is one. overwrite: replace ``out``.

    Memory: the model, in float32 if it is float16, and in float32 twice if ``tuned`` is a checkpoint; and 4 d_in² bytes
    for each different input of its linear maps. Raises InputError for bad input, NotFiniteError if an input of a map is
    not finite, RunError if ``out`` cannot be written. Then, or after an interrupt, nothing is left behind.

    Source: SAGE (arXiv 2606.18309).
    """
    check_sizes(batch_size, max_length)
    if not (math.isfinite(mu) and mu >= 0):
        raise InputError(f"mu is {mu}; it must be finite and at least 0")
    check_fields(fields)
    chosen = choose_device(device)
    base, tuned, retain = local_model(base, download), local_model(tuned, download), local_data(retain, download)
    check_name(out)
    target = OutputDirectory(out, overwrite=overwrite, inputs=[base, tuned, *data_files(retain)])
    started, clock = now(), time.perf_counter()
    chat = ChatSettings.of(system_prompt, date_string)
    rows, digest = read_data(retain, fields)
    checkpoint = open_plain(base)
    adapter = Adapter.open(tuned, base) if is_adapter(tuned) else None
    if adapter is None:
        open_plain(tuned)
        check_space(target.final, tuned_size(checkpoint))
    with PeakMemory() as memory, target:
        # A checkpoint is made of it, and inputs may overflow in float16.
        widened = adapter is None or any(entry.dtype == "F16" for entry in checkpoint.tensors.values())
        subject = load_subject(base.resolve(), chosen, torch.float32 if widened else None)
        samples, told = samples_and_told(subject, rows, max_length, chat, progress)
        vector = _vector(subject, checkpoint, tuned, adapter)
        moments = input_moments(subject.module, vector.maps, samples, batch_size, progress)
        norms = vector.write(target.path, partial(_changed, moments, mu))
        if norms.before == 0:
            raise InputError(f"{tuned}: its linear maps are those of {base}: there is no task vector to precondition")
        (target.path / TUNING).unlink(missing_ok=True)  # of a base that was tuned itself
        if exists(tuned / TUNING):
            shutil.copyfile(tuned / TUNING, target.path / TUNING)
        missed = share_left_out(subject.module)
        settings: dict[str, Scalar | None] = {"mu": mu, "batch_size": batch_size, "max_length": max_length}
        settings |= {"device": str(subject.device), "system_prompt": system_prompt, "date": told.date}
        data = data_record(retain, digest, row_count(samples), truncated_count(samples), read_as(rows))
        record = Preconditioning(
            base=subject.origin,
            tuned=str(tuned.resolve()),
            retain=data,
            settings=settings,
            linear_maps=len(vector.maps),
            kept=norms.kept,
            warnings=_warnings(data["truncated"], missed),
            seconds=time.perf_counter() - clock,
            memory=memory.as_dict(),
            versions=installed_versions(),
            started=started,
            finished=now(),
        )
        record.save(target.path)
        target.commit()
    return record


def _vector(subject: Subject, base: Checkpoint, tuned: Path, adapter: Adapter | None) -> TaskVector:
    maps = linear_maps(subject.module)
    if not maps:
        raise InputError(f"{base.path}: has no linear map whose inputs could be seen")
    if adapter is None:
        return FullVector(subject.module, maps, base, tuned)
    return LowRankVector.of(adapter, subject.module, maps, base.path)


def _changed(moments: dict[str, Tensor], mu: float, name: str, direction: Tensor) -> Tensor:
    return preconditioned(direction, moments[name], mu)


def _warnings(truncated: int, missed: float) -> list[str]:
    texts = []
    if truncated:
        texts.append(f"{truncated} samples were cut to the length limit")
    if missed:
        texts.append(
            f"{missed:.0%} of the parameters lie in joined experts and the like, whose inputs cannot be seen; there "
            "the task vector is left out"
        )
    return texts
