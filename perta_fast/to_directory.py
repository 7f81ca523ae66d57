"""A run into a new directory, taken up again shard by shard after whatever stopped it."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from perta_fast.accounts import add_up, describe_inputs, describe_output, describe_tensors
from perta_fast.checkpoint import JOB, OTHER_WEIGHTS, PICKLED, Checkpoint
from perta_fast.dtypes import ITEM_SIZES
from perta_fast.durable import (
    copy_range,
    drop_pages,
    read_record,
    remove,
    sync_directory,
    write_fully,
    write_record,
)
from perta_fast.errors import InputError, Interrupted, RunError, is_out_of_memory
from perta_fast.job import Job, reopen
from perta_fast.memory import PeakMemory
from perta_fast.model_card import write_model_card
from perta_fast.output import OutputDirectory, check_space, partial_path, scratch_path
from perta_fast.progress import byte_bar
from perta_fast.report import Report, fits, now
from perta_fast.safetensors_file import SafetensorsFile
from perta_fast.sources import Sources
from perta_fast.subtraction import Chunk, Statistics, bytes_moved, chunks_of

STATE = ".perta-run"  # below the directory that is being built
WALK = "walk.json"  # in the state of a streamed run: how far it has come
_FREE_MARGIN = 64 << 20  # bytes of disk left for small files
_FICLONE = 0x40049409  # Linux: share the data of another file

# Writes the shards of a run's directory and says what became of each tensor; returns the sources to describe.
Fill = Callable[[Job, Sources, OutputDirectory, Report], Sources]


def has_begun(final: Path) -> bool:
    """Whether an unfinished run to ``final`` has work in it that can be taken up again."""
    state = partial_path(final) / STATE
    return (state / JOB).exists() and ((state / WALK).exists() or any(state.glob("done-*")))


def begun_job(final: Path) -> Job:
    """The unfinished run to ``final``."""
    return Job.load(partial_path(final) / STATE / JOB)


def write_directory(job: Job, sources: Sources, fill: Fill) -> Report:
    """Do the whole run. Raises as ``apply``; Interrupted if stopped with a part done."""
    final = Path(job.final)
    check_space(final, sources.model.size + _FREE_MARGIN)
    target = OutputDirectory(final, overwrite=job.overwrite, inputs=sources.paths())
    return _run(job, sources, target, fill)


def resume_directory(final: Path, progress: bool) -> Report:
    """Finish a run to ``final``. Raises InputError if an input is not what it was."""
    job = begun_job(final)
    job.progress = progress
    sources = reopen(job)
    fill: Fill = write_shards
    if job.stream:
        from perta_fast.streaming.run import StreamedRun

        fill = StreamedRun.reopened(job).fill
    target = OutputDirectory(final, overwrite=job.overwrite, resume=True)
    job.take_up_again()
    return _run(job, sources, target, fill)


def _run(job: Job, sources: Sources, target: OutputDirectory, fill: Fill) -> Report:
    report = job.begun_report()
    try:
        with PeakMemory() as memory, target:
            state = target.path / STATE
            state.mkdir(exist_ok=True)
            job.save(state / JOB)
            _keep_only_shards(target.path, sources)
            copy_companions(sources.model, target.path)
            describe_inputs(report, fill(job, sources, target, report), job)
            outputs = [target.path / name for name in sources.model.shards]
            describe_output(report, outputs, target.final, job)
            write_model_card(target.path, report)
            report.memory |= memory.as_dict()
            report.finished = now()
            report.save(target.path)
            target.commit()
    except KeyboardInterrupt:
        if has_begun(target.final):
            raise Interrupted(
                f"interrupted; the inputs are untouched. Finish the run with: perta resume {target.final}"
            ) from None
        raise
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error) and has_begun(target.final):
            raise RunError(
                "out of memory; the inputs are untouched. Finish the run where more is free with: "
                f"perta resume {target.final}, or start over with --overwrite and a smaller --batch-size"
            ) from error
        raise
    clear_up(target.final, job)
    return report


def _keep_only_shards(directory: Path, sources: Sources) -> None:
    """Remove what an earlier attempt left, but for its state and the shards that it has done or begun."""
    state = directory / STATE
    done = {path.name.removeprefix("done-").removesuffix(".json") for path in state.glob("done-*")}
    if (state / WALK).exists():
        done.update(sources.model.shards)
    for path in directory.iterdir():
        if path.name != STATE and path.name not in done:
            remove(path)


def clear_up(final: Path, job: Job) -> None:
    """Remove what a finished run needs no more."""
    if job.temporary:
        remove(scratch_path(final))
    remove(final / STATE)


def copy_companions(source: Checkpoint, target: Path) -> None:
    """Copy everything beside the weights: config, tokenizer, generation config, code, and the index in use."""
    for path in sorted(source.path.iterdir()):
        weights = path.name.removesuffix(".index.json").endswith((".safetensors", *PICKLED, *OTHER_WEIGHTS))
        if path.is_file() and (path == source.index or not weights):
            shutil.copyfile(path, target / path.name)


class _Shard:
    """One shard on its way: its tensors, the chunks still to come, and what the statistics add up to."""

    def __init__(self, name: str, source: SafetensorsFile, directory: Path) -> None:
        self.name, self.source, self.path = name, source, directory / name
        self.note = directory / STATE / f"done-{name}.json"
        self.indices: list[int] = []
        self.bytes_moved = 0
        self.waiting = 0
        self.totals: dict[int, Statistics] = {}
        self.descriptor: int | None = None

    def open(self) -> int:
        """Begin the file, over what an earlier attempt may have left, unless it is begun."""
        if self.descriptor is None:
            self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            write_fully(self.descriptor, memoryview(self.source.header), 0)
        return self.descriptor

    def close(self) -> None:
        """Close the file if it is open."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class _Writer:
    """Takes chunks from many threads; a thread of its own flushes each shard that is complete and notes it."""

    def __init__(self, job: Job, sources: Sources, shards: list[_Shard], target: OutputDirectory) -> None:
        self._job, self._sources, self._target = job, sources, target
        self._shards = {shard.name: shard for shard in shards}
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1)
        self._finished: list[Future[None]] = []

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        for shard in self._shards.values():
            shard.close()

    def store(self, chunk: Chunk, data: memoryview, statistics: Statistics) -> None:
        """Write a chunk's bytes."""
        theta = self._sources.plans[chunk.index].theta
        shard = self._shards[theta.path.name]
        with self._lock:
            descriptor = shard.open()
        write_fully(descriptor, data, theta.begin + chunk.begin * ITEM_SIZES[theta.dtype])
        with self._lock:
            add_up(shard.totals, chunk.index, statistics)
            shard.waiting -= 1
            if shard.waiting == 0:
                self.finish(shard)

    def finish(self, shard: _Shard) -> None:
        """Have a shard flushed and noted, whose last byte is written."""
        self._finished.append(self._thread.submit(self._flush, shard))

    def wait(self) -> None:
        """Until all are noted; raises what went wrong."""
        for each in self._finished:
            each.result()

    def _flush(self, shard: _Shard) -> None:
        descriptor = shard.open()
        os.fsync(descriptor)
        if self._job.drop_cache:
            drop_pages(descriptor)
        shard.close()
        sync_directory(self._target.path)
        write_record(shard.note, shard.totals)
        self._target.keep = True


def write_shards(job: Job, sources: Sources, target: OutputDirectory, report: Report) -> Sources:
    """Subtract shard by shard, from importances on disk, if any; return ``sources``."""
    shards = _shards(job, sources, target.path)
    todo = [shard for shard in shards if not shard.note.exists()]
    for shard in shards:
        if shard not in todo:
            shard.totals = _read_totals(shard)
    total, rest = (sum(shard.bytes_moved for shard in group) for group in (shards, todo))
    unchanged = [shard for shard in todo if all(sources.plans[index].copied for index in shard.indices)]
    changing = [shard for shard in todo if shard not in unchanged]
    started = time.perf_counter()
    with (
        byte_bar(total, "apply", job.progress, total - rest) as bar,
        _Writer(job, sources, todo, target) as writer,
    ):
        for shard in unchanged:
            _copy_shard(shard, job.link_unchanged)
            shard.descriptor = os.open(shard.path, os.O_RDONLY)  # to be flushed
            writer.finish(shard)
            bar.update(shard.bytes_moved)
        for shard in changing:
            if shard.waiting == 0:  # nothing but empty tensors
                writer.finish(shard)
        plans = [(index, sources.plans[index]) for shard in changing for index in shard.indices]
        job.subtraction(sources).run(chunks_of(plans, job.chunk), writer.store, bar.update)
        writer.wait()
    report.add_phase("apply", time.perf_counter() - started, rest)
    totals = {index: sums for shard in shards for index, sums in shard.totals.items()}
    describe_tensors(report, sources.plans, totals)
    return sources


def _read_totals(shard: _Shard) -> dict[int, Statistics]:
    content = read_record(shard.note)
    if not fits(content, dict[str, Statistics]) or not content.keys() <= set(map(str, shard.indices)):
        raise InputError(f"{shard.note}: is not the note of a finished shard")
    return {int(index): sums for index, sums in content.items()}


def _shards(job: Job, sources: Sources, directory: Path) -> list[_Shard]:
    shards = {name: _Shard(name, file, directory) for name, file in sources.model.shards.items()}
    for index, plan in enumerate(sources.plans):
        shard = shards[plan.theta.path.name]
        shard.indices.append(index)
        shard.bytes_moved += bytes_moved(plan, plan.theta.count)
        shard.waiting += -(-plan.theta.count // job.chunk)
    return list(shards.values())


def _copy_shard(shard: _Shard, link: bool) -> None:
    """Copy a whole file; ``link``: share its data, or be the same file, where the file system can."""
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
    """A run that was stopped after its last rename: only its own files are still to go."""
    try:
        job = Job.load(final / STATE / JOB)
    except InputError:
        remove(final / STATE)
    else:
        clear_up(final, job)
    return Report.load(final)
