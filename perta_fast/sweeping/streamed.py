"""The settings of a streamed sweep: all scored in one walk through the model, or in two if that is cheaper.

A walk is recorded after each step, and its scores when it is done: a sweep that was stopped goes on from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from perta_fast.files.durable import remove
from perta_fast.preconditioning.input_moments import PHASE
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.streaming.forward.version import Version
from perta_fast.subtraction.inputs import Sources
from perta_fast.sweeping.coarse import coarse
from perta_fast.sweeping.grid import Curve
from perta_fast.sweeping.measured import Measured, excess
from perta_fast.sweeping.opened import ByEstimator, OpenedSweep, checked_gold, checkpoints_of, open_sources
from perta_fast.sweeping.unfinished import Record
from perta_fast.sweeping.vectors import Vectors
from perta_fast.sweeping.walked_model import WalkedModel

_ORIGINAL = "the model as it is"
Setting = tuple[Curve, float]  # a curve, and the strength on it


def measure(opened: OpenedSweep, record: Record, vectors: Vectors) -> Measured:
    """Score all settings that ``record`` lacks. vectors: made if they lack. Every rank calls it."""
    ranks = opened.ranks
    with ranks.together("the disk"):
        vectors.check_space(opened.request)
    if opened.gold is not None:
        _score_gold(opened, record)
    walked = WalkedModel.open(opened, opened.sources.model.path)
    if opened.request.bounds_absolutely:  # the model as it is may break it: before the first gradient
        opened.request.bounds(_score_original(walked, record))
    importances = opened.load_given() | _estimated(opened, record)
    with ranks.together(PHASE):
        if ranks.first:
            record.keep()
            vectors.make(opened)
    rows = _Walks(walked, record, importances, vectors).rows()
    return Measured(rows, importances, walked.subject, walked.skeleton.device, walked.samples, _notes(opened, walked))


def _score_gold(opened: OpenedSweep, record: Record) -> None:
    """Score the gold model, unless ``record`` has it."""
    assert opened.gold is not None
    begun, folder = record.begun, record.walk("gold")
    if begun.gold is None:
        record.keep()
        (gold,) = WalkedModel.open(opened, opened.gold.path).score([Version("gold")], folder, "gold")
        begun.gold = opened.ranks.share(checked_gold(gold, opened.gold.path))
        record.save()
    _leave(record, "gold", opened)


def _score_original(walked: WalkedModel, record: Record) -> ScoredSetting:
    """Score the model as it is, in a walk of its own, unless ``record`` has it."""
    begun, ranks = record.begun, walked.opened.ranks
    if begun.original is None:
        record.keep()
        record.add(*ranks.share(walked.score([Version(_ORIGINAL)], record.walk("original"), _ORIGINAL)))
    _leave(record, "original", walked.opened)
    assert begun.original is not None
    return begun.original


def _estimated(opened: OpenedSweep, record: Record) -> ByEstimator:
    """The importances that were not given: those that ``record`` has, and the others, estimated layer by layer."""
    kept = opened.load_kept(record.importances)
    if kept is not None:
        return kept
    record.keep()
    with opened.ranks.together("the loading of model and data"):
        checkpoint = opened.sources.model if opened.request.at == "model" else opened.sources.base
        subject, skeleton = opened.structure(checkpoint.path)
    return opened.estimate(subject, record.importances, skeleton)


@dataclass(frozen=True)
class _Walks:
    """The walks through theta_full, all of its settings among them."""

    walked: WalkedModel
    record: Record
    importances: ByEstimator
    vectors: Vectors

    def rows(self) -> list[ScoredSetting]:
        """What all settings score, in order."""
        opened, begun = self.walked.opened, self.record.begun
        strengths = sorted(opened.request.strengths or ())
        if self._in_two():
            first = coarse(strengths)
            self._score("coarse", [(curve, lam) for curve in opened.curves for lam in first])
            rest = [(curve, lam) for curve in opened.curves for lam in strengths if lam not in first]
            self._score("fine", [setting for setting in rest if not self._beyond(*setting)])
        else:
            self._score("settings", [(curve, lam) for curve in opened.curves for lam in strengths])
        assert begun.original is not None
        opened.request.bounds(begun.original)
        rows = [begun.find(curve, lam) or curve.skipped(lam) for curve in opened.curves for lam in strengths]
        return [begun.original, *rows]

    def _in_two(self) -> bool:
        """Whether strengths beyond one that breaks the bound are left out by a first walk; decided once."""
        begun = self.record.begun
        if begun.twice is None:
            begun.twice = False
            self.record.save()
        return begun.twice

    def _beyond(self, curve: Curve, lam: float) -> bool:
        """Whether a smaller strength above 0 has broken the bound."""
        opened, begun = self.walked.opened, self.record.begun
        assert begun.original is not None
        return any(
            row.lam < lam and row.lam > 0 and curve.has(row) and excess(opened, begun.original, row) > 0
            for row in begun.rows
        )

    def _score(self, name: str, settings: Sequence[Setting]) -> None:
        """Walk once for those that are not scored yet, and for the model as it is."""
        opened, begun, record = self.walked.opened, self.record.begun, self.record
        lacking = [(curve, lam) for curve, lam in settings if begun.find(curve, lam) is None]
        original = [Version(_ORIGINAL)] if begun.original is None else []
        if lacking or original:
            record.keep()
            versions = [*original, *(self._version(curve, lam) for curve, lam in lacking)]
            found = opened.ranks.share(self.walked.score(versions, record.walk(name), f"{len(versions)} settings"))
            scored = zip(lacking, found[len(original) :], strict=True)
            record.add(*found[: len(original)], *(_named(row, curve, lam) for (curve, lam), row in scored))
        _leave(record, name, opened)

    def _version(self, curve: Curve, lam: float) -> Version:
        return Version(f"{curve.title}, lambda {lam:g}", self._sources[curve.title], curve.rule.at(lam).rescaling)

    @cached_property
    def _sources(self) -> dict[str, Sources]:
        """What the settings of each curve are made of, by its title; curves of the same inputs share them."""
        opened = self.walked.opened
        of_inputs: dict[object, Sources] = {}
        with opened.ranks.together("the inputs"):
            for curve in opened.curves:
                inputs = curve.estimator, curve.mu
                if inputs not in of_inputs:
                    importances = checkpoints_of(curve.rule, self.importances)
                    tuned = None if curve.mu is None else self.vectors.of(curve.mu)
                    of_inputs[inputs] = open_sources(opened.request, importances, tuned)
        return {curve.title: of_inputs[curve.estimator, curve.mu] for curve in opened.curves}


def _named(row: ScoredSetting, curve: Curve, lam: float) -> ScoredSetting:
    rescaling = curve.rule.rescaling
    return replace(row, rule=curve.name, p=rescaling.p, alpha=rescaling.alpha, lam=lam, mu=curve.mu)


def _leave(record: Record, name: str, opened: OpenedSweep) -> None:
    """Remove what a walk has left, now that its scores are recorded."""
    if opened.ranks.first:
        remove(record.walk(name))


def _notes(opened: OpenedSweep, walked: WalkedModel) -> list[str]:
    """What to say of a streamed sweep."""
    request, notes = opened.request, list[str]()
    if walked.left_out:
        notes.append(f"not computed, since they need text that the model generates: {', '.join(walked.left_out)}")
    if request.lams is None:
        tried = ", ".join(f"{lam:g}" for lam in request.strengths or ())
        notes.append(f"a streamed sweep cannot search, so these strengths were tried: {tried}")
    return notes
