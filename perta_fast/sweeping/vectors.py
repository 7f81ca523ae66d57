"""The θ_f that rule ``preconditioned`` subtracts, one for each mu of a sweep: made in one pass, kept until its end."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from perta_fast.errors import RunError, advice
from perta_fast.files.disk_space import check_space
from perta_fast.files.durable import discard, move, remove, sync_tree
from perta_fast.files.new_directory import PRECONDITIONING_STATE, forget
from perta_fast.preconditioning.record import Preconditioning
from perta_fast.preconditioning.unfinished import Begun, DamagedWalk
from perta_fast.progress import LOGGER
from perta_fast.rules import PRECONDITIONED
from perta_fast.runs.precondition import check_scope, vector_size
from perta_fast.subtraction.changed_inputs import check_sources_as_opened
from perta_fast.subtraction.scope import EVERYTHING, Scope
from perta_fast.sweeping.opened import OpenedSweep, open_sources
from perta_fast.sweeping.request import Request

if TYPE_CHECKING:
    from perta_fast.runs.making_tuned import Making


class Vectors:
    """They lie in ``folder``, each by the name of its mu; one that is there is complete."""

    def __init__(self, folder: Path, mus: Iterable[float]) -> None:
        self._folder, self._mus = folder, tuple(mus)
        self._kept: dict[float, Path] = {}

    def missing(self) -> list[float]:
        """Those that are not there yet."""
        return [mu for mu in self._mus if not self.of(mu).exists()]

    def of(self, mu: float) -> Path:
        """The directory of one θ_f."""
        return self._kept.get(mu, self._folder / self.name(mu))

    @property
    def _beside(self) -> Path:
        """Where those lie that are being written."""
        return self._folder.with_name(f"{self._folder.name}.partial")

    @staticmethod
    def name(mu: float) -> str:
        """That of the directory of one."""
        return f"mu-{mu!r}"

    def kept_at(self, places: Mapping[float, Path]) -> None:
        """From now on they are read where they are kept."""
        self._kept = dict(places)

    def discard(self) -> None:
        """Remove what was made, which is kept elsewhere now."""
        discard(self._folder)

    def record(self, mu: float) -> Preconditioning:
        """What was written down of one."""
        return Preconditioning.read(self.of(mu))

    def check_space(self, request: Request) -> None:
        """Raise RunError unless the disk has room for those that are missing."""
        if missing := self.missing():
            place = self._folder if request.out is None else Path(request.out)
            size = len(missing) * vector_size(Path(request.base), Path(request.tuned))
            check_space({place: size}, [self._beside])

    def make(self, opened: OpenedSweep) -> None:
        """Write those that are missing. A model is loaded for it, and is free afterwards.

        A streamed sweep makes one at a time, each in a walk of its own.
        """
        if not self.missing():
            return
        from perta_fast.runs.making_tuned import Making

        request = opened.request
        making = Making(
            base=Path(request.base),
            tuned=Path(request.tuned),
            seen_at=Path(request.model if opened.place(PRECONDITIONED) == "model" else request.base),
            retain=request.retain,
            batch_size=request.batch_size,
            max_length=request.max_length,
            chat=opened.chat,
            device=request.device,
            dtype=opened.asked_type,
            progress=opened.progress,
            stream=request.stream,
            memory=request.memory,
            device_memory=request.device_memory,
        )
        try:
            missing = self.missing()
            for mus in [[mu] for mu in missing] if request.stream else [missing]:
                self._write(making, opened, mus)
        except OSError as error:
            if request.out is not None:  # whose directory says how to go on
                raise
            raise _no_room(error) from error

    def _walk(self, making: "Making", opened: OpenedSweep, made: tuple[float, Path]) -> None:
        """Write the θ_f of one mu, from where a walk that did the same work was stopped."""
        from perta_fast.streaming.kept_walk import KeptWalk

        (mu, directory), data = made, opened.data["retain"]
        work = making.work(mu, data.digest, opened.request.fields, opened.sources)
        folder = self._beside / PRECONDITIONING_STATE
        kept = KeptWalk(folder, work, unchanged=partial(check_sources_as_opened, opened.sources))
        try:
            begun = Begun.load(folder)
            if begun is not None and begun.is_of(work) and begun.day == opened.day.isoformat():
                kept_on = replace(kept, begun=begun)
                making.going_on(begun).run(data.rows, data.digest, {mu: directory}, kept_on)
                return
        except DamagedWalk:
            LOGGER.warning("%s: what a walk has kept is damaged; it begins again", folder)
        _make_anew(self._beside, [directory])
        making.run(data.rows, data.digest, {mu: directory}, kept)

    def _write(self, making: "Making", opened: OpenedSweep, mus: Sequence[float]) -> None:
        """Write those of ``mus``, from one pass over the retain data."""
        request, data = opened.request, opened.data["retain"]
        beside = self._beside
        directories = {mu: beside / self.of(mu).name for mu in mus}
        if request.stream:
            self._walk(making, opened, *directories.items())
        else:
            _make_anew(beside, directories.values())
            making.run(data.rows, data.digest, directories)
        if Scope.of(request.only, request.leave) != EVERYTHING:
            check_scope(open_sources(request, tuned=next(iter(directories.values()))))
        sync_tree(beside)
        self._folder.mkdir(exist_ok=True)
        for mu, directory in directories.items():
            move(directory, self.of(mu))
        forget(beside)
        remove(beside)


def _make_anew(beside: Path, directories: Iterable[Path]) -> None:
    """Make empty directories in ``beside``, in place of what a sweep that was killed has left there."""
    forget(beside)
    remove(beside)
    for directory in directories:
        directory.mkdir(parents=True)


def temporary_folder() -> "TemporaryDirectory[str]":
    """Where they lie in a sweep without ``out``. Raises RunError if there is no such place."""
    try:
        return TemporaryDirectory(prefix="perta-sweep-")
    except OSError as error:
        raise _no_room(error) from error


def _no_room(error: OSError) -> RunError:
    return RunError(
        f"the directory of temporary files cannot hold what rule {PRECONDITIONED} makes: {advice(error)}. Give ‹out›, "
        "which takes its place, or set TMPDIR to another directory"
    )
