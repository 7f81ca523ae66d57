"""A setting of a sweep as weights to score, and what it scores as a row of the record."""

from dataclasses import replace

from perta_fast.scoring.setting import ScoredSetting
from perta_fast.streaming.forward.version import Version
from perta_fast.subtraction.inputs import Sources
from perta_fast.sweeping.grid import Curve
from perta_fast.sweeping.opened import ByEstimator, OpenedSweep, checkpoints_of, open_sources
from perta_fast.sweeping.vectors import Vectors

Setting = tuple[Curve, float]  # a curve, and the strength on it


class Weighing:
    """What settings are made of. importances, vectors: on disk."""

    def __init__(self, opened: OpenedSweep, importances: ByEstimator, vectors: Vectors) -> None:
        sources: dict[object, Sources] = {}
        self._of_curve: dict[str, Sources] = {}
        with opened.ranks.together("the inputs"):
            for curve in opened.curves:
                inputs = curve.estimator, curve.mu
                if inputs not in sources:
                    tuned = None if curve.mu is None else vectors.of(curve.mu)
                    sources[inputs] = open_sources(opened.request, checkpoints_of(curve.rule, importances), tuned)
                self._of_curve[curve.title] = sources[inputs]

    def version(self, setting: Setting) -> Version:
        """A setting as weights to score."""
        curve, lam = setting
        return Version(f"{curve.title}, lambda {lam:g}", self._of_curve[curve.title], curve.rule.at(lam).rescaling)


def named(row: ScoredSetting, setting: Setting | None) -> ScoredSetting:
    """What was scored, with the setting that it was scored for; None is the model as it is."""
    if setting is None:
        return row
    curve, lam = setting
    rescaling = curve.rule.rescaling
    return replace(row, rule=curve.name, p=rescaling.p, alpha=rescaling.alpha, lam=lam, mu=curve.mu)
