"""Unlearning in one walk: each part of the model is weighed, subtracted and written once its means are there.

What the walk needs to go on lies below the directory that is being built: the samples, the spill, and after
each step a record of how far it has come. Everything that a record names was flushed before it.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch

from perta_fast.accounts import add_up, describe_tensors
from perta_fast.agreement import importance_key
from perta_fast.data import Sample
from perta_fast.dtypes import ITEM_SIZES
from perta_fast.durable import drop_pages, read_record, remove, sync_directory, write_fully, write_record
from perta_fast.errors import InputError
from perta_fast.importance.gradients import check_finite
from perta_fast.job import Job
from perta_fast.output import OutputDirectory, check_space
from perta_fast.progress import sample_bar
from perta_fast.report import Report, fits
from perta_fast.sources import Sources
from perta_fast.streaming.data_pass import DataPass, Means, PassState
from perta_fast.streaming.keeping import Keeping
from perta_fast.streaming.passage import Passage
from perta_fast.streaming.schedule import Schedule
from perta_fast.streaming.skeleton import Skeleton
from perta_fast.streaming.spill import Settled
from perta_fast.streaming.walk import Walk, handlings
from perta_fast.subtraction import Chunk, Statistics, chunks_of
from perta_fast.to_directory import STATE, WALK

ROLES = ("forget", "retain")
_SAMPLES = "samples.json"
_SCRATCH = "scratch"


class StreamSettings(TypedDict):
    """What a run needs to walk again. metadata: of each importance, by role. save: where both go, or ""."""

    subject: str
    device: str
    dtype: str
    schedule: dict[str, Any]
    torch_threads: int
    metadata: dict[str, dict[str, str]]
    save: str
    overwrite_saved: bool


class _WalkState(TypedDict):
    """How far a walk has come: steps done, each data set's spill, what the written tensors add up to."""

    done: int
    passes: dict[str, PassState]
    totals: dict[str, Statistics]


class StreamedRun:
    """Fills the directory of a run; see ``fill``."""

    def __init__(
        self, skeleton: Skeleton, samples: Mapping[str, Sequence[Sample]], settings: StreamSettings
    ) -> None:
        self.settings = settings
        self._skeleton, self._samples = skeleton, samples

    @classmethod
    def reopened(cls, job: Job) -> "StreamedRun":
        """The run that ``job`` describes. Raises InputError if what it left is damaged."""
        if not fits(job.stream, StreamSettings):
            raise InputError(f"{job.final}: the run's description is damaged")
        settings: StreamSettings = job.stream  # type: ignore[assignment]
        rows = read_record(OutputDirectory(job.final, overwrite=True).path / STATE / _SAMPLES)
        samples = {
            role: [Sample(tuple(ids), tuple(labels), truncated) for ids, labels, truncated in rows[role]]
            for role in ROLES
        }
        device, dtype = torch.device(settings["device"]), getattr(torch, settings["dtype"])
        return cls(Skeleton.open(Path(settings["subject"]), device, dtype), samples, settings)

    def cover(self, sources: Sources) -> Sources:
        """``sources`` with what no importance reaches marked to be copied."""
        plans = []
        for plan in sources.plans:
            covered = importance_key(plan.theta.name, sources.model, self._skeleton.stored_shapes)
            if plan.copied is None and covered is None:
                plan = replace(plan, base=None, tuned=None, copied="not covered by the importance")
            plans.append(plan)
        metadata = {f"{role}_importance": dict(table) for role, table in self.settings["metadata"].items()}
        return replace(sources, plans=plans, metadata=metadata)

    def fill(self, job: Job, sources: Sources, target: OutputDirectory, report: Report) -> Sources:
        """Walk through the model and write its shards, from wherever an earlier attempt came to.

        Returns the sources with the importances, where they are kept. Raises RunError if a loss, a mean or a
        result is not finite, the disk is full, or a file changes; InputError if what is to be taken up again is
        damaged.
        """
        state, schedule = target.path / STATE, Schedule(**self.settings["schedule"])
        if not (state / _SAMPLES).exists():
            write_record(
                state / _SAMPLES,
                {
                    role: [(each.input_ids, each.labels, each.truncated) for each in samples]
                    for role, samples in self._samples.items()
                },
            )
        begun = _read_state(state / WALK)
        total = sum(map(len, self._samples.values())) * handlings(len(self._skeleton.layers), schedule)
        estimator = job.choice.estimator
        assert estimator is not None
        started = time.perf_counter()
        with (
            _torch_threads(self.settings["torch_threads"]),
            sample_bar(total, "unlearn", job.progress) as bar,
            ExitStack() as stack,
        ):
            skeleton = self._skeleton
            passage = Passage(skeleton.model, skeleton.layers, str(skeleton.checkpoint.path))
            passes = {
                role: DataPass(
                    skeleton, passage, samples, estimator, schedule, state / _SCRATCH / role, bar.update
                )
                for role, samples in self._samples.items()
            }
            walk = Walk(skeleton, passage, list(passes.values()), schedule)
            settings = self.settings
            keeping = stack.enter_context(
                Keeping(
                    settings["save"],
                    settings["overwrite_saved"],
                    settings["metadata"],
                    skeleton.stored_shapes,
                    begun is not None,
                )
            )
            writing = stack.enter_context(_Writing(job, sources, target, skeleton, passes, keeping, schedule))
            if begun is None:
                check_space(target.path, sum(each.scratch_bytes for each in passes.values()))
            elif begun["done"] < len(walk.steps):
                for role, each in passes.items():
                    each.restore(begun["passes"][role])
            if begun is not None:
                writing.totals = {int(index): sums for index, sums in begun["totals"].items()}
                bar.update(total * begun["done"] // len(walk.steps))
            if begun is None or begun["done"] < len(walk.steps):
                walk.run(writing.settle, 0 if begun is None else begun["done"])
            writing.finish()
            kept = keeping.commit()
        remove(state / _SCRATCH)
        for role, each in passes.items():
            report.importance[f"{role}_importance"]["one_by_one"] = ", ".join(each.one_by_one)
        describe_tensors(report, sources.plans, writing.totals)
        _describe_time(report, walk, writing, time.perf_counter() - started)
        return replace(
            sources,
            forget_importance=kept.get("forget_importance"),
            retain_importance=kept.get("retain_importance"),
        )


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Torch takes its sums apart by thread: as many as when the run began, for the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_state(path: Path) -> _WalkState | None:
    if not path.exists():
        return None
    state = read_record(path)
    if not fits(state, _WalkState) or not set(ROLES) <= state["passes"].keys():
        raise InputError(f"{path}: is not the record of a walk")
    found: _WalkState = state
    return found


def _describe_time(report: Report, walk: Walk, writing: "_Writing", seconds: float) -> None:
    report.add_phase("walk", seconds, writing.bytes_moved)
    report.overlap = {
        "compute_seconds": seconds - walk.waited_seconds - writing.waited_seconds,
        "read_seconds": walk.read_seconds,
        "read_hidden_seconds": max(0.0, walk.read_seconds - walk.waited_seconds),
        "write_seconds": writing.seconds,
        "write_hidden_seconds": max(0.0, writing.seconds - writing.waited_seconds),
    }


class _Writing:
    """Subtracts and writes what a step has made complete, while the walk goes on, then records the step."""

    def __init__(
        self,
        job: Job,
        sources: Sources,
        target: OutputDirectory,
        skeleton: Skeleton,
        passes: Mapping[str, DataPass],
        keeping: Keeping,
        schedule: Schedule,
    ) -> None:
        self._job, self._sources, self._target, self._skeleton = job, sources, target, skeleton
        self._passes, self._keeping, self._overlap = passes, keeping, schedule.overlap
        self._plans_of: dict[str, list[int]] = {}  # by the importance that they take
        for index, plan in enumerate(sources.plans):
            key = importance_key(plan.theta.name, sources.model, skeleton.stored_shapes)
            if plan.copied is None and key is not None:
                self._plans_of.setdefault(key, []).append(index)
        self._behind = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._lock = threading.Lock()
        self._shards: dict[str, int] = {}
        self.totals: dict[int, Statistics] = {}
        self.seconds = self.waited_seconds = 0.0
        self.bytes_moved = 0

    def __enter__(self) -> "_Writing":
        for name, file in self._sources.model.shards.items():
            descriptor = os.open(self._target.path / name, os.O_RDWR | os.O_CREAT, 0o666)
            self._shards[name] = descriptor
            write_fully(descriptor, memoryview(file.header), 0)
            os.ftruncate(descriptor, file.size)
        return self

    def __exit__(self, *_: object) -> None:
        self._behind.shutdown()
        for descriptor in self._shards.values():
            os.close(descriptor)

    def settle(self, done: int, means: list[Means]) -> None:
        """Take over what a step has left, once the one before it is recorded."""
        ends = {role: each.settle() for role, each in self._passes.items()}
        self._wait()
        if self._overlap:
            self._pending = self._behind.submit(self._complete, done, means, ends)
        else:
            started = time.perf_counter()
            self._complete(done, means, ends)
            self.waited_seconds += time.perf_counter() - started

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            started = time.perf_counter()
            pending.result()
            self.waited_seconds += time.perf_counter() - started

    def _complete(self, done: int, means: list[Means], ends: Mapping[str, tuple[PassState, Settled]]) -> None:
        started = time.perf_counter()
        if any(means):
            stored = dict(zip(self._passes, map(self._stored, means), strict=True))
            one_by_one = {role: ", ".join(each.one_by_one) for role, each in self._passes.items()}
            self._keeping.write(stored, one_by_one)
            self._subtract(self._held(stored))
        for _, settled in ends.values():
            settled.flush()
        passes = {role: state for role, (state, _) in ends.items()}
        totals = {str(index): sums for index, sums in self.totals.items()}
        write_record(self._target.path / STATE / WALK, {"done": done, "passes": passes, "totals": totals})
        self._target.keep = True
        self._keeping.stay()
        for _, settled in ends.values():
            settled.clear()
        self.seconds += time.perf_counter() - started

    def _stored(self, means: Means) -> dict[str, torch.Tensor]:
        stored = self._skeleton.as_stored(means)
        for name, mean in stored.items():
            check_finite(name, mean)
        return stored

    def _held(self, stored: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[int, list[Any]]:
        """Means as flat arrays, one for each data set, by the number of the plan that takes them."""
        held = {}
        for name in next(iter(stored.values())):
            arrays = [each[name].cpu().contiguous().view(-1).numpy() for each in stored.values()]
            held.update(dict.fromkeys(self._plans_of.get(name, []), arrays))
        return held

    def _subtract(self, held: Mapping[int, list[Any]]) -> None:
        sources = self._sources
        for index in held:
            self.totals.pop(index, None)
        plans = [(index, sources.plans[index]) for index in sorted(held)]
        subtraction = replace(self._job.subtraction(sources), held=held)
        subtraction.run(chunks_of(plans, self._job.chunk), self._store, self._count)
        for name in sorted({plan.theta.path.name for _, plan in plans}):
            os.fsync(self._shards[name])
            if self._job.drop_cache:
                drop_pages(self._shards[name])

    def _store(self, chunk: Chunk, data: memoryview, statistics: Statistics) -> None:
        theta = self._sources.plans[chunk.index].theta
        offset = theta.begin + chunk.begin * ITEM_SIZES[theta.dtype]
        write_fully(self._shards[theta.path.name], data, offset)
        if statistics:
            with self._lock:
                add_up(self.totals, chunk.index, statistics)

    def _count(self, moved: int) -> None:
        self.bytes_moved += moved

    def finish(self) -> None:
        """Wait for the last step, and write what no importance reaches."""
        self._wait()
        copied = [index for index, plan in enumerate(self._sources.plans) if plan.copied is not None]
        self._subtract({index: [] for index in copied})
        sync_directory(self._target.path)
