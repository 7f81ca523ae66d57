"""What a streamed run does behind the walk: subtract, write, and record how far it has come."""

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypedDict

from torch import Tensor

from perta_fast.accounts import add_up
from perta_fast.agreement import importance_key
from perta_fast.dtypes import ITEM_SIZES
from perta_fast.durable import drop_pages, read_record, sync_directory, write_fully, write_record
from perta_fast.errors import InputError
from perta_fast.importance.gradients import check_finite
from perta_fast.job import Job
from perta_fast.output import OutputDirectory
from perta_fast.report import fits
from perta_fast.sources import Sources
from perta_fast.streaming.data_pass import DataPass, Means, PassState
from perta_fast.streaming.keeping import Keeping
from perta_fast.streaming.skeleton import Skeleton
from perta_fast.streaming.spill import Settled
from perta_fast.subtraction import Chunk, Statistics, chunks_of
from perta_fast.to_directory import STATE, WALK


class WalkState(TypedDict):
    """How far a walk has come: steps done, each data set's spill, what the written tensors add up to."""

    done: int
    passes: dict[str, PassState]
    totals: dict[str, Statistics]


def read_state(target: OutputDirectory, steps: int, tensors: int) -> WalkState | None:
    """The last record in a directory that is being built, of a walk of ``steps`` over ``tensors``.

    Raises InputError if it is damaged.
    """
    path = target.path / STATE / WALK
    if not path.exists():
        return None
    state = read_record(path)
    indices = {str(index) for index in range(tensors)}
    if not fits(state, WalkState) or not 0 <= state["done"] <= steps or not state["totals"].keys() <= indices:
        raise InputError(f"{path}: is not the record of a walk")
    found: WalkState = state
    return found


class Writing:
    """Subtracts and writes what a step has made complete, while the walk goes on, then records the step."""

    def __init__(
        self,
        job: Job,
        sources: Sources,
        target: OutputDirectory,
        skeleton: Skeleton,
        passes: Mapping[str, DataPass],
        keeping: Keeping,
        overlap: bool,
    ) -> None:
        self._job, self._sources, self._target, self._skeleton = job, sources, target, skeleton
        self._passes, self._keeping, self._overlap = passes, keeping, overlap
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

    def __enter__(self) -> "Writing":
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

    def _stored(self, means: Means) -> dict[str, Tensor]:
        stored = self._skeleton.as_stored(means)
        for name, mean in stored.items():
            check_finite(name, mean)
        return stored

    def _held(self, stored: Mapping[str, Mapping[str, Tensor]]) -> dict[int, list[Any]]:
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
