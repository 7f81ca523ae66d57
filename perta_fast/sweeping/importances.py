"""The importances that a sweep weighs by: once for each estimator, given or estimated."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.errors import InputError
from perta_fast.importance.store import STEM, Importance, read_metadata
from perta_fast.models.loading import Subject, samples_for
from perta_fast.progress import Progress
from perta_fast.rules import Estimator, Rule
from perta_fast.runs.estimate import estimate_on
from perta_fast.subtraction.inputs import Sources, open_importances
from perta_fast.sweeping.live_model import DataSet

ByEstimator = dict[Estimator, dict[str, Importance]]  # then by role


def open_given(
    curves: Sequence[Rule],
    checkpoints: tuple[str, str, str],
    forget: Sequence[str],
    retain: Sequence[str],
) -> dict[Estimator, Sources]:
    """Open and match the directories that were given, a pair for each estimator.

    Raises InputError for one that does not fit the checkpoints, lacks its partner, or serves none of the rules.
    """
    found: dict[Estimator, Sources] = {}
    for pair in zip_longest(forget, retain):
        paths = [None if each is None else Path(each) for each in pair]
        held = {_estimator(each) for each in paths if each is not None}
        served = [rule for rule in curves if rule.estimator in held]
        needing = [rule for rule in curves if rule.estimator is not None]
        rule = (served or needing or list(curves))[0]
        sources = Sources.open(*checkpoints, open_importances(rule, *paths))
        assert rule.estimator is not None  # or the pair has been refused
        if rule.estimator in found:
            raise InputError(f"{pair[0]}: another importance of estimator {rule.estimator} was given already")
        found[rule.estimator] = sources
    return found


def load_given(given: Mapping[Estimator, Sources]) -> ByEstimator:
    """Their tensors, each read when it is asked for."""
    found: ByEstimator = {}
    for estimator, sources in given.items():
        forget, retain = sources.forget_importance, sources.retain_importance
        assert forget is not None and retain is not None
        found[estimator] = {"forget": Importance.load(forget.path), "retain": Importance.load(retain.path)}
    return found


def estimate(
    subject: Subject,
    data: Mapping[str, DataSet],
    estimators: Sequence[Estimator],
    *,
    batch_size: int,
    max_length: int | None,
    progress: Progress,
    folder: Path | None,
) -> ByEstimator:
    """Importance of ``subject``'s parameters on both data sets.

    folder: keeps them, a directory for each estimator and data set; None keeps them in the host's memory.
    """
    found: ByEstimator = {each: {} for each in estimators}
    samples = {role: samples_for(subject, each.records, max_length) for role, each in data.items()}
    for estimator, by_role in found.items():
        for role, each in data.items():
            place = None if folder is None else folder / estimator / role
            if place is not None and place.exists():  # complete: it was kept before the sweep was stopped
                by_role[role] = Importance.load(place)
                continue
            importance = estimate_on(
                subject,
                samples[role],
                each.digest,
                estimator,
                batch_size=batch_size,
                out=place,
                overwrite=False,
                progress=progress,
                description=f"{role} importance, {estimator}",
            )
            if place is not None:
                importance = Importance.load(place)
            else:
                importance.tensors = {name: tensor.cpu() for name, tensor in importance.tensors.items()}
            by_role[role] = importance
    return found


def load_kept(folder: Path, estimators: Sequence[Estimator], roles: Iterable[str]) -> ByEstimator | None:
    """What ``estimate`` has kept in ``folder``, if it is all there."""
    places = {each: {role: folder / each / role for role in roles} for each in estimators}
    if not all(place.exists() for by_role in places.values() for place in by_role.values()):
        return None
    return {
        each: {role: Importance.load(place) for role, place in by_role.items()}
        for each, by_role in places.items()
    }


def _estimator(path: Path) -> str:
    return read_metadata(Checkpoint.open(path, STEM))["estimator"]
