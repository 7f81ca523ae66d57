"""What a streamed run does while the walk goes on: subtract, write, and record how far it has come.

All ranks walk through all layers into one directory that all of them see. Each has its share of the samples, its own
scratch files and its own record. After each step, every rank

1. waits until all have run the step; if one could not, all end;
2. adds up over the ranks the means that the step completes, subtracts its own share of them, writes the result into the
   shared shards (and the importances that are kept) and flushes it, then its scratch files;
3. writes its record of the step, durably; the record also holds the step before;
4. waits until all have recorded the step;
5. removes the scratch files that no later step needs.

So the records of two ranks differ by one step at most, wherever they are killed (``step_record``). A rank that goes
back to the step before finds its scratch files still there, as 5 comes after 4. First of all it records that step
again, since it is about to overwrite the files of the later one. On CPUs, the same ranks give sums of the same bits, so
what is written again does not change; on GPUs the last bits may differ, and all ranks write the whole step again. One
process alone does the same.
"""

import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NotRequired, TypedDict

import torch

from perta_fast.distributed.ranks import Ranks, is_shared
from perta_fast.dtypes import ITEM_SIZES
from perta_fast.files.durable import sync, write_fully
from perta_fast.files.hashing import NONE_IN_PASSING, HashesInPassing
from perta_fast.files.new_directory import OutputDirectory
from perta_fast.files.own import own_file
from perta_fast.files.reading import drop_pages
from perta_fast.importance.gradients import check_finite
from perta_fast.models.layouts import Run
from perta_fast.records.typed_json import fits
from perta_fast.streaming.data_pass import DataPass, Means, PassRecord, sum_over_ranks_
from perta_fast.streaming.held_arrays import HeldArrays
from perta_fast.streaming.kept_importance import KeptImportance
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.scratch_files import StepFiles
from perta_fast.streaming.step_record import rank_path, record_step, resume_step
from perta_fast.subtraction.changed_inputs import check_unchanged
from perta_fast.subtraction.compute import Chunk, Statistics, chunks_of
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.job import Job
from perta_fast.subtraction.report_entries import add_up
from perta_fast.subtraction.unfinished import STATE, WALK


class WalkRecord(TypedDict):
    """How far a walk has come.

    done: steps. passes: the state of each data set. totals: statistics of what this rank has written, by number of the
    match. before: the record of the step before, if there are many ranks.
    """

    done: int
    passes: dict[str, PassRecord]
    totals: dict[str, Statistics]
    before: NotRequired["WalkRecord"]


def resume_walk(target: OutputDirectory, steps: int, tensors: int, ranks: Ranks) -> WalkRecord | None:
    """The record that an unfinished walk of ``steps`` over ``tensors`` goes on from; None: from the beginning.

    Raises InputError if a record is damaged, or the ranks' records are not of one walk.
    """
    indices = {str(index) for index in range(tensors)}

    def is_valid(record: Any) -> bool:
        return fits(record, WalkRecord) and 0 <= record["done"] <= steps and record["totals"].keys() <= indices

    state: WalkRecord | None = resume_step(rank_path(target.path / STATE, WALK, ranks.rank), is_valid, ranks)
    return state


def _work_given_to(device: torch.device) -> "torch.cuda.Event | None":
    """What can be waited for until the work that this thread has given to a GPU is done; None for a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


@dataclass
class WriteBehind:
    """Subtracts and writes what a step has completed, then records the step, while the walk goes on if ``overlap``.

    recorded: this rank's last record. hashes: get what is read and written. ``totals``: statistics of what it has
    written, by number of the match.
    """

    job: Job
    sources: Sources
    target: OutputDirectory
    skeleton: Skeleton
    passes: Mapping[str, DataPass]
    kept: KeptImportance
    overlap: bool
    recorded: WalkRecord | None
    ranks: Ranks
    hashes: HashesInPassing = NONE_IN_PASSING

    def __post_init__(self) -> None:
        self._importance_of: dict[int, list[Run]] = {}  # by number of the match
        covered = self.skeleton.covered(self.sources.model)
        for index, match in enumerate(self.sources.matches):
            runs = covered.get(match.theta.name)
            if match.copied is None and runs is not None:
                self._importance_of[index] = runs
        self._behind = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._lock = threading.Lock()
        self._shards: dict[str, int] = {}
        totals = {} if self.recorded is None else self.recorded["totals"]
        self.totals = {int(index): sums for index, sums in totals.items()}
        self.seconds = self.waited_seconds = 0.0
        self.bytes_moved = 0

    def __enter__(self) -> "WriteBehind":
        for name, file in self.sources.model.shards.items():
            # Opened for writing alone: else a network file system writes whole pages, over other ranks' data.
            descriptor = own_file(self.target.path / name, os.O_WRONLY | os.O_CREAT)
            self._shards[name] = descriptor
            write_fully(descriptor, memoryview(file.header), 0)
            os.ftruncate(descriptor, file.size)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._behind.shutdown()
        for descriptor in self._shards.values():
            os.close(descriptor)
        behind = None if self._pending is None else self._pending.exception()
        if isinstance(error, Exception) and behind is not None and is_shared(behind):
            raise behind from error  # the error that the other ranks raise

    def end_step(self, done: int, means: list[Means]) -> None:
        """Write what a step has completed, once the step before it is recorded."""
        ends = {role: data.end_step() for role, data in self.passes.items()}
        given = _work_given_to(self.skeleton.device)
        self._wait()
        if self.overlap:
            self._pending = self._behind.submit(self._complete, done, means, ends, given)
        else:
            started = time.perf_counter()
            self._complete(done, means, ends, given)
            self.waited_seconds += time.perf_counter() - started

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            started = time.perf_counter()
            pending.result()
            self.waited_seconds += time.perf_counter() - started

    def _complete(
        self,
        done: int,
        means: list[Means],
        ends: Mapping[str, tuple[PassRecord, StepFiles]],
        given: "torch.cuda.Event | None",
    ) -> None:
        with self.ranks.together("the walk"):  # until all have run the step
            if given is not None:
                given.synchronize()  # this thread has a stream of its own
        started = time.perf_counter()
        with self.ranks.together("the walk"):
            if any(means):
                self._write(means)
            for _, files in ends.values():
                files.flush()
            check_unchanged(self.job, self.sources)  # what is recorded was made of the inputs as they were
            self._record(done, {role: record for role, (record, _) in ends.items()})
            self.target.keep = True
            self.kept.keep_on_error()
        for _, files in ends.values():
            files.remove_discarded()
        self.seconds += time.perf_counter() - started

    def _record(self, done: int, passes: dict[str, PassRecord]) -> None:
        totals = {str(index): sums for index, sums in self.totals.items()}
        state: WalkRecord = {"done": done, "passes": passes, "totals": totals}
        record_step(rank_path(self.target.path / STATE, WALK, self.ranks.rank), state, self.recorded, self.ranks)
        self.recorded = state

    def _write(self, means: list[Means]) -> None:
        sum_over_ranks_(means, self.ranks)
        complete = {role: self.skeleton.as_stored(of_set) for role, of_set in zip(self.passes, means, strict=True)}
        for of_set in complete.values():
            for name, mean in of_set.items():
                check_finite(name, mean)
        stored = self.kept.form.stored(complete)
        self.kept.write(stored, {role: ", ".join(data.one_by_one) for role, data in self.passes.items()})
        names = next(iter(stored.values())).keys()
        indices = (index for index, runs in self._importance_of.items() if runs[0].name in names)
        chunks = self._share_of_chunks(indices)
        runs = {chunk.index: self._importance_of[chunk.index] for chunk in chunks}
        self._subtract(chunks, HeldArrays(runs, list(stored.values())))

    def _share_of_chunks(self, indices: Iterable[int]) -> list[Chunk]:
        """This rank's share of the chunks of these matches; the shares follow each other in the shards."""
        chunks = list(chunks_of([(index, self.sources.matches[index]) for index in indices], self.job.chunk))
        return chunks[self.ranks.own_slice(len(chunks))]

    def _subtract(self, chunks: Sequence[Chunk], held: Mapping[int, list[Any]]) -> None:
        subtraction = replace(self.job.subtraction(self.sources, self.hashes), held=held)
        subtraction.run(iter(chunks), self._store, self._count)
        for name in sorted({self.sources.matches[chunk.index].theta.path.name for chunk in chunks}):
            os.fsync(self._shards[name])
            if self.job.drop_cache:
                drop_pages(self._shards[name])

    def _store(self, chunk: Chunk, data: memoryview, statistics: Statistics) -> None:
        theta = self.sources.matches[chunk.index].theta
        offset = theta.begin + chunk.begin * ITEM_SIZES[theta.dtype]
        write_fully(self._shards[theta.path.name], data, offset)
        self.hashes.add(self.target.path / theta.path.name, offset, data)
        if statistics:
            with self._lock:
                add_up(self.totals, chunk.index, statistics)

    def _count(self, moved: int) -> None:
        self.bytes_moved += moved

    def finish(self) -> None:
        """Wait for the last step, then copy the tensors without importance. After this all ranks have written all."""
        self._wait()
        with self.ranks.together("the walk"):
            copied = [index for index, match in enumerate(self.sources.matches) if match.copied is not None]
            self._subtract(self._share_of_chunks(copied), {})
            sync(self.target.path)
