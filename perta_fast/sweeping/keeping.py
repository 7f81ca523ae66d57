"""What a sweep keeps of what it made for its settings: importances, and the θ_f of rule ``preconditioned``.

It scores with what it keeps, as it is stored, so that ``apply`` finds the bits of each setting again.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perta_fast.checkpoints.companions import PRECONDITIONING
from perta_fast.checkpoints.fingerprint import PUT_BACK, WEIGHTS, Fingerprint, changed_file, states_below
from perta_fast.errors import InputError, RunError, advice
from perta_fast.files.apart import check_apart, check_name
from perta_fast.files.durable import discard, link_tree
from perta_fast.files.new_directory import OutputDirectory, check_output, check_replaceable, check_unfinished
from perta_fast.files.reading import exists
from perta_fast.importance.ratio import SIDES, ImportanceRatio
from perta_fast.progress import Progress
from perta_fast.records.report import FILE_NAME as REPORT
from perta_fast.rules import ESTIMATORS, PRECONDITIONED, Estimator
from perta_fast.scoring.importances import Importances, importances_in
from perta_fast.sweeping.opened import ByEstimator, OpenedSweep
from perta_fast.sweeping.request import Request
from perta_fast.sweeping.unfinished import Record
from perta_fast.sweeping.vectors import Vectors

_IMPORTANCE, _TUNED = "importance", "tuned"


def check_kept(opened: OpenedSweep) -> None:
    """Raise InputError, before anything is scored, if nothing is there to keep, or its place is not free."""
    request = opened.request
    if request.save_importance is not None and not opened.estimated():
        takes = any(curve.estimator is not None for curve in opened.curves)
        reason = "every importance was given" if takes else f"rules {', '.join(request.rules)} take none"
        raise InputError(f"‹save_importance› keeps what the sweep estimates, and {reason}; leave it out")
    if request.save_tuned is not None and not opened.mus():
        raise InputError(f"‹save_tuned› is for rule {PRECONDITIONED}; leave it out, or take that rule")
    for place in _places(request).values():
        check_output(place, overwrite=request.overwrite, inputs=opened.paths())
        check_unfinished(place, overwrite=request.overwrite)


def check_places(request: Request, out: Path | None) -> None:
    """Raise InputError if a directory that the sweep to ``out`` makes or changes lies in another."""
    places = _places(request)
    for place in places.values():
        check_name(place)
    if out is not None:
        places["out"] = out
    if request.makes_result:
        places["model" if request.in_place else "checkpoint"] = request.result
    check_apart(places)


def check_replaced(request: Request, out: Path) -> None:
    """Raise InputError if a sweep that goes on from its record in ``out`` would replace what no run has written."""
    check_places(request, out)
    names = {
        "save_importance": (*request.kept_form.entries, *ESTIMATORS),
        "save_tuned": (PRECONDITIONING, *(Vectors.name(mu) for mu in request.mus if mu is not None)),
    }
    for name, place in _places(request).items():
        check_replaceable(place, names[name], f"the sweep to {out}")
    if request.checkpoint is not None:
        check_replaceable(request.result, [REPORT], f"the sweep to {out}")


def _places(request: Request) -> dict[str, Path]:
    """The directories of what is kept, by argument."""
    places = {"save_importance": request.save_importance, "save_tuned": request.save_tuned}
    return {name: _final(place) for name, place in places.items() if place is not None}


def find_kept(opened: OpenedSweep, record: Record, vectors: Vectors) -> None:
    """See what a stopped sweep has kept; ``vectors`` then has its θ_f there. Every rank calls it.

    Raises InputError if it has changed since and the sweep has it nowhere else.
    """
    request, begun, ranks = opened.request, record.begun, opened.ranks
    kept: dict[str, dict[str, Fingerprint]] = {}
    with ranks.together("what the sweep has kept"):
        for name, place in ((_IMPORTANCE, request.save_importance), (_TUNED, request.save_tuned)):
            if not ranks.first or name not in begun.kept or place is None:
                continue
            changed = changed_file(_final(place), begun.kept[name])
            if changed is None:
                kept[name] = begun.kept[name]
            elif not _is_beside(name, opened, record, vectors):
                raise InputError(
                    f"{changed}: has changed, or is gone, since the sweep wrote it; {PUT_BACK} to go on with it, or "
                    "start over with ‹overwrite›"
                )
    begun.kept = ranks.share(kept)
    if _TUNED in begun.kept:
        vectors.kept_at(_vector_places(opened, vectors))


def _is_beside(name: str, opened: OpenedSweep, record: Record, vectors: Vectors) -> bool:
    """Whether all that is to be kept lies beside the record too: it did not get its place."""
    if name == _TUNED:
        return not vectors.missing()
    return opened.load_kept(record.importances) is not None


def load_kept(opened: OpenedSweep, record: Record) -> ByEstimator | None:
    """The importances that the sweep estimates, if a stopped one has them all: in their place, or beside its record."""
    if _IMPORTANCE in record.begun.kept:
        return {name: importances_in(place) for name, place in _importance_places(opened).items()}
    return opened.load_kept(record.importances)


def keep_importances(opened: OpenedSweep, record: Record, importances: ByEstimator) -> ByEstimator:
    """Put the estimated importances where they are kept; returns them as they are read from there.

    Every rank calls it. Without such a place they are returned as they are.
    """
    places = _importance_places(opened)
    if not places:
        return importances
    with opened.ranks.together("the kept importances"):
        if opened.ranks.first and _IMPORTANCE not in record.begun.kept:
            with _kept(opened, record, _IMPORTANCE, opened.request.save_importance) as folder:
                _write_importances(opened, importances, folder)
            if record.importances is not None:
                discard(record.importances)
    return {estimator: importances_in(place) for estimator, place in places.items()}


def keep_vectors(opened: OpenedSweep, record: Record, vectors: Vectors) -> None:
    """Put each preconditioned θ_f where it is kept; ``vectors`` then has them there. Every rank calls it."""
    places = _vector_places(opened, vectors)
    if not places:
        return
    final = _final(opened.request.save_tuned)
    with opened.ranks.together("the kept θ_f"):
        if opened.ranks.first and _TUNED not in record.begun.kept:
            with _kept(opened, record, _TUNED, opened.request.save_tuned) as folder:
                for mu, kept in places.items():
                    link_tree(vectors.of(mu), folder / kept.relative_to(final), WEIGHTS)
            vectors.discard()
    vectors.kept_at(places)


@contextmanager
def _kept(opened: OpenedSweep, record: Record, name: str, place: str | None) -> Iterator[Path]:
    """A folder to fill, which then becomes ``place``.

    It is noted before it has its name, so that after a kill the note shows whether it got it. Until then nothing of
    what it is filled with is removed elsewhere.
    """
    request = opened.request
    try:
        with OutputDirectory(_final(place), overwrite=request.overwrite, inputs=opened.paths()) as target:
            yield target.path
            _note(record, name, target)
            target.commit()
    except RunError as error:
        if record.target is None or not record.target.keep:
            raise
        going_on = record.begun.going_on(record.target.final)
        raise RunError(f"{error}. What was scored is kept; go on with: {going_on}") from error


def _note(record: Record, name: str, filled: OutputDirectory) -> None:
    """Write down what gets its name next. Raises RunError if the disk of the record fails, which may be another."""
    files = states_below(filled.path)
    try:
        record.note_kept(name, files)
    except OSError as error:
        assert record.target is not None
        raise RunError(f"{record.target.final}: could not be written: {advice(error)}") from error


def is_of_several(kept: Path) -> bool:
    """Whether a directory of ``save_importance`` has a directory for each of several estimators."""
    return any(exists(kept / estimator) for estimator in ESTIMATORS)


def _final(place: str | None) -> Path:
    return Path(os.path.realpath(str(place)))


def _importance_places(opened: OpenedSweep) -> dict[Estimator, Path]:
    """Where those of each estimator are kept, if they are; one alone takes the whole directory."""
    if opened.request.save_importance is None:
        return {}
    final, estimated = _final(opened.request.save_importance), opened.estimated()
    return {estimator: final / estimator if len(estimated) > 1 else final for estimator in estimated}


def _vector_places(opened: OpenedSweep, vectors: Vectors) -> dict[float, Path]:
    """The same for each mu."""
    if opened.request.save_tuned is None:
        return {}
    final, mus = _final(opened.request.save_tuned), opened.mus()
    return {mu: final / vectors.name(mu) if len(mus) > 1 else final for mu in mus}


def _write_importances(opened: OpenedSweep, importances: ByEstimator, folder: Path) -> None:
    form, progress = opened.request.kept_form, opened.progress
    for estimator, of_estimator in importances.items():
        below = folder / estimator
        _write(of_estimator, form.as_ratio, form.dtype, below, progress)
        if len(importances) == 1:
            for entry in below.iterdir():
                entry.rename(folder / entry.name)
            below.rmdir()


def _write(of_estimator: Importances, as_ratio: bool, dtype: str, folder: Path, progress: Progress) -> None:
    """One estimator's importances, below ``folder``."""
    if as_ratio:
        _ratio(of_estimator, dtype).save(folder, progress=progress)
        return
    assert not isinstance(of_estimator, ImportanceRatio)
    for side, importance in of_estimator.items():
        if importance.directory is None:
            importance.save(folder / side, dtype=dtype)
        else:  # estimated in the type that is kept
            link_tree(importance.directory, folder / side, WEIGHTS)


def _ratio(of_estimator: Importances, dtype: str) -> ImportanceRatio:
    assert not isinstance(of_estimator, ImportanceRatio)
    forget, retain = (of_estimator[side] for side in SIDES)
    return ImportanceRatio.of(forget, retain, dtype=dtype)
