"""What a streamed run does behind the walk: subtract, write, and record how far it has come.

Many ranks walk through all layers, each with its share of the samples, scratch files and a record of its own,
into one directory that all of them see. With each step, every rank

1. meets the others: all have run it, or one says why not, and all end;
2. adds up over the ranks what the step has made complete, weighs and subtracts its own part of it, writes that
   into the shared shards (and the importances that are kept), and flushes it, then its scratch files;
3. records the step, durably, and with it still the one before;
4. meets the others: all have recorded it;
5. removes the scratch files that the step was the last to need.

A rank comes to 3 only when all have passed the last step's 3, so records differ by one step at most, wherever
ranks are killed. The run goes on from the last step that all have recorded: a rank that was one ahead goes back
by what its record says of the step before, whose files are still there, as 5 comes after 4. It first makes that
its record, since the files of the step are to be written again. Sums over the same ranks have the same bits, so
what is written again is what was there. One process alone does the same with nobody to meet.
"""

import os
import threading
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NotRequired, TypedDict

from torch import Tensor

from perta_fast.checkpoints.tied import importance_key
from perta_fast.distributed.dealing import stretch
from perta_fast.distributed.ranks import Ranks, is_shared
from perta_fast.dtypes import ITEM_SIZES
from perta_fast.errors import InputError
from perta_fast.files.durable import (
    read_record,
    remove,
    sync_directory,
    write_fully,
    write_record,
)
from perta_fast.files.new_directory import OutputDirectory
from perta_fast.files.reading import drop_pages
from perta_fast.importance.gradients import check_finite
from perta_fast.records.typed_json import fits
from perta_fast.streaming.data_pass import DataPass, Means, PassState, add_up_
from perta_fast.streaming.kept_importance import Keeping
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.scratch_files import Settled
from perta_fast.subtraction.compute import Chunk, Statistics, chunks_of
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.job import Job
from perta_fast.subtraction.report_entries import add_up
from perta_fast.subtraction.unfinished import STATE, WALK


class WalkState(TypedDict):
    """How far a walk has come: steps done, each data set's spill, what the written tensors add up to.

    totals: of this rank's part of them. before: of the step before, where there are many ranks.
    """

    done: int
    passes: dict[str, PassState]
    totals: dict[str, Statistics]
    before: NotRequired["WalkState"]


def state_file(folder: Path, name: str, rank: int) -> Path:
    """A rank's own file or directory in the state of a run; the first rank's are those of one process alone."""
    return folder / (f"{rank}-{name}" if rank else name)


def take_up(target: OutputDirectory, steps: int, tensors: int, ranks: Ranks) -> WalkState | None:
    """What this rank goes on from, in a directory that is being built by a walk of ``steps`` over ``tensors``.

    None: from the beginning. Raises InputError if a record is damaged, or they are not of one walk.
    """
    path = state_file(target.path / STATE, WALK, ranks.rank)
    with ranks.together("take the walk up again"):
        state = _read(path, steps, tensors) if path.exists() else None
    done = min(ranks.gather(0 if state is None else state["done"]))
    with ranks.together("take the walk up again"):
        if state is not None and state["done"] != done:
            state = _back(path, state, done)
    if state is not None:
        state.pop("before", None)  # which no rank can go back to now
    return state


def _read(path: Path, steps: int, tensors: int) -> WalkState:
    state = read_record(path)
    indices = {str(index) for index in range(tensors)}
    if not fits(state, WalkState) or not all(
        0 <= each["done"] <= steps and each["totals"].keys() <= indices
        for each in (state, state.get("before", state))
    ):
        raise InputError(f"{path}: is not the record of a walk")
    found: WalkState = state
    return found


def _back(path: Path, state: WalkState, done: int) -> WalkState | None:
    """The state after ``done`` steps, one less than ``state``, made the record."""
    if done == 0 and state["done"] == 1:
        remove(path)
        return None
    before = state.get("before")
    if before is None or before["done"] != done:
        raise InputError(
            f"{path}: does not go with the records of the other processes; start over with --overwrite"
        )
    write_record(path, before)
    return before


class Writing:
    """Subtracts and writes what a step has made complete, while the walk goes on, then records the step.

    begun: what this rank goes on from. ``totals`` are of what this rank has written.
    """

    def __init__(
        self,
        job: Job,
        sources: Sources,
        target: OutputDirectory,
        skeleton: Skeleton,
        passes: Mapping[str, DataPass],
        keeping: Keeping,
        overlap: bool,
        begun: WalkState | None,
        ranks: Ranks,
    ) -> None:
        self._job, self._sources, self._target, self._skeleton = job, sources, target, skeleton
        self._passes, self._keeping, self._overlap, self._ranks = passes, keeping, overlap, ranks
        self._recorded = begun
        self._matches_of: dict[str, list[int]] = {}  # by the importance that they take
        for index, match in enumerate(sources.matches):
            key = importance_key(match.theta.name, sources.model, skeleton.stored_shapes)
            if match.copied is None and key is not None:
                self._matches_of.setdefault(key, []).append(index)
        self._behind = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._lock = threading.Lock()
        self._shards: dict[str, int] = {}
        self.totals = {} if begun is None else {int(index): sums for index, sums in begun["totals"].items()}
        self.seconds = self.waited_seconds = 0.0
        self.bytes_moved = 0

    def __enter__(self) -> "Writing":
        for name, file in self._sources.model.shards.items():
            # Not for reading: a network file system would write whole pages back, over what other ranks wrote.
            descriptor = os.open(self._target.path / name, os.O_WRONLY | os.O_CREAT, 0o666)
            self._shards[name] = descriptor
            write_fully(descriptor, memoryview(file.header), 0)
            os.ftruncate(descriptor, file.size)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._behind.shutdown()
        for descriptor in self._shards.values():
            os.close(descriptor)
        behind = None if self._pending is None else self._pending.exception()
        if isinstance(error, Exception) and behind is not None and is_shared(behind):
            raise behind from error  # what the other ranks have heard

    def _meeting(self) -> AbstractContextManager[None]:
        return self._ranks.together("the walk")

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
        with self._meeting():
            pass  # all have run the step
        started = time.perf_counter()
        with self._meeting():
            if any(means):
                self._weigh(means)
            for _, settled in ends.values():
                settled.flush()
            self._record(done, {role: state for role, (state, _) in ends.items()})
            self._target.keep = True
            self._keeping.stay()
        for _, settled in ends.values():
            settled.clear()
        self.seconds += time.perf_counter() - started

    def _record(self, done: int, passes: dict[str, PassState]) -> None:
        totals = {str(index): sums for index, sums in self.totals.items()}
        state: WalkState = {"done": done, "passes": passes, "totals": totals}
        before = {} if self._recorded is None or self._ranks.world == 1 else {"before": self._recorded}
        path = state_file(self._target.path / STATE, WALK, self._ranks.rank)
        write_record(path, {**state, **before})
        self._recorded = state

    def _weigh(self, means: list[Means]) -> None:
        """Add up means over the ranks, then keep and subtract this rank's part."""
        add_up_(means, self._ranks)
        stored = dict(zip(self._passes, map(self._stored, means), strict=True))
        one_by_one = {role: ", ".join(each.one_by_one) for role, each in self._passes.items()}
        self._keeping.write(stored, one_by_one)
        indices = [index for name in next(iter(stored.values())) for index in self._matches_of.get(name, [])]
        chunks = self._part(indices)
        self._subtract(chunks, self._held(stored, {chunk.index for chunk in chunks}))

    def _stored(self, means: Means) -> dict[str, Tensor]:
        stored = self._skeleton.as_stored(means)
        for name, mean in stored.items():
            check_finite(name, mean)
        return stored

    def _part(self, indices: Iterable[int]) -> list[Chunk]:
        """The chunks of these tensors that this rank writes: the ranks' follow each other in the shards."""
        matches = [(index, self._sources.matches[index]) for index in sorted(indices)]
        chunks = list(chunks_of(matches, self._job.chunk))
        return chunks[stretch(len(chunks), self._ranks.rank, self._ranks.world)]

    def _held(self, stored: Mapping[str, Mapping[str, Tensor]], wanted: Container[int]) -> dict[int, list[Any]]:
        """Means as flat arrays, one for each data set, by the number of the match that takes them."""
        held = {}
        for name in next(iter(stored.values())):
            indices = [index for index in self._matches_of.get(name, []) if index in wanted]
            if indices:
                arrays = [each[name].cpu().contiguous().view(-1).numpy() for each in stored.values()]
                held.update(dict.fromkeys(indices, arrays))
        return held

    def _subtract(self, chunks: Sequence[Chunk], held: Mapping[int, list[Any]]) -> None:
        subtraction = replace(self._job.subtraction(self._sources), held=held)
        subtraction.run(iter(chunks), self._store, self._count)
        for name in sorted({self._sources.matches[chunk.index].theta.path.name for chunk in chunks}):
            os.fsync(self._shards[name])
            if self._job.drop_cache:
                drop_pages(self._shards[name])

    def _store(self, chunk: Chunk, data: memoryview, statistics: Statistics) -> None:
        theta = self._sources.matches[chunk.index].theta
        offset = theta.begin + chunk.begin * ITEM_SIZES[theta.dtype]
        write_fully(self._shards[theta.path.name], data, offset)
        if statistics:
            with self._lock:
                add_up(self.totals, chunk.index, statistics)

    def _count(self, moved: int) -> None:
        self.bytes_moved += moved

    def finish(self) -> None:
        """Wait for the last step, and write what no importance reaches; then all ranks have written all."""
        self._wait()
        with self._meeting():
            copied = [index for index, match in enumerate(self._sources.matches) if match.copied is not None]
            self._subtract(self._part(copied), {})
            sync_directory(self._target.path)
