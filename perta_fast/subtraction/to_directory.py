"""A run into a new directory; a run that was stopped is resumed at the first part that is not done."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

from perta_fast.checkpoints.companions import copy_companions, left_out_links, left_out_warning
from perta_fast.checkpoints.fingerprint import PUT_BACK
from perta_fast.distributed.ranks import Ranks, is_shared
from perta_fast.distributed.shared_directory import check_shared
from perta_fast.dtypes import ITEM_SIZES
from perta_fast.errors import InputError, Interrupted, NotFiniteError, RankLost, RunError, is_out_of_memory
from perta_fast.files.disk_space import FREE_MARGIN, check_space
from perta_fast.files.durable import copy_range, remove, sync, write_fully
from perta_fast.files.hashing import HashesInPassing
from perta_fast.files.journal import JOB
from perta_fast.files.new_directory import OutputDirectory, forget_run, importance_path, remove_replaced, remove_scratch
from perta_fast.files.own import check_own, own_file
from perta_fast.files.reading import drop_pages
from perta_fast.memory import PeakMemory
from perta_fast.progress import Bar
from perta_fast.records.file_hashes import write_hashes
from perta_fast.records.model_card import write_model_card
from perta_fast.records.report import Report
from perta_fast.records.versions import now
from perta_fast.subtraction.changed_inputs import changed_input, check_unchanged, unchanged_inputs
from perta_fast.subtraction.compute import Chunk, Statistics
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.job import Job
from perta_fast.subtraction.parts import (
    Part,
    PartChunk,
    Shard,
    Totals,
    begun_shards,
    deal_in_order,
    remaining_parts,
    shards_of,
)
from perta_fast.subtraction.report_entries import add_up, added_up, describe_inputs, describe_output, describe_tensors
from perta_fast.subtraction.unfinished import STATE, WALK, has_begun

_FICLONE = 0x40049409  # Linux: share the data of another file

# Writes the shards of a run's directory and reports on each tensor; returns the sources to describe. The hashes get
# what is read and written in passing.
Fill = Callable[[Job, Sources, OutputDirectory, Report, HashesInPassing], Sources]
# Writes, durably and beside the job, what else a run needs to be resumed.
Prepare = Callable[[Path], object]


def write_directory(
    job: Job, sources: Sources, fill: Fill, ranks: Ranks = Ranks.ALONE, prepare: Prepare | None = None
) -> Report:
    """Do the whole run. Raises as ``apply``; Interrupted if stopped with a part done."""
    final = Path(job.final)
    with ranks.together("the output directory"):
        walk = importance_path(final) if job.temporary else None  # of a temporary θ_f, which is complete
        target = OutputDirectory(final, overwrite=job.overwrite, inputs=sources.paths(), again=STATE, walk=walk)
        if ranks.first:
            check_space({final: sources.model.size + FREE_MARGIN}, [target.path])
    return run_to_directory(job, sources, target, fill, ranks, prepare)


def run_to_directory(
    job: Job, sources: Sources, target: OutputDirectory, fill: Fill, ranks: Ranks, prepare: Prepare | None = None
) -> Report:
    """All ranks do the run; the first one makes the directory and commits it."""
    report = job.begun_report()
    final = target.final
    try:
        with PeakMemory() as memory, ExitStack() as opened:
            with ranks.together("the output directory"):
                if ranks.first:
                    opened.enter_context(target)
                    opened.callback(_keep_what_is_done, target)
                    state = target.path / STATE
                    state.mkdir(exist_ok=True)
                    if prepare is not None:  # before the job: a run that has a job can be resumed
                        prepare(state)
                    job.save(state / JOB)
                    _keep_only_shards(target.path, sources)
                    copy_companions(sources.model, target.path)
                    for link in left_out_links(sources.model):
                        report.warn(left_out_warning(link, final))
            check_shared(target.path, ranks)
            outputs = {target.path / name: shard.size for name, shard in sources.model.shards.items()}
            # Of several processes none sees all bytes, so each hashes its share of the files afterwards.
            passing = HashesInPassing(sources.sizes() | outputs if ranks.world == 1 else {})
            with unchanged_inputs(job, sources):
                describe_inputs(report, fill(job, sources, target, report, passing), job, ranks, passing)
            describe_output(report, list(outputs), final, job, ranks, passing)
            with ranks.together("the report"):
                if ranks.first:
                    write_model_card(target.path, report)
                    report.memory |= memory.as_dict()
                    report.finished = now()
                    report.save(target.path)
                    write_hashes(target.path, report)
                    target.commit()
    except KeyboardInterrupt:
        if _can_be_resumed(target):
            raise Interrupted(
                f"interrupted; the inputs are untouched. Finish the run with: {job.resume_command}"
            ) from None
        raise
    except RankLost as error:
        rest = f"Finish the run with: {job.resume_command}" if _can_be_resumed(target) else "Run the same command again"
        raise RankLost(f"{error}. The inputs are untouched. {rest}") from error
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error) and _can_be_resumed(target):
            raise RunError(
                "out of memory; the inputs are untouched. Finish the run where more is free with: "
                f"{job.resume_command}, or start over with ‹overwrite› and a smaller ‹batch_size›"
            ) from error
        if ranks.first and isinstance(error, RunError) and changed_input(job, sources) is not None:
            raise RunError(f"{error}. {_after_a_change(job, target)}") from error
        if ranks.first and is_shared(error) and not isinstance(error, NotFiniteError) and _can_be_resumed(target):
            rest = f"The inputs are untouched. Finish the run with: {job.resume_command}"
            raise RunError(f"{error}. {rest}") from error
        raise
    if ranks.first:
        clear_up(final, job)
    return report


def _can_be_resumed(target: OutputDirectory) -> bool:
    """Whether any rank has noted work to go on from."""
    return target.keep or has_begun(target.final)


def _after_a_change(job: Job, target: OutputDirectory) -> str:
    """What to do when an input has changed during the run."""
    if not _can_be_resumed(target):
        return "Leave the inputs as they are, and run the same command again"
    advice = f"{PUT_BACK[0].upper()}{PUT_BACK[1:]}"
    return f"{advice}, and finish the run with: {job.resume_command}; or start over with ‹overwrite›"


def _keep_what_is_done(target: OutputDirectory) -> None:
    target.keep = _can_be_resumed(target)


def _keep_only_shards(directory: Path, sources: Sources) -> None:
    """Remove what an earlier attempt left, except its state and the shards that it has done or begun."""
    state = directory / STATE
    done = begun_shards(state)
    if (state / WALK).exists():
        done.update(sources.model.shards)
    for path in directory.iterdir():
        if path.name != STATE and path.name not in done:
            remove(path)


def clear_up(final: Path, job: Job) -> None:
    """Remove what a finished run no longer needs."""
    if job.temporary:
        remove_scratch(final)
    if isinstance(kept := job.stream.get("save"), str):
        forget_run(Path(kept), Path(job.final))
    remove(final / STATE)


class _Writer:
    """Writes chunks from many threads; its own thread flushes each complete part, then notes it."""

    def __init__(self, job: Job, sources: Sources, directory: Path, parts: list[Part], hashes: HashesInPassing) -> None:
        self._job, self._sources, self._directory, self._hashes = job, sources, directory, hashes
        self._waiting = {part: part.end - part.begin for part in parts}
        self._open: dict[Part, int] = {}
        self.totals: dict[Part, Totals] = {part: {} for part in parts}
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1)
        self._finished: list[Future[None]] = []

    def close(self) -> None:
        self._thread.shutdown()
        for descriptor in self._open.values():
            os.close(descriptor)

    def store(self, chunk: Chunk, data: memoryview, statistics: Statistics) -> None:
        """Write the bytes of a ``PartChunk``."""
        assert isinstance(chunk, PartChunk)
        part = chunk.part
        theta = part.shard.matches[chunk.index].theta
        with self._lock:
            descriptor = self._descriptor(part)
        begin = theta.begin + chunk.begin * ITEM_SIZES[theta.dtype]
        write_fully(descriptor, data, begin)
        self._hashes.add(part.shard.path, begin, data)
        with self._lock:
            add_up(self.totals[part], chunk.index, statistics)
            self._waiting[part] -= 1
            if self._waiting[part] == 0:
                self.finish(part)

    def finish(self, part: Part) -> None:
        """Flush and note a part whose last byte is written, in the background; raises an error of an earlier part."""
        for noted in self._finished:
            if noted.done():
                noted.result()
        self._finished.append(self._thread.submit(self._flush, part))

    def wait(self) -> None:
        """Wait until all parts are noted; raises the first error of that."""
        for noted in self._finished:
            noted.result()

    def _descriptor(self, part: Part) -> int:
        """The open file of a part; a part that is a whole shard starts the file again."""
        if part not in self._open:
            if part.whole and not part.shard.unchanged:
                part.shard.begin_file()
            self._open[part] = own_file(part.shard.path, os.O_RDONLY if part.shard.unchanged else os.O_WRONLY)
        return self._open[part]

    def _flush(self, part: Part) -> None:
        with self._lock:
            descriptor = self._descriptor(part)
        os.fsync(descriptor)
        if self._job.drop_cache:
            drop_pages(descriptor)
        with self._lock:
            os.close(self._open.pop(part))
        sync(self._directory)
        check_unchanged(self._job, self._sources)  # what is noted was made of the inputs as they were
        part.note(self.totals[part])


def write_shards(
    job: Job, sources: Sources, target: OutputDirectory, report: Report, hashes: HashesInPassing, *, ranks: Ranks
) -> Sources:
    """Subtract part by part, with importances from disk, if any; return ``sources``.

    Each rank writes, flushes and notes its own parts. Two ranks may write into one file, where the parts of one end and
    those of the next begin; the first rank makes such files before anyone writes.
    """
    shards = shards_of(sources, target.path, target.path / STATE, job.chunk)
    with ranks.together("the notes of what is done"):
        done = [shard.done() if ranks.first else {} for shard in shards]
    done = ranks.share(done)
    remaining = [part for shard, known in zip(shards, done, strict=True) for part in remaining_parts(shard, known)]
    dealt = deal_in_order(remaining, ranks.world)
    with ranks.together("the output files"):
        if ranks.first:
            divided = {part.shard.path: part.shard for parts in dealt for part in parts if not part.whole}
            for shard, known in zip(shards, done, strict=True):
                if shard.path in divided and not known:
                    shard.begin_file()
                    sync(shard.path)
    started = time.perf_counter()
    finished = sum(shard.cost(*chunks) for shard, known in zip(shards, done, strict=True) for chunks in known)
    with ranks.together("the subtraction"):
        totals = _write_parts(job, sources, target.path, dealt[ranks.rank], finished, hashes)
    all_totals = [sums for known in done for sums in known.values()] + ranks.gather(totals)
    report.add_phase("apply", time.perf_counter() - started, sum(part.cost for part in remaining))
    describe_tensors(report, sources.matches, added_up(all_totals))
    return sources


def _write_parts(
    job: Job, sources: Sources, directory: Path, parts: list[Part], finished: int, hashes: HashesInPassing
) -> Totals:
    """Write ``parts`` and return their totals. finished: bytes that were done before, for the progress."""
    total = finished + sum(part.cost for part in parts)
    with (
        Bar(total, "apply", job.progress, done=finished) as bar,
        closing(_Writer(job, sources, directory, parts, hashes)) as writer,
    ):
        for part in parts:
            if part.shard.unchanged:
                _copy_shard(part.shard, job.link_unchanged)
                bar.update(part.cost)
            if part.shard.unchanged or part.begin == part.end:  # the latter: all its tensors are empty
                writer.finish(part)
        chunks = (chunk for part in parts if not part.shard.unchanged for chunk in part.chunks())
        job.subtraction(sources, hashes).run(chunks, writer.store, bar.update)
        writer.wait()
    return added_up(writer.totals.values())


def _copy_shard(shard: Shard, link: bool) -> None:
    """Copy a whole file. link: share the data, or make a hard link, if the file system can."""
    remove(shard.path)
    source = os.open(shard.source.path, os.O_RDONLY)
    try:
        target = os.open(shard.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if link and _share(source, target):
                return
            if not link:
                copy_range(source, target, shard.source.size, 0, 0)
                return
        finally:
            os.close(target)
        shard.path.unlink()
        try:
            os.link(os.path.realpath(shard.source.path), shard.path)
        except OSError:  # another file system, or one without links
            _copy_shard(shard, link=False)
    finally:
        os.close(source)


def _share(source: int, target: int) -> bool:
    try:
        import fcntl

        fcntl.ioctl(target, _FICLONE, source)
    except (ImportError, OSError):
        return False
    return True


def finish_leftover(final: Path) -> Report:
    """Finish a run that was stopped after its last rename: remove what it replaced, then its state."""
    check_own(final / STATE)
    remove_replaced(final)
    try:
        job = Job.load(final / STATE / JOB)
    except InputError:
        remove(final / STATE)
    else:
        clear_up(final, job)
    return Report.load(final)
