"""The settings of a streamed sweep: all scored in one walk through the model, or in two if that is cheaper.

A walk is recorded after each step, and its scores when it is done: a sweep that was stopped goes on from there.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perta_fast.memory import return_freed_blocks
from perta_fast.preconditioning.input_moments import PHASE
from perta_fast.runs.settings import threads_for
from perta_fast.scoring.base_loss import checked_base_loss
from perta_fast.scoring.criteria import ORIGINAL
from perta_fast.scoring.search import closer
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.streaming.forecast.forward_costs import ForwardEstimate, forward_estimate
from perta_fast.streaming.forward.version import Version
from perta_fast.sweeping.coarse import coarse
from perta_fast.sweeping.grid import Curve
from perta_fast.sweeping.keeping import keep_importances, keep_vectors, load_kept
from perta_fast.sweeping.measured import Measured, excess
from perta_fast.sweeping.opened import ByEstimator, OpenedSweep, checked_gold
from perta_fast.sweeping.unfinished import Record, WalkPlan
from perta_fast.sweeping.vectors import Vectors
from perta_fast.sweeping.walk_plan import Planning
from perta_fast.sweeping.walked_model import WalkedModel
from perta_fast.sweeping.weighing import Setting, Weighing, named

_SETTINGS, _BASE = "settings", "base"  # walks, and their plans; another is ORIGINAL


def measure(opened: OpenedSweep, record: Record, vectors: Vectors) -> Measured:
    """Score all settings that ``record`` lacks. vectors: made if missing. Every rank calls it."""
    ranks, begun = opened.ranks, record.begun
    with ranks.together("the disk"):
        vectors.check_space(opened.request)
    walks = _Walks(WalkedModel.open(opened, opened.sources.model.path), record)
    if opened.request.up_to_base and begun.base is None:
        begun.base = walks.base_loss()
        record.save()
    if opened.gold is not None and begun.gold is None:
        gold = _Walks(WalkedModel.open(opened, opened.gold.path), record).alone("gold")
        begun.gold = checked_gold(gold, opened.gold.path)
        record.save()
    if opened.request.bounds_absolutely and begun.original is None:  # it may break the bound: before the first gradient
        record.add(walks.alone(ORIGINAL))
        begun.limits(walks.original)
    importances = opened.load_given() | keep_importances(opened, record, _estimated(opened, record))
    with ranks.together(PHASE):
        if ranks.first:
            record.keep()
            vectors.make(opened)
    keep_vectors(opened, record, vectors)
    rows = walks.settings(Weighing(opened, importances, vectors))
    walked, batch_size, notes = walks.walked, begun.plans[_SETTINGS].batch_size, _notes(opened)
    device = walked.skeleton.device
    return Measured(rows, importances, walked.subject, device, walked.samples, batch_size, notes)


def _estimated(opened: OpenedSweep, record: Record) -> ByEstimator:
    """The importances that were not given: those that ``record`` has, and the others, estimated layer by layer."""
    kept = load_kept(opened, record)
    if kept is not None:
        return kept
    record.keep()
    with opened.ranks.together("the loading of model and data"):
        checkpoint = opened.sources.model if opened.request.at == "model" else opened.sources.base
        subject, skeleton = opened.structure(checkpoint.path)
        record.save()  # the type in which it runs
    return opened.estimate(subject, record.importances, skeleton)


@dataclass(frozen=True)
class _Walks:
    """The walks through one model. What they score is in ``record`` when they are done."""

    walked: WalkedModel
    record: Record

    @property
    def original(self) -> ScoredSetting:
        """What the model as it is scores."""
        assert self.record.begun.original is not None
        return self.record.begun.original

    def alone(self, name: str) -> ScoredSetting:
        """What the model scores as it is, in a walk of its own."""
        folder, versions = self.record.walk(name, alone=True), [Version(name)]
        return self._walk(folder, versions, self._plan(name, folder, versions, 0))[0]

    def base_loss(self) -> float:
        """The loss of theta_0 on the forget data, in a walk through it. Raises InputError if it cannot be scored."""
        opened, folder = self.walked.opened, self.record.walk(_BASE, alone=True)
        with opened.ranks.together("base"):
            walked = self.walked.of_base()
        plan = replace(self, walked=walked)._plan(_BASE, folder, [Version(_BASE)], 0)
        self.record.keep()
        loss: float = opened.ranks.share(walked.forget_loss(folder, plan.schedule))
        return checked_base_loss(opened.sources.base.path, loss)

    def settings(self, weighing: Weighing) -> list[ScoredSetting]:
        """What all settings score, in order."""
        opened, begun = self.walked.opened, self.record.begun
        strengths = sorted(opened.request.strengths or ())
        every = opened.grid()
        versions = [Version(ORIGINAL), *map(weighing.version, every)]
        place = self.record.walk(_SETTINGS)
        plan = self._plan(_SETTINGS, place, versions, len(opened.curves) if opened.request.is_bounded else 0)
        if plan.twice:
            first = [setting for setting in every if setting[1] in coarse(strengths)]
            self._score("coarse", first, weighing, plan)
            rest = [setting for setting in every if setting not in first and not self._beyond(*setting)]
            self._score("fine", rest, weighing, plan)
        else:
            self._score(_SETTINGS, every, weighing, plan)
        begun.limits(self.original)
        more = self._closer_settings() if opened.request.searches_streamed else []
        if more:
            self._score("closer", more, weighing, plan)
        order = sorted([*every, *more], key=lambda setting: (opened.curves.index(setting[0]), setting[1]))
        return [self.original, *(begun.find(curve, lam) or curve.skipped(lam) for curve, lam in order)]

    def _closer_settings(self) -> list[Setting]:
        """Strengths of each curve between the largest of the row that keeps the bound and the next, which breaks it."""
        opened, begun = self.walked.opened, self.record.begun
        limits = begun.limits(self.original)
        found: list[Setting] = []
        for curve in opened.curves:
            low = self.original
            for row in (begun.find(curve, lam) for lam in sorted(opened.request.strengths or ())):
                if row is None:  # a smaller one has broken the bound
                    break
                if not row.keeps(limits):
                    found += [(curve, lam) for lam in closer(low, row, self.original, limits)]
                    break
                low = row
        return found

    def _beyond(self, curve: Curve, lam: float) -> bool:
        """Whether a smaller strength above 0 has broken the bound."""
        smaller = (row for row in self.record.begun.rows if curve.has(row) and 0 < row.lam < lam)
        return any(excess(self.record.begun, self.original, row) > 0 for row in smaller)

    def _score(self, name: str, settings: Sequence[Setting], weighing: Weighing, plan: WalkPlan) -> None:
        """Walk for those that are not scored yet, and for the model as it is, with as many at once as the plan has."""
        begun, record = self.record.begun, self.record
        asked: list[Setting | None] = [None, *settings]
        for begin in range(0, len(asked), plan.most):
            some = [
                setting
                for setting in asked[begin : begin + plan.most]
                if (begun.original if setting is None else begun.find(*setting)) is None
            ]
            if some:
                versions = [Version(ORIGINAL) if setting is None else weighing.version(setting) for setting in some]
                found = self._walk(record.walk(f"{name}-{begin}"), versions, plan)
                record.add(*(named(row, setting) for row, setting in zip(found, some, strict=True)))

    def _plan(self, name: str, folder: Path, versions: Sequence[Version], curves: int) -> WalkPlan:
        """How to walk: as was decided before the sweep was stopped. folder, curves: as in ``Planning``."""
        begun, opened, walked = self.record.begun, self.walked.opened, self.walked
        if name in begun.plans:
            return begun.plans[name]
        ranks, plan = opened.ranks, None
        threads = threads_for(opened.request.threads, ranks)
        if opened.request.memory is not None:
            return_freed_blocks()

        def estimate(count: int) -> ForwardEstimate:
            return forward_estimate(walked.skeleton, versions[-count:], walked.sets, threads, ranks.world)

        with ranks.together("the choice of a schedule"):
            if ranks.first:
                shard = walked.skeleton.first_shard
                planning = Planning(estimate, len(versions), curves, opened.request, folder, shard, ranks.world)
                plan, forecast = planning.plan(announce=opened.progress is True)
                if opened.progress is True and forecast is not None:
                    print(forecast.text, file=sys.stderr)
        begun.plans[name] = ranks.share(plan)
        self.record.save()
        return begun.plans[name]

    def _walk(self, folder: Path, versions: Sequence[Version], plan: WalkPlan) -> list[ScoredSetting]:
        self.record.keep()
        shown = versions[0].name if len(versions) == 1 else f"{len(versions)} settings"
        found = self.walked.score(versions, folder, shown, plan.schedule)
        rows: list[ScoredSetting] = self.walked.opened.ranks.share(found)
        return rows


def _notes(opened: OpenedSweep) -> list[str]:
    """What to say of a streamed sweep."""
    request = opened.request
    if not request.searches_streamed:
        return []
    tried = ", ".join(f"{lam:g}" for lam in request.strengths or ())
    return [f"first these strengths were tried, in one walk or two: {tried}; then some closer to the bound"]
