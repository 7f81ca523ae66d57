"""What a streamed run does while the walk goes on: subtract, write, and record how far it has come.

Many ranks walk through all layers, each with its share of the samples, its own scratch files and its own
record, into one directory that all of them see. After each step, every rank

1. waits for the others: all have run the step, or one says why not, and all end; 2. adds up over the ranks
the means that the step has completed, subtracts its own share of them, writes that into the shared shards
(and the importances that are kept), and flushes it, then its scratch files; 3. writes its record of the step,
durably; the record also holds the step before; 4. waits for the others: all have recorded the step; 5.
removes the scratch files that no later step needs.

A rank comes to 3 only when all have passed 3 of the step before. So records differ by one step at most,
wherever ranks are killed. The run is resumed from the last step that all have recorded: a rank that was one
step ahead goes back to the step before, which its record still holds and whose scratch files are still there,
as 5 comes after 4. It first makes the step before its record, since the files of the later step will be
written again. Sums over the same ranks have the same bits, so what is written again is what was there. One
process alone does the same.
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
from perta_fast.distributed.ranks import Ranks, is_shared
from perta_fast.dtypes import ITEM_SIZES
from perta_fast.errors import InputError
from perta_fast.files.durable import read_record, remove, sync, write_fully, write_record
from perta_fast.files.new_directory import OutputDirectory
from perta_fast.files.reading import drop_pages
from perta_fast.importance.gradients import check_finite
from perta_fast.records.typed_json import fits
from perta_fast.streaming.data_pass import DataPass, Means, PassRecord, sum_over_ranks_
from perta_fast.streaming.kept_importance import KeptImportance
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.scratch_files import StepFiles
from perta_fast.subtraction.compute import Chunk, Statistics, chunks_of
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.job import Job
from perta_fast.subtraction.report_entries import add_up
from perta_fast.subtraction.unfinished import STATE, WALK


class WalkRecord(TypedDict):
    """How far a walk has come: steps done, the state of each data set, statistics of the written tensors.

    totals: statistics by number of the match, of what this rank has written. before: the record of the step
    before, if there are many ranks.
    """

    done: int
    passes: dict[str, PassRecord]
    totals: dict[str, Statistics]
    before: NotRequired["WalkRecord"]


def rank_path(folder: Path, name: str, rank: int) -> Path:
    """A rank's own file or directory of an unfinished run; the first rank's name is that of one process."""
    return folder / (f"{rank}-{name}" if rank else name)


def resume_walk(target: OutputDirectory, steps: int, tensors: int, ranks: Ranks) -> WalkRecord | None:
    """The record to go on from, in an unfinished directory of a walk of ``steps`` over ``tensors``.

    None: from the beginning. Raises InputError if a record is damaged, or the records are not of one walk.
    """
    path = rank_path(target.path / STATE, WALK, ranks.rank)
    with ranks.together("resume the walk"):
        state = _read(path, steps, tensors) if path.exists() else None
    done = min(ranks.gather(0 if state is None else state["done"]))
    with ranks.together("resume the walk"):
        if state is not None and state["done"] != done:
            state = _step_back(path, state, done)
    if state is not None:
        state.pop("before", None)  # which no rank can go back to now
    return state


def _read(path: Path, steps: int, tensors: int) -> WalkRecord:
    state = read_record(path)
    indices = {str(index) for index in range(tensors)}
    if not fits(state, WalkRecord) or not all(
        0 <= record["done"] <= steps and record["totals"].keys() <= indices
        for record in (state, state.get("before", state))
    ):
        raise InputError(f"{path}: is not the record of a walk")
    record: WalkRecord = state
    return record


def _step_back(path: Path, state: WalkRecord, done: int) -> WalkRecord | None:
    """The record after ``done`` steps, one less than ``state``, which it replaces on disk."""
    if done == 0 and state["done"] == 1:
        remove(path)
        return None
    before = state.get("before")
    if before is None or before["done"] != done:
        raise InputError(f"{path}: does not go with the records of the other processes; start over with --overwrite")
    write_record(path, before)
    return before


class WriteBehind:
    """Subtracts and writes what a step has completed, while the walk goes on, then records the step.

    begun: the record to go on from. ``totals``: statistics of what this rank has written, by number of the
    match.
    """

    def __init__(
        self,
        job: Job,
        sources: Sources,
        target: OutputDirectory,
        skeleton: Skeleton,
        passes: Mapping[str, DataPass],
        kept: KeptImportance,
        overlap: bool,
        begun: WalkRecord | None,
        ranks: Ranks,
    ) -> None:
        self._job, self._sources, self._target, self._skeleton = job, sources, target, skeleton
        self._passes, self._kept, self._overlap, self._ranks = passes, kept, overlap, ranks
        self._recorded = begun
        self._matches_of: dict[str, list[int]] = {}  # by name of their importance
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

    def __enter__(self) -> "WriteBehind":
        for name, file in self._sources.model.shards.items():
            # Opened for writing alone: else a network file system writes whole pages, over other ranks' data.
            descriptor = os.open(self._target.path / name, os.O_WRONLY | os.O_CREAT, 0o666)
            self._shards[name] = descriptor
            write_fully(descriptor, memoryview(file.header), 0)
            os.ftruncate(descriptor, file.size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._behind.shutdown()
        for descriptor in self._shards.values():
            os.close(descriptor)
        behind = None if self._pending is None else self._pending.exception()
        if isinstance(error, Exception) and behind is not None and is_shared(behind):
            raise behind from error  # the one that the other ranks raise

    def _together(self) -> AbstractContextManager[None]:
        return self._ranks.together("the walk")

    def end_step(self, done: int, means: list[Means]) -> None:
        """Write what a step has completed, when the step before it is recorded."""
        ends = {role: data.end_step() for role, data in self._passes.items()}
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

    def _complete(self, done: int, means: list[Means], ends: Mapping[str, tuple[PassRecord, StepFiles]]) -> None:
        with self._together():
            pass  # all have run the step
        started = time.perf_counter()
        with self._together():
            if any(means):
                self._write(means)
            for _, files in ends.values():
                files.flush()
            self._record(done, {role: record for role, (record, _) in ends.items()})
            self._target.keep = True
            self._kept.keep_on_error()
        for _, files in ends.values():
            files.remove_discarded()
        self.seconds += time.perf_counter() - started

    def _record(self, done: int, passes: dict[str, PassRecord]) -> None:
        totals = {str(index): sums for index, sums in self.totals.items()}
        state: WalkRecord = {"done": done, "passes": passes, "totals": totals}
        before = {} if self._recorded is None or self._ranks.world == 1 else {"before": self._recorded}
        path = rank_path(self._target.path / STATE, WALK, self._ranks.rank)
        write_record(path, {**state, **before})
        self._recorded = state

    def _write(self, means: list[Means]) -> None:
        """Add up means over the ranks, then keep and subtract this rank's share."""
        sum_over_ranks_(means, self._ranks)
        stored = dict(zip(self._passes, map(self._stored, means), strict=True))
        one_by_one = {role: ", ".join(data.one_by_one) for role, data in self._passes.items()}
        self._kept.write(stored, one_by_one)
        indices = [index for name in next(iter(stored.values())) for index in self._matches_of.get(name, [])]
        chunks = self._own_chunks(indices)
        self._subtract(chunks, self._held(stored, {chunk.index for chunk in chunks}))

    def _stored(self, means: Means) -> dict[str, Tensor]:
        stored = self._skeleton.as_stored(means)
        for name, mean in stored.items():
            check_finite(name, mean)
        return stored

    def _own_chunks(self, indices: Iterable[int]) -> list[Chunk]:
        """This rank's share of the chunks of these tensors; the shares follow each other in the shards."""
        matches = [(index, self._sources.matches[index]) for index in sorted(indices)]
        chunks = list(chunks_of(matches, self._job.chunk))
        return chunks[self._ranks.own_slice(len(chunks))]

    def _held(self, stored: Mapping[str, Mapping[str, Tensor]], wanted: Container[int]) -> dict[int, list[Any]]:
        """Means as flat arrays, one for each data set, by the number of the match that uses them."""
        held = {}
        for name in next(iter(stored.values())):
            indices = [index for index in self._matches_of.get(name, []) if index in wanted]
            if indices:
                arrays = [means[name].cpu().contiguous().view(-1).numpy() for means in stored.values()]
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
        """Wait for the last step, and copy the tensors without importance; then all ranks have written all."""
        self._wait()
        with self._together():
            copied = [index for index, match in enumerate(self._sources.matches) if match.copied is not None]
            self._subtract(self._own_chunks(copied), {})
            sync(self._target.path)
