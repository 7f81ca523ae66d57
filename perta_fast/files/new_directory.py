"""A new directory that appears whole or not at all."""

import errno
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from perta_fast.errors import InputError, Interrupted, NotFiniteError, RunError, advice, is_out_of_memory, shell_command
from perta_fast.files.apart import check_inputs_stay, check_name, input_in
from perta_fast.files.disk_space import existing_parent
from perta_fast.files.durable import move, read_record, remove, sync, sync_tree, write_record
from perta_fast.files.identity import is_same, lies_in
from perta_fast.files.journal import JOB, check_finished
from perta_fast.files.locking import lock
from perta_fast.files.mounts import mounts_in
from perta_fast.files.own import check_own, check_own_tree, make_own_directory, remove_own_file
from perta_fast.files.reading import checked_path, exists

# Below the directory that is being built: the state of a run or sweep. With its record, it can be resumed.
RUN_STATE, SWEEP_STATE = ".perta-run", ".perta-sweep"
SWEEP_RECORD = "begun.json"
EVALUATION_STATE, EVALUATION_RECORD = ".perta-evaluation", "begun.json"  # beside an output file
TUNING_STATE, TUNING_RECORD = ".perta-tuning", "begun.json"  # below the directory that is built
# Below the directory that θ_f is built in, with a walk that preconditions: the same command goes on with it.
PRECONDITIONING_STATE, PRECONDITIONING_RECORD = ".perta-preconditioning", "begun.json"
RESULT = "result"  # the output file there, until it gets its name
_KEPT_STATE, _KEPT_RECORD = ".perta-importance", "run.json"  # importances that a run writes, and keeps: names the run
_RECORDS = {RUN_STATE: JOB, SWEEP_STATE: SWEEP_RECORD, EVALUATION_STATE: EVALUATION_RECORD}
_RECORDS |= {TUNING_STATE: TUNING_RECORD, PRECONDITIONING_STATE: PRECONDITIONING_RECORD, _KEPT_STATE: _KEPT_RECORD}
_RESUMED = (RUN_STATE, SWEEP_STATE, EVALUATION_STATE, TUNING_STATE)  # by perta resume
START_OVER = "start over with ‹overwrite›"


class OutputDirectory:
    """Builds ``final`` under a hidden name beside it and renames it at the end.

    A context manager: write below ``path``, then call ``commit``. Without a commit the end of the context removes
    ``path``, unless ``keep`` is set because the run can be resumed. After a kill ``path`` stays: the next run to
    ``final`` empties it, or goes on with it if ``resume``.

    again: ``RUN_STATE`` if the caller knows that an unfinished run to ``final`` holds no work. walk: the place of θ_f
    whose stopped walk is the caller's own. run: the destination of the run that keeps importances in ``final``. It is
    recorded, in ``final`` too until ``forget_run``: others give the importances up only if ``overwrite``, as they do
    with an unfinished run to ``final``. going_on: what goes on with a run that is kept; "" is ``perta resume``.

    Raises InputError as ``check_output`` and ``check_unfinished`` do, RunError if the directory cannot be written.
    """

    def __init__(
        self,
        final: str | Path,
        *,
        overwrite: bool = False,
        inputs: Iterable[Path] = (),
        resume: bool = False,
        again: str = "",
        walk: Path | None = None,
        run: Path | None = None,
        going_on: str = "",
    ) -> None:
        self.final = Path(os.path.realpath(checked_path(final)))  # behind a link, so that the link stays
        _check_place(self.final, overwrite=overwrite, inputs=inputs)
        self._check = partial(check_unfinished, self.final, overwrite=overwrite, again=again, walk=walk, run=run)
        if not resume:
            self._check()
        self._run = run
        self.path, self._replaced = partial_path(self.final), _replaced_path(self.final)
        self.keep = self._resume = resume
        self._overwrite = overwrite
        self._gives_up_walk = overwrite and not resume and walk != importance_path(self.final)
        self._going_on = going_on
        self._complete = False
        self._locked = ExitStack()

    def __enter__(self) -> "OutputDirectory":
        with beginning(self.final, self._locked):
            self.final.parent.mkdir(parents=True, exist_ok=True)
            take(self.path, self._locked, resume=self._resume, check=self._check)
            if self._gives_up_walk:
                _discard_walk(self.final)
            remove_replaced(self.final)
            if self._run is not None and not self._resume:
                (self.path / _KEPT_STATE).mkdir()
                write_record(self.path / _KEPT_STATE / _KEPT_RECORD, str(self._run))
                sync(self.path)  # the run looks for this record when it is resumed
                sync(self.path.parent)
        return self

    def keep_on_error(self) -> None:
        """From now on an error keeps what is there, also one that the same run would meet again."""
        self.keep = self._resume = True

    def commit(self) -> None:
        """Flush everything, then rename: the old directory aside if ``overwrite``, the new one to its name."""
        sync_tree(self.path)
        self._complete = True
        if self._overwrite and self.final.exists():
            remove(self._replaced)
            move(self.final, self._replaced)
        move(self.path, self.final)  # fails if a directory is there that is not empty
        remove_replaced(self.final)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        hopeless = isinstance(error, InputError | NotFiniteError) and not self._resume
        unnamed = self._complete and isinstance(error, OSError) and self.path.exists()  # only a rename failed
        if not unnamed and (hopeless or not self.keep):  # gone already after a commit
            forget(self.path)
            remove(self.path)
        if self._replaced.exists() and not self.final.exists():  # stopped between the two renames
            self._replaced.rename(self.final)
        self._locked.close()
        if isinstance(error, OSError):
            raise RunError(
                f"{self.final}: could not be written: {advice(error)}. The inputs are untouched; {self._rest(unnamed)}"
            ) from error

    def _rest(self, unnamed: bool) -> str:
        """What to do after an error. unnamed: all is written, but could not be renamed."""
        finish = f"finish it with: {self._going_on or shell_command('perta', 'resume', self.final)}"
        if not unnamed:
            return finish if self.keep else "nothing was left behind"
        if not self.keep:
            finish = f"give it its name: {shell_command('mv', self.path, self.final)}"
        here = f"move {self.final} away, then " if self.final.exists() else ""
        return f"the result is complete, in {self.path}; {here}{finish}"


@contextmanager
def kept_if_stopped(
    target: OutputDirectory, what: str, going_on: str, *, passed_on: type[BaseException] | tuple[()] = ()
) -> Iterator[None]:
    """Say how to go on if a run is stopped when some of its work is kept in ``target``.

    what: that something is kept, in a clause. going_on: the command. passed_on: what says itself how to go on.
    """
    try:
        yield
    except passed_on:
        raise
    except KeyboardInterrupt:
        if not target.keep:
            raise
        raise Interrupted(f"interrupted; {what}. Go on with: {going_on}") from None
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error) and target.keep:
            raise RunError(f"out of memory; {what}. Go on where more is free with: {going_on}") from error
        raise


@contextmanager
def beginning(final: Path, locked: ExitStack) -> Iterator[None]:
    """Explain errors of a run to ``final`` that begins, and close ``locked`` then."""
    try:
        yield
    except BlockingIOError:
        raise RunError(f"{final}: another run is writing it now") from None
    except (OSError, InputError) as error:
        locked.close()
        if isinstance(error, InputError):
            raise
        raise RunError(f"{final}: cannot be written: {error.strerror}") from error


def take(path: Path, locked: ExitStack, *, resume: bool, check: Callable[[], object] = lambda: None) -> None:
    """Make or take the directory of unfinished work, lock it until ``locked`` is closed, and check or empty it.

    check: called before it is emptied; another run may have been there since it was looked at.
    """
    make_own_directory(path)
    locked.callback(os.close, lock(path))
    if resume:
        check_own_tree(path)
        return
    check()
    forget(path)
    for entry in path.iterdir():  # of a run that was killed, or is given up
        remove(entry)


def partial_path(final: Path) -> Path:
    """The hidden name under which a run builds ``final``."""
    return final.with_name(f".{final.name}.perta-partial")


def leftovers(final: Path) -> list[Path]:
    """What a command that was killed may have left beside ``final``, which the next one empties."""
    resolved = Path(os.path.realpath(final))
    return [partial_path(resolved)] if resolved.name else []


def has_record(final: Path, state: str) -> bool:
    """Whether there is an unfinished run (``RUN_STATE``), sweep or evaluation to ``final``, with its record."""
    return bool(final.name) and exists(partial_path(final) / state / _RECORDS[state])


def has_unfinished(final: Path, again: str = "", walk: Path | None = None, run: Path | None = None) -> bool:
    """Whether a run to ``final`` was stopped that can go on. again, walk, run: as in ``OutputDirectory``."""
    keeping = keeping_run(final)
    if keeping is not None and (run is None or not is_same(keeping, run)):
        return True
    return any(has_record(final, state) for state in _RESUMED if state != again) or has_walk(final, walk)


def has_walk(final: Path, own: Path | None = None) -> bool:
    """Whether a walk was stopped that preconditions for ``final``, or makes θ_f there; ``own`` is not counted."""
    places = (final, importance_path(final)) if final.name else ()
    return any(has_record(place, PRECONDITIONING_STATE) for place in places if place != own)


def keeping_run(final: Path) -> Path | None:
    """The destination of the unfinished run whose importances lie beside ``final``, which will hold them."""
    run = _recorded_run(partial_path(final)) if final.name else None
    try:
        job = {} if run is None or not has_record(run, RUN_STATE) else read_record(partial_path(run) / RUN_STATE / JOB)
        return run if is_same(job["stream"]["save"], final) else None
    except (InputError, LookupError, TypeError, ValueError):  # that run was given up
        return None


def is_kept_by(directory: Path, run: Path) -> bool:
    """Whether the unfinished run to ``run`` has made ``directory``, to keep its importances there."""
    recorded = _recorded_run(directory)
    return recorded is not None and is_same(recorded, run)


def forget_run(directory: Path, run: Path) -> None:
    """Remove the record by which ``is_kept_by`` knows the run, which is finished."""
    if is_kept_by(directory, run):
        remove(directory / _KEPT_STATE)


def _recorded_run(directory: Path) -> Path | None:
    path = directory / _KEPT_STATE / _KEPT_RECORD
    try:
        return checked_path(str(read_record(path))) if exists(path) else None
    except InputError:
        return None


def check_unfinished(
    final: Path,
    *,
    overwrite: bool,
    again: str = "",
    walk: Path | None = None,
    run: Path | None = None,
    instead: str = START_OVER,
) -> None:
    """Raise InputError, with the command that finishes it, if a run or sweep to ``final`` was stopped.

    overwrite: no error. again, walk, run: as in ``OutputDirectory``. instead: what else can be done.
    """
    resolved = Path(os.path.realpath(checked_path(final)))
    if not overwrite and has_unfinished(resolved, again, walk, run):
        raise InputError(unfinished_advice(resolved, instead))


def unfinished_advice(final: Path, instead: str = START_OVER) -> str:
    """What to do about another run's unfinished work."""
    run = keeping_run(final)
    finishing = f"finish it with: {shell_command('perta', 'resume', run or final)}"
    if run is None and only_a_walk(final):
        finishing = "finish it with the command that began it"
    what = "to this place" if run is None else "which keeps its importances here"
    if run is not None and instead == START_OVER:
        instead = "give it up with ‹overwrite›"
    return f"{final}: another run {what} was stopped; {finishing}, or {instead}"


def only_a_walk(final: Path) -> bool:
    """Whether nothing but a walk was stopped that preconditions for ``final``, or makes θ_f there."""
    return has_walk(final) and not any(has_record(final, state) for state in _RESUMED)


def discard_unfinished(final: Path) -> None:
    """Remove the unfinished run or sweep to ``final``, if there is one. Raises RunError if it is going on."""
    resolved = Path(os.path.realpath(final))
    if was_killed_early(partial_path(resolved)) or has_unfinished(resolved, walk=importance_path(resolved)):
        _discard(partial_path(resolved), resolved)
    _discard_walk(resolved)


def _discard_walk(final: Path) -> None:
    """Remove the walk that was stopped and preconditions for a result at ``final``, if there is one."""
    if final.name and has_record(importance_path(final), PRECONDITIONING_STATE):
        _discard(scratch_path(final), final)


def _discard(path: Path, final: Path) -> None:
    """Remove the unfinished work in ``path``. Raises RunError if the run is going on."""
    check_own(path)
    try:
        with ExitStack() as locked:
            locked.callback(os.close, lock(path))
            forget(path)
            remove(path)
    except BlockingIOError:
        raise RunError(f"{final}: another run is writing it now") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be removed: {error.strerror}") from error


def was_killed_early(path: Path) -> bool:
    """Whether ``path``, beside an output file, is the directory of a run that was killed before it had a record.

    A directory that holds anything else is not a run's.
    """
    own = (*_RECORDS, RESULT)
    return path.is_dir() and not path.is_symlink() and all(entry.name in own for entry in path.iterdir())


def forget(path: Path) -> None:
    """Remove the records first: a kill may come when half of ``path`` is gone, and that must not be resumed."""
    for record in (path / state / name for state, name in _RECORDS.items()):
        with suppress(OSError):  # the rest is removed even if the disk fails
            if record.exists() and not record.parent.is_symlink():
                remove_own_file(record)
                sync(record.parent)


def _replaced_path(final: Path) -> Path:
    return final.with_name(f".{final.name}.perta-replaced")


def remove_replaced(final: Path) -> None:
    """Remove the directory that was at ``final`` before, if a run was killed before it removed it.

    It stays while ``final`` is missing, after a kill between the two renames. A link or a file of its name stays
    too: no run makes one.
    """
    replaced = _replaced_path(final)
    if final.exists() and replaced.is_dir() and not replaced.is_symlink():
        remove(replaced)


def check_output(final: Path, *, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Raise InputError if ``final`` is or holds an input, is no directory, or, without ``overwrite``, is not empty.

    Nor may it be a model that a run in place has half changed, or lie where runs keep unfinished work.
    """
    check_name(final)
    _check_place(final, overwrite=overwrite, inputs=inputs)


def _check_place(final: Path, *, overwrite: bool, inputs: Iterable[Path]) -> None:
    """``check_output`` for a directory of a name that a run may choose itself."""
    inputs = list(inputs)
    check_free(final, overwrite=overwrite, inputs=inputs)
    resolved = Path(os.path.realpath(final))
    if mounts := mounts_in(resolved):
        inside = shell_command(final / "NAME")
        what = f"is a mount point, which cannot be replaced; name a new directory in it, such as {inside}"
        if mounts[0] != resolved:
            what = f"holds the mount point {mounts[0]}, whose content would be removed; choose another directory"
        raise InputError(f"{final}: {what}")
    for path in (partial_path(resolved), _replaced_path(resolved)):
        check_own(path)
    check_inputs_stay(final, (partial_path(resolved), _replaced_path(resolved)), inputs)
    check_writable(resolved)


def check_free(
    final: Path,
    *,
    overwrite: bool,
    inputs: Iterable[Path],
    instead: str = "choose another directory or pass ‹overwrite›",
) -> None:
    """``check_output`` for a directory that is filled where it lies. instead: what to do if it is not empty."""
    resolved = Path(os.path.realpath(checked_path(final)))
    if not resolved.name:
        raise InputError(f"{final}: is the root of the file system; choose another output directory")
    inputs = [checked_path(path) for path in inputs]
    contained = next((path for path in inputs if lies_in(path, resolved)), None)
    if contained is None and overwrite:
        contained = input_in(resolved, inputs)
    if contained is not None:
        raise InputError(f"{final}: is or contains the input {contained}; choose another output directory")
    check_finished(resolved)  # with the journal, its model would be lost
    try:
        occupied = any(final.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise InputError(f"{final}: is not a directory, or lies below a file") from error
    except OSError as error:
        raise InputError(f"{final}: cannot be read: {error.strerror}") from error
    if occupied and not overwrite:
        raise InputError(f"{final}: exists and is not empty; {instead}")
    locked = next((folder for folder, _, _ in os.walk(resolved) if not os.access(folder, os.W_OK | os.X_OK)), None)
    if occupied and locked is not None:
        raise InputError(
            f"{locked}: may not be written, so what is in it cannot be removed; change its rights, or choose another "
            "directory"
        )


def check_replaceable(directory: Path, names: Collection[str], resuming: str) -> None:
    """Raise InputError if a run that goes on from a record would replace what no run has written.

    The record alone says that ``directory`` may be replaced, and others may have written it. names: those of entries by
    which a run's own result is known, one is enough. resuming: what goes on, for the message.
    """
    present = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if present and present.isdisjoint(names):
        raise InputError(f"{directory}: holds what no run has written; move it away to go on with {resuming}")


def check_writable(path: Path) -> None:
    """Raise RunError if no file or directory can be made beside ``path``, before hours of work for it."""
    holder = existing_parent(path.parent)
    if not os.access(holder, os.W_OK | os.X_OK):
        read_only = os.statvfs(holder).f_flag & os.ST_RDONLY
        raise RunError(f"{path}: cannot be written: {os.strerror(errno.EROFS if read_only else errno.EACCES)}")


def scratch_path(destination: Path) -> Path:
    """Where a run to, or on, ``destination`` keeps importances that it removes at its end."""
    return partial_path(importance_path(destination))


def remove_scratch(destination: Path) -> None:
    """Remove these importances, or a θ_f with the state of its walk."""
    forget(scratch_path(destination))
    remove(scratch_path(destination))


def importance_path(destination: Path) -> Path:
    """The name that these importances would have if they were kept."""
    return destination.with_name(f".{destination.name}.perta-importance")
