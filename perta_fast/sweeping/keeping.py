"""What a sweep keeps of what it made for its settings: importances, and the θ_f of rule ``preconditioned``.

It scores with what it keeps, as it is stored, so that ``apply`` finds the bits of each setting again.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from perta_fast.checkpoints.companions import PRECONDITIONING
from perta_fast.errors import InputError
from perta_fast.files.apart import check_name
from perta_fast.files.identity import lies_in
from perta_fast.files.new_directory import OutputDirectory, check_output, check_replaceable, check_unfinished
from perta_fast.files.reading import exists
from perta_fast.importance.ratio import SIDES, ImportanceRatio
from perta_fast.progress import Progress
from perta_fast.rules import ESTIMATORS, PRECONDITIONED, Estimator
from perta_fast.scoring.importances import Importances, importances_in, metadata_of
from perta_fast.sweeping.opened import ByEstimator, OpenedSweep
from perta_fast.sweeping.request import Request
from perta_fast.sweeping.unfinished import Begun, Record
from perta_fast.sweeping.vectors import Vectors

_IMPORTANCE, _TUNED = "importance", "tuned"


def check_kept(opened: OpenedSweep, out: Path | None) -> None:
    """Raise InputError, before anything is scored, if nothing is there to keep, or its place is not free.

    out: the directory of the sweep.
    """
    request = opened.request
    if request.save_importance is not None and not opened.lacking():
        takes = any(curve.estimator is not None for curve in opened.curves)
        reason = "every importance was given" if takes else f"rules {', '.join(request.rules)} take none"
        raise InputError(f"‹save_importance› keeps what the sweep estimates, and {reason}; leave it out")
    if request.save_tuned is not None and not opened.mus():
        raise InputError(f"‹save_tuned› is for rule {PRECONDITIONED}; leave it out, or take that rule")
    _check_apart(request, out)
    for place in _places(request):
        check_output(place, overwrite=request.overwrite, inputs=opened.paths())
        check_unfinished(place, overwrite=request.overwrite)


def check_places(request: Request, out: Path) -> None:
    """Raise InputError if a sweep that goes on from its record in ``out`` would replace what no run has written."""
    _check_apart(request, out)
    names = {
        request.save_importance: (*request.kept_form.entries, *ESTIMATORS),
        request.save_tuned: (PRECONDITIONING, *(Vectors.name(mu) for mu in request.mus if mu is not None)),
    }
    for place in _places(request):
        check_replaceable(place, names[str(place)], f"the sweep to {out}")


def _check_apart(request: Request, out: Path | None) -> None:
    places = _places(request)
    others = [*([] if out is None else [out]), *([request.result] if request.makes_result else [])]
    for place in places:
        check_name(place)
        apart = [*others, *(other for other in places if other is not place)]
        for other in map(Path, map(os.path.realpath, apart)):
            final = Path(os.path.realpath(place))
            if lies_in(final, other) or lies_in(other, final):
                raise InputError(f"{place} and {other} must lie apart, neither within the other")


def _places(request: Request) -> list[Path]:
    """The directories of what is kept."""
    return [Path(place) for place in (request.save_importance, request.save_tuned) if place is not None]


def find_kept(opened: OpenedSweep, begun: Begun, vectors: Vectors) -> None:
    """Let ``vectors`` have those that the sweep has kept before it was stopped."""
    if _TUNED in begun.kept:
        vectors.kept_at(_vector_places(opened, vectors))


def load_kept(opened: OpenedSweep, record: Record) -> ByEstimator | None:
    """The lacking importances that a stopped sweep has, where they are kept or beside its record, if all are there."""
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
            if not _are_there(importances, places):
                _write_importances(opened, importances)
            record.note_kept(_IMPORTANCE)
    return {estimator: importances_in(place) for estimator, place in places.items()}


def keep_vectors(opened: OpenedSweep, record: Record, vectors: Vectors) -> None:
    """Put each preconditioned θ_f where it is kept; ``vectors`` then has them there. Every rank calls it."""
    places = _vector_places(opened, vectors)
    if not places:
        return
    final = _final(opened.request.save_tuned)
    with opened.ranks.together("the kept θ_f"):
        if opened.ranks.first and _TUNED not in record.begun.kept:
            with OutputDirectory(final, overwrite=opened.request.overwrite, inputs=opened.paths()) as target:
                for mu, kept in places.items():
                    _move_into(vectors.of(mu), target.path / kept.relative_to(final))
                target.commit()
            record.note_kept(_TUNED)
    vectors.kept_at(places)


def is_of_several(kept: Path) -> bool:
    """Whether a directory of ``save_importance`` has a directory for each of several estimators."""
    return any(exists(kept / estimator) for estimator in ESTIMATORS)


def _final(place: str | None) -> Path:
    return Path(os.path.realpath(str(place)))


def _importance_places(opened: OpenedSweep) -> dict[Estimator, Path]:
    """Where those of each estimator are kept, if they are; one alone takes the whole directory."""
    if opened.request.save_importance is None:
        return {}
    final, lacking = _final(opened.request.save_importance), opened.lacking()
    return {estimator: final / estimator if len(lacking) > 1 else final for estimator in lacking}


def _vector_places(opened: OpenedSweep, vectors: Vectors) -> dict[float, Path]:
    """The same for each mu."""
    if opened.request.save_tuned is None:
        return {}
    final, mus = _final(opened.request.save_tuned), opened.mus()
    return {mu: final / vectors.name(mu) if len(mus) > 1 else final for mu in mus}


def _write_importances(opened: OpenedSweep, importances: ByEstimator) -> None:
    request, progress = opened.request, opened.progress
    final = _final(request.save_importance)
    if len(importances) == 1 and request.kept_form.as_ratio:
        (of_estimator,) = importances.values()
        _ratio(of_estimator, request.kept_form.dtype).save(final, overwrite=request.overwrite, progress=progress)
        return
    with OutputDirectory(final, overwrite=request.overwrite, inputs=opened.paths()) as target:
        for estimator, of_estimator in importances.items():
            folder = target.path if len(importances) == 1 else target.path / estimator
            _write(of_estimator, request.kept_form.as_ratio, request.kept_form.dtype, folder, progress)
        target.commit()


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
            _move_into(importance.directory, folder / side)


def _ratio(of_estimator: Importances, dtype: str) -> ImportanceRatio:
    assert not isinstance(of_estimator, ImportanceRatio)
    forget, retain = (of_estimator[side] for side in SIDES)
    return ImportanceRatio.of(forget, retain, dtype=dtype)


def _are_there(importances: ByEstimator, places: Mapping[Estimator, Path]) -> bool:
    """Whether the sweep has written them before it was stopped: of the same data, taken at the same place."""
    try:
        found = {name: metadata_of(importances_in(place)) for name, place in places.items()}
    except InputError:
        return False
    return found == {name: metadata_of(of_estimator) for name, of_estimator in importances.items()}


def _move_into(source: Path, target: Path) -> None:
    """What is in ``source``, in ``target``; copied if that is on another disk."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir()):
        shutil.move(entry, target / entry.name)
    source.rmdir()
