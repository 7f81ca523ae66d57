"""``precondition``: everything is checked before the model is loaded."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from perta_fast.checkpoints.adapters import Adapter, is_adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.companions import PRECONDITIONING, TUNING
from perta_fast.checkpoints.quantised import open_plain
from perta_fast.data.chat import ChatSettings
from perta_fast.data.formats import data_files
from perta_fast.data.forms import Fields, check_fields, read_as
from perta_fast.data.rows import Row, read_data
from perta_fast.data.samples import Sample, row_count, truncated_count
from perta_fast.errors import InputError
from perta_fast.files.apart import check_name
from perta_fast.files.durable import remove
from perta_fast.files.hub import local_data, local_model
from perta_fast.files.new_directory import OutputDirectory, check_space
from perta_fast.files.reading import exists
from perta_fast.memory import PeakMemory, return_freed_blocks
from perta_fast.models.loading import Subject, check_sizes, choose_device, load_subject, samples_and_told
from perta_fast.preconditioning.input_moments import PHASE, input_moments
from perta_fast.preconditioning.record import Preconditioning
from perta_fast.preconditioning.solve import preconditioned
from perta_fast.preconditioning.vectors import FullVector, LowRankVector, TaskVector, check_low_rank
from perta_fast.progress import Bar, Progress
from perta_fast.records.report import Scalar, data_record
from perta_fast.records.versions import installed_versions, now
from perta_fast.rules import DEFAULT_MU, check_mu
from perta_fast.runs.estimate import open_skeleton
from perta_fast.streaming.forecast.choice import schedule_for
from perta_fast.streaming.forecast.costs import Load
from perta_fast.streaming.forecast.preconditioning_costs import PreconditioningEstimate
from perta_fast.streaming.layer_vector import LayerVector
from perta_fast.streaming.linear_inputs import layer_moments
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.task_vector import check_task_vector
from perta_fast.tuning.adapter import linear_maps, share_left_out
from perta_fast.tuning.checkpoint import tuned_size


def precondition(
    base: str | Path,
    tuned: str | Path,
    retain: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    mu: float = DEFAULT_MU,
    fields: Fields | None = None,
    download: bool = False,
    batch_size: int = 8,
    max_length: int | None = None,
    system_prompt: str | None = None,
    date_string: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    stream: bool = False,
    memory: int | None = None,
    device_memory: int | None = None,
    overwrite: bool = False,
    progress: Progress = True,
) -> Preconditioning:
    """Make a θ_f whose task vector hardly touches what the retain data sends through the model.

    For every linear map but the output head, D = θ_f - θ_0 becomes D (I + mu A / a)⁻¹. A is the mean of x xᵀ over the
    inputs x of the map on all tokens of the retain data; a is its mean eigenvalue. All other parameters become those of
    ``base``. Subtract the result by rule ``tv``, with a larger strength. ``unlearn`` does both by rule
    ``preconditioned``.

    base: a checkpoint directory, θ_0. tuned: θ_f, a checkpoint, or a LoRA adapter of ``base``, of which only A changes.
    retain: a data file, as for ``unlearn``, as are fields and download. out: directory to make, of the same kind as
    ``tuned``, with the record that is returned; what was changed is float32, and a checkpoint all of it. model: the
    model whose inputs are seen; θ_full is best; None takes ``base``. mu: 0, which leaves the linear maps as they
    are, to 1e4. batch_size: samples, of one length, at a time. max_length: tokens that a sample is cut to, within the
    model's own limit. system_prompt, date_string: as for ``unlearn``. device: None takes CUDA if there is one. dtype:
    that the model runs in; None takes its own, or float32 for float16. stream: hold one decoder layer in memory at a
    time; the result has the same values. memory, device_memory: bytes that a streamed run may take, by smaller batches;
    None sets no limit. overwrite: replace ``out``.

    Memory: the model, and 4 d_in² bytes for each different input of its linear maps; then, if ``tuned`` is a
    checkpoint, two models in float32. With ``stream`` that of one layer, and the disk holds the hidden states of all
    tokens at two layers. Raises InputError for bad input, NotFiniteError if an input of a map is not
    finite, RunError if ``out`` cannot be written. Then, or after an interrupt, nothing is left behind.

    Source: SAGE (arXiv 2606.18309).
    """
    check_sizes(batch_size, max_length)
    check_mu(mu)
    check_fields(fields)
    choose_device(device)
    base, tuned, retain = local_model(base, download), local_model(tuned, download), local_data(retain, download)
    model = base if model is None else local_model(model, download)
    check_name(out)
    target = OutputDirectory(out, overwrite=overwrite, inputs=[base, tuned, model, *data_files(retain)])
    check_tuned(base, tuned)
    check_task_vector(Sources.open(base, base, tuned, common_rows=True))
    check_space(target.final, vector_size(base, tuned))
    chat = ChatSettings.of(system_prompt, date_string)
    rows, digest = read_data(retain, fields)
    making = Making(
        base=base,
        tuned=tuned,
        seen_at=model,
        retain=retain,
        mu=float(mu),
        batch_size=int(batch_size),
        max_length=None if max_length is None else int(max_length),
        chat=chat,
        device=device,
        dtype=dtype,
        progress=progress,
        stream=stream,
        memory=memory,
        device_memory=device_memory,
    )
    with target:
        record = making.run(rows, digest, target.path)
        target.commit()
    return record


def check_tuned(base: Path, tuned: Path) -> None:
    """Raise InputError unless ``tuned`` is of a kind that can be preconditioned, as far as its files tell."""
    if exists(tuned / PRECONDITIONING):
        raise InputError(
            f"{tuned}: is preconditioned already, as its {PRECONDITIONING} says; subtract it by rule tv, or give the "
            "θ_f that it was made of"
        )
    if is_adapter(tuned):
        check_low_rank(Adapter.open(tuned, base))


def vector_size(base: Path, tuned: Path) -> int:
    """Bytes on disk that a preconditioned θ_f takes, at most."""
    if is_adapter(tuned):
        return sum(max(4 * entry.count, entry.size) for entry in Adapter.open(tuned, base).checkpoint.tensors.values())
    return tuned_size(Checkpoint.open(base))


@dataclass(frozen=True)
class Making:
    """How a θ_f is preconditioned; see ``precondition``.

    seen_at: the model whose inputs are seen. allow_zero: whether a task vector of zero is made into another one.
    subtract: whether a result is made of it afterwards, by this many threads; a streamed run's estimate counts that.
    """

    base: Path
    tuned: Path
    seen_at: Path
    retain: str | Path
    mu: float
    batch_size: int
    max_length: int | None
    chat: ChatSettings
    device: str | torch.device | None
    dtype: torch.dtype | None
    progress: Progress
    stream: bool = False
    allow_zero: bool = False
    memory: int | None = None
    device_memory: int | None = None
    subtract: bool = False
    threads: int = 1

    def run(self, rows: Sequence[Row], digest: str, directory: Path) -> Preconditioning:
        """Write θ_f and its record into ``directory``. rows, digest: of the retain data."""
        started, clock = now(), time.perf_counter()
        with PeakMemory() as memory:
            subject, skeleton = self._load()
            samples, told = samples_and_told(subject, rows, self.max_length, self.chat, self.progress)
            missed, origin = share_left_out(subject.module, adapted=False), subject.origin
            device = subject.device if skeleton is None else skeleton.device
            maps, adapted = self._maps(subject.module)
            vector: TaskVector
            batch_size = self.batch_size
            if skeleton is None:
                moments = input_moments(subject.module, maps, samples, self.batch_size, self.progress)
                names = list(maps)
                del subject, maps  # theta_0 and theta_f may take its memory
                vector = adapted or FullVector(names, open_plain(self.base), self.tuned, device)
                self._change(vector, moments)
            else:
                vector = adapted or LayerVector(list(maps), open_plain(self.base), open_plain(self.tuned), directory)
                batch_size = self._schedule(skeleton, samples, directory).batch_size
                self._change_by_layer(vector, skeleton, maps, samples, batch_size, directory / "scratch")
            self._write(vector, directory)
        settings: dict[str, Scalar | None] = {"mu": self.mu, "batch_size": batch_size, "stream": self.stream}
        settings |= {"max_length": self.max_length, "device": str(device)}
        settings |= {"system_prompt": self.chat.system_prompt, "date": told.date}
        data = data_record(self.retain, digest, row_count(samples), truncated_count(samples), read_as(list(rows)))
        record = Preconditioning(
            base=str(self.base.resolve()),
            tuned=str(self.tuned.resolve()),
            seen_at=origin,
            retain=data,
            settings=settings,
            linear_maps=len(vector.names),
            kept=vector.norms.kept,
            warnings=_warnings(data["truncated"], missed),
            seconds=time.perf_counter() - clock,
            memory=memory.as_dict(),
            versions=installed_versions(),
            started=started,
            finished=now(),
        )
        record.save(directory)
        return record

    def _load(self) -> tuple[Subject, Skeleton | None]:
        """The model whose inputs are seen, or its structure and what reads it layer by layer."""
        widened = any(entry.dtype == "F16" for entry in open_plain(self.seen_at).tensors.values())
        dtype = self.dtype or (torch.float32 if widened else None)  # inputs may overflow in float16
        path = self.seen_at.resolve()
        skeleton = open_skeleton(path, self.device, dtype) if self.stream else None
        structure = None if skeleton is None else skeleton.model
        return load_subject(path, self.device, dtype, structure=structure), skeleton

    def _maps(self, module: nn.Module) -> tuple[dict[str, nn.Module], LowRankVector | None]:
        """The linear maps whose task vector is changed, by name; and that of an adapter."""
        maps = linear_maps(module, adapted=False)
        if not maps:
            raise InputError(f"{self.seen_at}: has no linear map whose inputs could be seen; take another rule")
        if not is_adapter(self.tuned):
            return maps, None
        adapted = LowRankVector.of(Adapter.open(self.tuned, self.base), module, maps, self.base)
        return {name: maps[name] for name in adapted.names}, adapted

    def _change(self, vector: TaskVector, moments: Mapping[str, Tensor]) -> None:
        for name, moment in moments.items():
            vector.change(name, partial(preconditioned, moment=moment, mu=self.mu))

    def _schedule(self, skeleton: Skeleton, samples: Sequence[Sample], directory: Path) -> Schedule:
        load = Load([[len(sample.input_ids) for sample in samples]], subtract=self.subtract)
        low_rank = is_adapter(self.tuned)
        if self.memory is not None:
            return_freed_blocks()
        return schedule_for(
            PreconditioningEstimate(skeleton, load, skeleton.device, low_rank=low_rank, threads=self.threads),
            self.batch_size,
            directory,
            self.memory,
            self.device_memory,
            skeleton.first_shard,
            self.progress is True,
        )

    def _change_by_layer(
        self,
        vector: TaskVector,
        skeleton: Skeleton,
        maps: Mapping[str, nn.Module],
        samples: Sequence[Sample],
        batch_size: int,
        scratch: Path,
    ) -> None:
        parts = len(skeleton.layers) + 1
        with Bar(parts * len(samples), PHASE, self.progress, "step") as bar:
            for moments in layer_moments(skeleton, maps, samples, batch_size, scratch, bar.update):
                self._change(vector, moments)
        remove(scratch)

    def _write(self, vector: TaskVector, directory: Path) -> None:
        if vector.norms.before == 0 and not self.allow_zero:
            raise InputError(
                f"{self.tuned}: its linear maps are those of {self.base}, so there is no task vector to precondition; "
                "take another rule"
            )
        vector.write(directory)
        (directory / TUNING).unlink(missing_ok=True)  # of a base that was tuned itself
        if exists(self.tuned / TUNING):
            shutil.copyfile(self.tuned / TUNING, directory / TUNING)


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
