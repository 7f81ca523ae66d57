"""A run that changes a model where it lies, through a write-ahead journal (``journal``).

The journal is in the model's directory. While it is open, it also holds the config and the index, so that nothing loads
a half-changed model; every command of this package then refuses the directory and says how to finish the run. Before
the first byte is changed, the whole result is computed once and thrown away: numbers that are not finite are found
then, with the model untouched.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TypedDict

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.companions import CARD, CONFIG, elsewhere, files_of
from perta_fast.dtypes import ITEM_SIZES
from perta_fast.errors import InputError, Interrupted, PertaError, RunError, advice, shell_command
from perta_fast.files.apart import check_inputs_stay
from perta_fast.files.disk_space import check_space
from perta_fast.files.durable import move, read_record, remove, sync, write_record
from perta_fast.files.hashing import HashesInPassing, hash_file
from perta_fast.files.identity import is_same
from perta_fast.files.journal import JOB, JOURNAL, START, Segment, new_segment, valid_segments
from perta_fast.files.mounts import mounts_in
from perta_fast.files.new_directory import (
    check_unfinished,
    has_walk,
    importance_path,
    only_a_walk,
    partial_path,
    remove_scratch,
    scratch_path,
)
from perta_fast.files.own import check_own, check_own_tree
from perta_fast.memory import PeakMemory
from perta_fast.progress import Bar, Progress
from perta_fast.records.file_hashes import HASHES, read_hashes, write_hashes
from perta_fast.records.model_card import write_model_card
from perta_fast.records.report import FILE_NAME, Report
from perta_fast.records.typed_json import fits
from perta_fast.records.versions import now
from perta_fast.subtraction.changed_inputs import unchanged_inputs
from perta_fast.subtraction.compute import Chunk, Statistics, Subtraction, bytes_moved, chunks_of
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.job import Job, reopen
from perta_fast.subtraction.journal_directory import (
    SEALED,
    Leftover,
    check_not_complete,
    clear_leftover,
    is_open,
    locked_journal,
    seal,
)
from perta_fast.subtraction.report_entries import add_up, describe_inputs, describe_output, describe_tensors

SEGMENT = 64 << 20  # bytes of new values in a segment
_APPLYING = "applying"  # in the journal: the number of the last segment that may have reached the shards
_INDEX = ".safetensors.index.json"
_FREE_MARGIN = 16 << 20


def change_in_place(job: Job, sources: Sources) -> Report:
    """Do the whole run. Raises as ``apply``; Interrupted if stopped once the model is being changed."""
    model = Path(job.final)
    check_in_place(sources, walk=importance_path(model) if job.temporary else None)
    changing = sum(match.theta.size for match in sources.matches if match.copied is None)
    check_space({model: 3 * min(SEGMENT, changing) + _FREE_MARGIN})
    with _told_if_complete(model), PeakMemory() as memory, locked_journal(model) as journal, _explained(model):
        report = job.begun_report()
        report.in_place = True
        hashes = HashesInPassing(sources.sizes())
        with unchanged_inputs(job, sources, advice="run the same command again"):
            _rehearse(job, sources, report, hashes)
            describe_inputs(report, sources, job, passing=hashes)
        report.inputs["model"]["kept"] = False
        job.report = asdict(report)
        job.save(journal / JOB)
        sync(model)
        return _finish(job, sources, journal, memory)


def resume_in_place(model: Path, progress: Progress) -> Report:
    """Finish a run on ``model``. Raises InputError if an input is not what it was."""
    with _told_if_complete(model), PeakMemory() as memory, locked_journal(model) as journal, _explained(model):
        moved_files = [CONFIG, *(path.name for path in journal.glob(f"*{_INDEX}"))]
        check_own_tree(journal, links=moved_files)
        job = Job.load(journal / JOB)
        moved = {job.directories["model"]: str(model)}
        job.directories = {role: moved.get(path, path) for role, path in job.directories.items()}
        job.final, job.progress = str(model), progress
        set_aside = {name: _where_it_led(journal / name) for name in moved_files if os.path.lexists(journal / name)}
        _check_none_put_back(model, set_aside)
        sources = reopen(job, set_aside, _new_card(journal))
        check_in_place(sources, resumed=True)
        job.count_resume()
        job.save(journal / JOB)
        return _finish(job, sources, journal, memory)


def finish_leftover_in_place(model: Path) -> Report | Leftover:
    """Clear what a run on ``model`` that was killed as it began or ended has left; its report, if it was complete.

    If the result is still to be checked, the seal stays until it is. Raises RunError if a run is going on there.
    """
    left = clear_leftover(model)
    if left != "complete":
        return left
    report, is_due = None, False
    try:
        report = Report.load(model)
        is_due = report.check is not None and report.check.is_due
        made = {role for role in report.inputs if role == "tuned" or role.endswith("_importance")}
        if any(report.inputs[role].get("kept") is False for role in made):
            remove_scratch(model)
    finally:
        if not is_due:
            clear_leftover(model, checked=True)
    return report


def _where_it_led(path: Path) -> Path:
    """A file that was set aside, or, if it is a link, what it led to from the model's directory."""
    return path.parent.parent / path.readlink() if path.is_symlink() else path


def _check_none_put_back(model: Path, set_aside: Mapping[str, Path]) -> None:
    """Raise InputError if a file that was set aside, and will be moved back, has been replaced by another one."""
    for name, kept in set_aside.items():
        path = model / name
        if os.path.lexists(path) and not (path.is_file() and kept.is_file() and hash_file(path) == hash_file(kept)):
            raise InputError(
                f"{path}: was put there while the run had set its own {name} aside; move it away to finish the run"
            )


def _new_card(journal: Path) -> str:
    """The hash of the model card of a run that has moved it into the model; "" if it has not yet."""
    if not (journal / SEALED).exists() or (journal / CARD).exists():
        return ""
    return read_hashes(journal if (journal / HASHES).exists() else journal.parent).get(CARD, "")


def check_in_place(sources: Sources, resumed: bool = False, walk: Path | None = None) -> None:
    """Raise InputError if the model's files cannot be changed, or another input would change with them.

    The base may be the model itself: a chunk is read for both before it is changed. walk: as in ``check_unfinished``.
    """
    model = sources.model
    check_own(model.path / JOURNAL)
    if not resumed:
        check_not_complete(model.path)
        _check_no_other_work(sources, walk)
    _check_mounts(model)
    _check_small_files(model)
    instead = "put a copy in its place" if resumed else "copy the model first, or write to a new directory with ‹out›"
    shards = set()  # by device and inode
    for shard in model.shards.values():
        status = shard.path.lstat()
        if shard.path.is_symlink() or status.st_nlink > 1:
            raise InputError(
                f"{shard.path}: is a link to a file that others may use (as in the cache of a hub); {instead}"
            )
        if not os.access(shard.path, os.W_OK):
            raise InputError(f"{shard.path}: may not be written")
        shards.add((status.st_dev, status.st_ino))
    if not os.access(model.path, os.W_OK):
        raise InputError(f"{model.path}: may not be written")
    for match in sources.matches:
        if match.merged is not None and match.base is not None:
            status = match.base.path.stat()
            if (status.st_dev, status.st_ino) in shards:
                raise InputError(
                    f"{match.base.path}: tensor {match.base.name} of this adapter is made from the base as a whole, "
                    "which is the model to change; write to a new directory with ‹out›"
                )
        operands = ((of, stored) for _, of, entry in sources.operands(match) for stored in entry.pieces or (entry,))
        for checkpoint, entry in operands:
            status = entry.path.stat()
            if checkpoint is model or (status.st_dev, status.st_ino) not in shards:
                continue
            same_bytes = is_same(entry.path, match.theta.path) and entry.begin == match.theta.begin
            if not same_bytes or not is_same(checkpoint.path, model.path):
                raise InputError(
                    f"{entry.path}: tensor {entry.name}, which is read for {match.theta.name}, lies in a file "
                    "that would be changed; write to a new directory with ‹out›"
                )


def _check_no_other_work(sources: Sources, walk: Path | None) -> None:
    """Raise InputError if a run to the model's directory was stopped, or an input lies where the journal will."""
    model = Path(os.path.realpath(sources.model.path))
    given_up = scratch_path(model) if only_a_walk(model) and has_walk(importance_path(model)) else partial_path(model)
    give_up = shell_command("rm", "-r", given_up)
    check_unfinished(model, overwrite=False, walk=walk, instead=f"give it up with: {give_up}")
    check_inputs_stay(model, [model / JOURNAL], sources.paths())


def _check_mounts(model: Checkpoint) -> None:
    """Raise InputError if a file that a run in place moves, replaces or writes is mounted from elsewhere."""
    directory = Path(os.path.realpath(model.path))
    used = {directory / name for name in (*model.shards, *_set_aside(model), CARD, FILE_NAME, HASHES)}
    for path in mounts_in(directory):
        if path in used:
            raise InputError(
                f"{path}: is a mount point, which a run in place cannot replace; put a copy in its place, or write to "
                "a new directory with ‹out›"
            )


def _check_small_files(model: Checkpoint) -> None:
    """Raise InputError unless what is set aside, and what is replaced at the end, are files.

    Only what is set aside may be a link to anywhere: it is moved and comes back, and nothing is written through it.
    """
    set_aside = _set_aside(model)
    for name in [*set_aside, CARD, FILE_NAME, HASHES]:
        path = model.path / name
        if not os.path.lexists(path):
            continue
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is not a file, and a run in place would move or replace it; move it away")
        if not path.exists():
            where = path.readlink()
            raise InputError(f"{path}: is a link to {where}, where nothing is; remove it, or put a copy in its place")
        if name not in set_aside and (target := elsewhere(path)) is not None:
            raise InputError(
                f"{path}: is a link to {target}, outside the model's directory, and a run in place would replace it; "
                "remove the link, or put a copy in its place"
            )
    for path in files_of(model.path).values():
        if not os.access(path, os.R_OK):  # their hashes are taken at the end
            raise InputError(f"{path}: cannot be read; change its rights, or move it away")


def _set_aside(model: Checkpoint) -> list[str]:
    """What loaders look for first: the config and the index, which a resumed run may read where a link leads."""
    index = model.index
    return [CONFIG, *([index.name] if index is not None and index.name.endswith(_INDEX) else [])]


@contextmanager
def _told_if_complete(model: Path) -> Iterator[None]:
    """Make an interruption after the last change say so: the same run again would subtract twice."""
    before = _version(model / FILE_NAME)
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        if is_open(model) or _version(model / FILE_NAME) == before:
            raise
        raise Interrupted(f"interrupted; {model} is complete; do not run the same command again") from None


def _version(path: Path) -> tuple[int, int] | None:
    """What differs once a file has been replaced."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


@contextmanager
def _explained(model: Path) -> Iterator[None]:
    """Make every error say in what state the model is."""
    finishing = shell_command("perta", "resume", model)
    half_changed = f"{model} is half changed and cannot be loaded; finish the run with: {finishing}"
    try:
        yield
    except KeyboardInterrupt:
        if is_open(model):
            raise Interrupted(f"interrupted; {half_changed}") from None
        raise
    except (PertaError, OSError, MemoryError) as error:
        if isinstance(error, InputError) and is_open(model):
            raise  # an input has changed, and the message says what to do
        kind, text = type(error) if isinstance(error, PertaError) else RunError, f"{error}"
        if isinstance(error, OSError):
            text = f"{model}: could not be written: {advice(error)}"
        elif isinstance(error, MemoryError):
            text = "out of memory"
        raise kind(f"{text}. {half_changed if is_open(model) else 'The model is untouched'}") from error


def _rehearse(job: Job, sources: Sources, report: Report, hashes: HashesInPassing) -> None:
    """Compute everything once and keep nothing. hashes: get what is read."""
    moved = _bytes_to_move(sources)
    started = time.perf_counter()
    with Bar(moved, "check", job.progress) as bar:
        job.subtraction(sources, hashes).run(_changing(job, sources), lambda *_: None, bar.update)
    written = sum(match.theta.size for match in sources.matches if match.copied is None)  # here it is not
    report.add_phase("check", time.perf_counter() - started, moved - written)


def _changing(job: Job, sources: Sources) -> Iterator[Chunk]:
    matches = [(index, match) for index, match in enumerate(sources.matches) if match.copied is None]
    return chunks_of(matches, job.chunk)


def _bytes_to_move(sources: Sources) -> int:
    return sum(bytes_moved(match, match.theta.count) for match in sources.matches if match.copied is None)


def _finish(job: Job, sources: Sources, journal: Path, memory: PeakMemory) -> Report:
    """Do what the journal says is still to be done."""
    model = Path(job.final)
    if not (journal / SEALED).exists():
        for name in _set_aside(sources.model):
            if os.path.lexists(model / name):
                move(model / name, journal / name)
        report = _change(job, sources, journal)
        describe_output(report, [shard.path for shard in sources.model.shards.values()], model, job)
        remove(journal / CARD)  # of an earlier attempt
        if (model / CARD).exists():
            shutil.copyfile(model / CARD, journal / CARD)
        write_model_card(journal, report)
        report.memory = memory.as_dict()
        report.finished = now()
        report.save(journal)
        write_hashes(model, report, {path.name: _where_it_led(path) for path in _moved_back(journal)})
        for name in (CARD, FILE_NAME, HASHES):
            sync(journal / name)
        seal(journal, awaits_check=report.check is not None and report.check.is_due)
    for path in _moved_back(journal):
        move(path, model / path.name)
    (journal / JOB).unlink()
    sync(journal)
    if job.temporary:
        remove_scratch(model)
    return Report.load(model)


def _moved_back(journal: Path) -> list[Path]:
    """What is moved into the model's directory at the end; the config comes last, as loaders look for it first."""
    names = (CARD, FILE_NAME, HASHES, *sorted(path.name for path in journal.glob(f"*{_INDEX}")), CONFIG)
    return [journal / name for name in names if os.path.lexists(journal / name)]  # a link may lead nowhere from in here


class _State(TypedDict):
    """How far the run has come with a segment: the number of chunks done, and the sums of their statistics."""

    chunks: int
    totals: dict[str, Statistics]


def _change(job: Job, sources: Sources, journal: Path) -> Report:
    """Apply what the journal holds, then compute the rest."""
    shards = {name: shard.path for name, shard in sources.model.shards.items()}
    done, number, totals = _replay(job, sources, journal)
    moved = _bytes_to_move(sources)
    chunks = _changing(job, sources)
    skipped = sum(bytes_moved(sources.matches[c.index], c.count, c.begin) for c in islice(chunks, done))
    started = time.perf_counter()
    subtraction = job.subtraction(sources)
    last: Future[None] | None = None

    def complete(segment: Segment, state: _State) -> None:
        with segment:
            segment.seal(state)
            write_record(journal / _APPLYING, segment.number)
            segment.apply(shards, job.drop_cache)

    with ThreadPoolExecutor(1) as behind, Bar(moved, "change", job.progress, done=skipped) as bar:
        for group in _groups(sources, chunks):
            segment = new_segment(journal, number)
            try:
                # Before the segment can reach the shards: all that is in them was made of the inputs as they were.
                with unchanged_inputs(job, sources, changing=True, advice="put the old file back"):
                    _fill(segment, group, subtraction, totals, bar.update)
                if last is not None:
                    last.result()
            except BaseException:
                segment.close()
                raise
            done, number = done + len(group), number + 1
            state: _State = {"chunks": done, "totals": {str(index): dict(sums) for index, sums in totals.items()}}
            last = behind.submit(complete, segment, state)
        if last is not None:
            last.result()
    report = job.begun_report()
    report.add_phase("change", time.perf_counter() - started, moved - skipped)
    describe_tensors(report, sources.matches, totals)
    return report


def _replay(job: Job, sources: Sources, journal: Path) -> tuple[int, int, dict[int, Statistics]]:
    """Apply all whole segments. Returns the chunks done, the number of the next segment, and the totals.

    Raises InputError, with nothing written, if a segment that may be in the shards is damaged: its chunks would be
    subtracted a second time.
    """
    shards = {name: shard.path for name, shard in sources.model.shards.items()}
    reached = read_record(journal / _APPLYING) if (journal / _APPLYING).exists() else -1
    done, number = 0, 0
    totals: dict[int, Statistics] = {}
    with ExitStack() as stack:
        segments = [stack.enter_context(segment) for segment in valid_segments(journal)]
        states = [_read_state(segment, sources) for segment in segments]
        if reached > (segments[-1].number if segments else -1):
            raise InputError(
                f"{journal}: is damaged: segment {reached} is not what was written and may be in the shards; "
                "begin again with a copy of the model as it was"
            )
        for segment, state in zip(segments, states, strict=True):
            segment.sync()  # a process that was killed may not have flushed it
            write_record(journal / _APPLYING, max(reached, segment.number))
            segment.apply(shards, job.drop_cache)
            done, number = state["chunks"], segment.number + 1
            totals = {int(index): sums for index, sums in state["totals"].items()}
    return done, number, totals


def _read_state(segment: Segment, sources: Sources) -> _State:
    """The state of a segment. Raises InputError unless all of the segment belongs to this run."""
    shards, numbers = sources.model.shards, {str(index) for index in range(len(sources.matches))}
    inside = all(
        extent.name in shards and 0 <= extent.offset <= shards[extent.name].size - extent.size
        for extent in segment.extents
    )
    state: _State = segment.state
    if not inside or not fits(state, _State) or not state["totals"].keys() <= numbers:
        raise InputError(f"{segment.path}: does not belong to the run on {sources.model.path}")
    return state


def _fill(
    segment: Segment,
    group: list[Chunk],
    subtraction: Subtraction,
    totals: dict[int, Statistics],
    advance: Callable[[int], object],
) -> None:
    """Compute a group of chunks into a segment."""
    sources = subtraction.sources
    positions, end = {}, START
    for chunk in group:
        positions[chunk] = end
        end += chunk.count * ITEM_SIZES[sources.matches[chunk.index].theta.dtype]
    computed: list[tuple[Chunk, Statistics]] = []

    def store(chunk: Chunk, data: memoryview, statistics: Statistics) -> None:
        theta = sources.matches[chunk.index].theta
        if statistics.get("nonzero_task"):  # nothing is computed of rows that are kept
            offset = theta.begin + chunk.begin * ITEM_SIZES[theta.dtype]
            segment.put(theta.path.name, offset, data, positions[chunk])
        computed.append((chunk, statistics))

    subtraction.run(iter(group), store, advance)
    for chunk, statistics in sorted(computed, key=lambda pair: positions[pair[0]]):
        add_up(totals, chunk.index, statistics)


def _groups(sources: Sources, chunks: Iterator[Chunk]) -> Iterator[list[Chunk]]:
    """The chunks in order, as many in a group as a segment holds."""
    group: list[Chunk] = []
    size = 0
    for chunk in chunks:
        more = chunk.count * ITEM_SIZES[sources.matches[chunk.index].theta.dtype]
        if group and size + more > SEGMENT:
            yield group
            group, size = [], 0
        group.append(chunk)
        size += more
    if group:
        yield group
