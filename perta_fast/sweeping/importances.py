"""The importances that a sweep weighs by: a pair for each estimator, given or estimated."""

from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.data.samples import Sample
from perta_fast.errors import InputError
from perta_fast.importance.store import STEM, Importance, read_metadata
from perta_fast.rules import Estimator, Rule
from perta_fast.runs.estimate import Estimation, estimate_on
from perta_fast.subtraction.inputs import Sources, open_importances

ByEstimator = dict[Estimator, dict[str, Importance]]  # then by role


def open_given(
    curves: Sequence[Rule], checkpoints: tuple[str, str, str], forget: Sequence[str], retain: Sequence[str]
) -> dict[Estimator, Sources]:
    """Open and match the directories that were given, a pair for each estimator.

    Raises InputError for one that does not fit the checkpoints, lacks its partner, or serves none of the rules.
    """
    given: dict[Estimator, Sources] = {}
    for pair in zip_longest(forget, retain):
        paths = [None if path is None else Path(path) for path in pair]
        held = {read_metadata(Checkpoint.open(path, STEM))["estimator"] for path in paths if path is not None}
        served = [rule for rule in curves if rule.estimator in held]
        needing = [rule for rule in curves if rule.estimator is not None]
        rule = (served or needing or list(curves))[0]
        sources = Sources.open(*checkpoints, open_importances(rule, *paths))
        assert rule.estimator is not None  # or the pair has been refused
        if rule.estimator in given:
            raise InputError(f"{pair[0]}: another importance of estimator {rule.estimator} was given already")
        given[rule.estimator] = sources
    return given


def load_given(given: Mapping[Estimator, Sources]) -> ByEstimator:
    """The importances that were given; a tensor is read when it is asked for."""
    return {
        estimator: {role: Importance.load(sources.named()[f"{role}_importance"].path) for role in ("forget", "retain")}
        for estimator, sources in given.items()
    }


def estimate(
    how: Estimation, samples: Sequence[Sample], data_hash: str, description: str, out: Path | None
) -> Importance:
    """One importance: kept in ``out``, unless a stopped sweep has kept it there; else in the host's memory."""
    if out is not None and out.exists():  # complete: it appears as a whole
        return Importance.load(out)
    importance = estimate_on(how, samples, data_hash, out=out, description=description)
    if out is not None:
        return Importance.load(out)
    importance.tensors = {name: tensor.cpu() for name, tensor in importance.tensors.items()}
    return importance


def load_kept(folder: Path, estimators: Sequence[Estimator], roles: Collection[str]) -> ByEstimator | None:
    """What a sweep that was stopped has kept in ``folder``, if it is all there."""
    if not all((folder / estimator / role).exists() for estimator in estimators for role in roles):
        return None
    return {estimator: {role: Importance.load(folder / estimator / role) for role in roles} for estimator in estimators}
