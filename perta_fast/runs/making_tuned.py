"""A preconditioned θ_f, written to disk: the inputs seen, the task vector changed, the record made."""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from perta_fast.checkpoints.adapters import Adapter, is_adapter
from perta_fast.checkpoints.companions import TUNING
from perta_fast.checkpoints.quantised import open_plain
from perta_fast.data.chat import ChatSettings, parse_date
from perta_fast.data.forms import Fields, fields_text, read_as
from perta_fast.data.given_data import Source
from perta_fast.data.rows import Row
from perta_fast.data.samples import Sample, row_count, truncated_count
from perta_fast.dtypes import torch_dtype, torch_name
from perta_fast.errors import InputError
from perta_fast.files.new_directory import START_OVER
from perta_fast.files.reading import exists
from perta_fast.memory import PeakMemory, return_freed_blocks
from perta_fast.models.loading import Subject, load_subject, samples_and_told
from perta_fast.preconditioning.input_moments import input_moments
from perta_fast.preconditioning.record import Preconditioning
from perta_fast.preconditioning.solve import preconditioned
from perta_fast.preconditioning.unfinished import Begun, Work
from perta_fast.preconditioning.vectors import FullVector, LowRankVector, TaskVector
from perta_fast.progress import Progress
from perta_fast.records.report import DataRecord, Scalar, data_record, truncation_warnings
from perta_fast.records.versions import installed_versions, now
from perta_fast.runs.estimate import open_skeleton
from perta_fast.streaming.forecast.choice import Budget, choose_schedule, schedule_for
from perta_fast.streaming.forecast.costs import Load
from perta_fast.streaming.forecast.preconditioning_costs import PreconditioningEstimate
from perta_fast.streaming.kept_walk import KeptWalk, LayeredVector, LayerWalk
from perta_fast.streaming.layer_vector import LayerVector
from perta_fast.streaming.low_rank_layers import LowRankLayers
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule
from perta_fast.subtraction.inputs import Sources
from perta_fast.tuning.adapter import linear_maps, share_left_out


@dataclass(frozen=True)
class Making:
    """How a θ_f is preconditioned; see ``precondition``.

    seen_at: the model whose inputs are seen. allow_zero: whether a task vector of zero is made into another one.
    subtract: whether a result is made of it afterwards, by this many threads; a streamed run's estimate counts that.
    """

    base: Path
    tuned: Path
    seen_at: Path
    retain: str | Source
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

    def work(self, mu: float, digest: str, fields: Fields | None, sources: Sources) -> Work:
        """By what a streamed run for one mu is known again. digest: of the retain data; sources: with θ_0 and θ_f."""
        settings = {
            "‹base›": str(self.base.resolve()),
            "‹tuned›": str(self.tuned.resolve()),
            "the model whose inputs are seen": str(self.seen_at.resolve()),
            "‹retain›": digest,
            "‹fields›": None if fields is None else fields_text(fields),
            "‹mu›": mu,
            "‹batch_size›": self.batch_size,
            "‹max_length›": self.max_length,
            "‹system_prompt›": self.chat.system_prompt,
            "‹date_string›": self.chat.date_string,
            "‹device›": None if self.device is None else str(self.device),
            "‹dtype›": None if self.dtype is None else torch_name(self.dtype),
        }
        config = sources.adapter_config
        checkpoints = [sources.base, sources.tuned, open_plain(self.seen_at)]
        return Work.of(settings, checkpoints, [] if config is None else [config])

    def going_on(self, begun: Begun | None) -> "Making":
        """With what the bits depend on as a stopped run has begun."""
        if begun is None:
            return self
        chat = replace(self.chat, day=parse_date(begun.day))
        return replace(self, chat=chat, device=begun.device, dtype=torch_dtype(begun.dtype))

    def run(
        self, rows: Sequence[Row], digest: str, directories: Mapping[float, Path], kept: KeptWalk | None = None
    ) -> dict[float, Preconditioning]:
        """Write θ_f and its record into the directory of each mu; one pass over the retain data serves all.

        rows, digest: of the retain data. kept: of a streamed run, which takes one mu.
        """
        started, clock, earlier = now(), time.perf_counter(), 0.0  # earlier: seconds of attempts that were stopped
        written: dict[float, tuple[int, float]] = {}  # maps, and what is kept of the norm
        if self.memory is not None:
            return_freed_blocks()
        with PeakMemory() as memory:
            subject, skeleton = self._load()
            samples, told = samples_and_told(subject, rows, self.max_length, self.chat, self.progress)
            missed, origin = share_left_out(subject.module, adapted=False), subject.origin
            device = subject.device if skeleton is None else skeleton.device
            maps, adapted = self._maps(subject.module)
            batch_size = self.batch_size
            if skeleton is None:
                moments = input_moments(subject.module, maps, samples, self.batch_size, self.progress)
                names = list(maps)
                del subject, maps  # theta_0 and theta_f may take its memory
                for mu, directory in directories.items():
                    written[mu] = self._make(names, adapted, device, moments, mu, directory)
            else:
                assert kept is not None
                ((mu, directory),) = directories.items()
                if kept.begun is not None:
                    self._check_limits(skeleton, samples, kept.begun.batch_size)
                begun = kept.begun or self._begin(kept, skeleton, samples, directory, started)
                batch_size, started, earlier = begun.batch_size, begun.started, begun.seconds
                walk = LayerWalk(skeleton, maps, samples, mu, kept, directory, self.progress)
                vector = self._layered(list(maps), adapted, directory)
                walk.change(vector, begun, clock)
                written[mu] = self._write(vector, directory)
        settings: dict[str, Scalar | None] = {"batch_size": batch_size, "stream": self.stream}
        settings |= {"max_length": self.max_length, "device": str(device)}
        settings |= {"system_prompt": self.chat.system_prompt, "date": told.date}
        data = data_record(self.retain, digest, row_count(samples), truncated_count(samples), read_as(list(rows)))
        records = {}
        for mu, (count, share) in written.items():
            records[mu] = Preconditioning(
                base=str(self.base.resolve()),
                tuned=str(self.tuned.resolve()),
                seen_at=origin,
                retain=data,
                settings={"mu": mu, **settings},
                linear_maps=count,
                kept=share,
                warnings=_warnings(data, missed),
                seconds=earlier + time.perf_counter() - clock,
                memory=memory.as_dict(),
                versions=installed_versions(),
                started=started,
                finished=now(),
            )
            records[mu].save(directories[mu])
        return records

    def _load(self) -> tuple[Subject, Skeleton | None]:
        """The model whose inputs are seen, or its structure and what reads it layer by layer."""
        widened = any(entry.dtype == "F16" for entry in open_plain(self.seen_at).tensors.values())
        dtype = self.dtype or (torch.float32 if widened else None)  # inputs may overflow in float16
        path = self.seen_at.resolve()
        skeleton = open_skeleton(path, self.device, dtype) if self.stream else None
        structure = None if skeleton is None else skeleton.model
        return load_subject(path, self.device, dtype, structure=structure, progress=self.progress), skeleton

    def _maps(self, module: nn.Module) -> tuple[dict[str, nn.Module], LowRankVector | None]:
        """The linear maps whose task vector is changed, by name; and that of an adapter."""
        maps = linear_maps(module, adapted=False)
        if not maps:
            raise InputError(f"{self.seen_at}: has no linear map whose inputs could be seen; take another rule")
        if not is_adapter(self.tuned):
            return maps, None
        adapted = LowRankVector.of(Adapter.open(self.tuned, self.base), module, maps, self.base)
        return {name: maps[name] for name in adapted.names}, adapted

    def _make(
        self,
        names: Sequence[str],
        adapted: LowRankVector | None,
        device: torch.device,
        moments: Mapping[str, Tensor],
        mu: float,
        directory: Path,
    ) -> tuple[int, float]:
        """Write θ_f of one mu; as ``_write``. What it holds is free afterwards."""
        vector = self._full(names, device) if adapted is None else adapted.anew()
        _change(vector, moments, mu)
        return self._write(vector, directory)

    def _full(self, names: Sequence[str], device: torch.device) -> FullVector:
        return FullVector(names, open_plain(self.base), self.tuned, device, self.progress)

    def _estimate(self, skeleton: Skeleton, samples: Sequence[Sample]) -> PreconditioningEstimate:
        load = Load([[len(sample.input_ids) for sample in samples]], subtract=self.subtract)
        low_rank = is_adapter(self.tuned)
        return PreconditioningEstimate(skeleton, load, skeleton.device, low_rank=low_rank, threads=self.threads)

    def _check_limits(self, skeleton: Skeleton, samples: Sequence[Sample], batch_size: int) -> None:
        """Raise InputError if batches of this size, in which a stopped walk goes on, do not keep the limits."""
        if self.memory is None and self.device_memory is None:
            return
        budget = Budget(sys.maxsize, self.memory, self.device_memory)
        fitting = choose_schedule(self._estimate(skeleton, samples), batch_size, budget).schedule.batch_size
        if fitting < batch_size:
            raise InputError(
                f"a walk that goes on keeps its batches of {batch_size}, and only {fitting} fit into ‹memory› and "
                f"‹device_memory›; allow more, or {START_OVER}"
            )

    def _schedule(self, skeleton: Skeleton, samples: Sequence[Sample], directory: Path) -> Schedule:
        return schedule_for(
            self._estimate(skeleton, samples),
            self.batch_size,
            directory,
            self.memory,
            self.device_memory,
            skeleton.first_shard,
            self.progress is True,
        )

    def _layered(self, names: Sequence[str], adapted: LowRankVector | None, directory: Path) -> LayeredVector:
        if adapted is not None:
            return LowRankLayers(adapted)
        return LayerVector(names, open_plain(self.base), open_plain(self.tuned), directory)

    def _begin(
        self, kept: KeptWalk, skeleton: Skeleton, samples: Sequence[Sample], directory: Path, started: str
    ) -> Begun:
        """A walk from the first layer on."""
        assert self.chat.day is not None
        return Begun(
            settings=kept.work.settings,
            inputs=kept.work.inputs,
            versions=kept.work.versions,
            started=started,
            day=self.chat.day.isoformat(),
            overwrite=kept.overwrite,
            device=str(skeleton.device),
            dtype=torch_name(skeleton.model.dtype),
            batch_size=self._schedule(skeleton, samples, directory).batch_size,
            torch_threads=torch.get_num_threads(),
        )

    def _write(self, vector: TaskVector, directory: Path) -> tuple[int, float]:
        """Write θ_f; returns how many maps it has, and how much of the norm of the task vector is kept."""
        if vector.norms.before == 0 and not self.allow_zero:
            raise InputError(
                f"{self.tuned}: its linear maps are those of {self.base}, so there is no task vector to precondition; "
                "take another rule"
            )
        vector.write(directory)
        (directory / TUNING).unlink(missing_ok=True)  # of a base that was tuned itself
        if exists(self.tuned / TUNING):
            shutil.copyfile(self.tuned / TUNING, directory / TUNING)
        return len(vector.names), vector.norms.kept


def _change(vector: TaskVector, moments: Mapping[str, Tensor], mu: float) -> None:
    for name, moment in moments.items():
        vector.change(name, partial(preconditioned, moment=moment, mu=mu))


def _warnings(data: DataRecord, missed: float) -> list[str]:
    texts = truncation_warnings({"retain": data})
    if missed:
        texts.append(
            f"{missed:.0%} of the parameters lie in joined experts and the like, whose inputs cannot be seen; there "
            "the task vector is left out"
        )
    return texts
