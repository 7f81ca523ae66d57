"""A sweep of a model that fits into the memory, in one walk: inputs are read once, not once for each setting.

Only where no setting can be skipped, since all are scored together; and on a CPU, where that was measured to be faster.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from perta_fast.dtypes import ITEM_SIZES
from perta_fast.errors import InputError, NotStreamable
from perta_fast.files.durable import remove
from perta_fast.models.loading import Subject, choose_device
from perta_fast.runs.settings import threads_for
from perta_fast.scoring.criteria import GENERATED_METRICS, ORIGINAL
from perta_fast.scoring.live_model import ScoredData, ScoredModel
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.streaming.forecast.choice import Budget
from perta_fast.streaming.forecast.forward_costs import forward_estimate
from perta_fast.streaming.forward.asked import Answering, Asking
from perta_fast.streaming.forward.sample_set import SampleSet
from perta_fast.streaming.forward.score_walk import score_versions
from perta_fast.streaming.forward.version import Version, VersionScores
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule
from perta_fast.sweeping.keeping import keep_importances, keep_vectors, load_kept
from perta_fast.sweeping.measured import Measured
from perta_fast.sweeping.opened import ByEstimator, OpenedSweep
from perta_fast.sweeping.unfinished import Record
from perta_fast.sweeping.vectors import Vectors
from perta_fast.sweeping.weighing import Setting, Weighing, named

_SHOWN = "settings"
_NAME = "grid"  # of the walk


def measure_in_a_walk(opened: OpenedSweep, record: Record, vectors: Vectors) -> Measured | None:
    """Measure all settings that ``record`` lacks, and the model as it is; None if one walk cannot."""
    request = opened.request
    in_memory = bool(opened.estimated()) and record.importances is None and request.save_importance is None
    if request.is_bounded or request.metric in GENERATED_METRICS or in_memory:
        return None
    if choose_device(request.device).type != "cpu":
        return None
    try:
        subject, skeleton = opened.structure(opened.sources.model.path)
    except InputError:  # the live model may be less particular
        return None
    grid = _Grid.of(opened, record, subject, skeleton)
    every: list[Setting | None] = [None, *opened.grid()]
    if _is_narrowed(opened, skeleton) or not grid.has_room(len(every)):
        return None
    try:
        if request.criterion is not None:
            grid.score([None])
            record.begun.limits(grid.found(None))  # before the first gradient
        importances = _importances(opened, record, vectors)
        grid.score(every, Weighing(opened, importances, vectors), importances)
    except NotStreamable:
        if record.target is not None:
            remove(record.walk(_NAME))
        return None
    except OSError:
        if record.target is not None:
            raise
        return None  # the live model needs no temporary files
    rows = [grid.found(setting) for setting in every]
    return Measured(rows, importances, grid.asking.subject, skeleton.device, grid.data.samples, request.batch_size)


@dataclass(frozen=True)
class _Grid:
    """The model without its weights, and what each version of it is run over. asking: has the sets of ``data``."""

    opened: OpenedSweep
    record: Record
    skeleton: Skeleton
    asking: Asking
    data: ScoredData

    @classmethod
    def of(cls, opened: OpenedSweep, record: Record, subject: Subject, skeleton: Skeleton) -> "_Grid":
        """Tokenise all data. Raises InputError naming a line that the model cannot take."""
        request = opened.request
        asking = Asking(opened.told(subject), request.batch_size, request.max_length, progress=False)
        data = ScoredData.of(asking, opened.scored, request.metric)
        ScoredModel(asking, data, request.metric).score(_SHOWN)
        return cls(opened, record, skeleton, asking, data)

    @property
    def sets(self) -> list[SampleSet]:
        return list(self.asking.sets.values())

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.opened.request.batch_size)

    def has_room(self, count: int) -> bool:
        """Whether the disk has it for the hidden states of so many versions; the live model needs none."""
        estimate = forward_estimate(self.skeleton, [Version("")] * count, self.sets, threads=1)
        place = Path(gettempdir()) if self.record.target is None else self.record.folder
        return estimate.scratch(self.schedule) <= Budget.at(place, None, None).scratch

    def found(self, setting: Setting | None) -> ScoredSetting:
        """What was scored for a setting; None is the model as it is."""
        row = self._recorded(setting)
        assert row is not None
        return row

    def _recorded(self, setting: Setting | None) -> ScoredSetting | None:
        begun = self.record.begun
        return begun.original if setting is None else begun.find(*setting)

    def score(
        self,
        settings: Sequence[Setting | None],
        weighing: Weighing | None = None,
        importances: ByEstimator | None = None,
    ) -> None:
        """Walk for those that the record lacks, and add them to it. Raises InputError if an input is not finite."""
        lacking = [setting for setting in settings if self._recorded(setting) is None]
        if not lacking:
            return
        request, record = self.opened.request, self.record
        with TemporaryDirectory(prefix="perta-sweep-") if record.target is None else nullcontext("") as temporary:
            folder = Path(temporary) if record.target is None else record.walk(_NAME)
            found = score_versions(
                self.skeleton,
                [Version(ORIGINAL) if each is None or weighing is None else weighing.version(each) for each in lacking],
                self.sets,
                schedule=self.schedule,
                threads=threads_for(request.threads, self.opened.ranks),
                folder=folder,
                resumable=record.target is not None,
                progress=self.opened.progress,
                description=ORIGINAL if lacking == [None] else f"{len(lacking)} settings",
            )
            broken = [bool(scores.not_finite) for scores, each in zip(found, lacking, strict=True) if each is not None]
            if broken and all(broken):
                self._check_inputs(folder, importances or {})
            record.add(*map(self._row, found, lacking))
            remove(folder)

    def _check_inputs(self, folder: Path, importances: ByEstimator) -> None:
        """Raise InputError if an input is spoilt, which the live model names; then no walk is left to go on with."""
        try:
            self.opened.live().measure_original(importances)
        except InputError:
            remove(folder)
            raise

    def _row(self, found: VersionScores, setting: Setting | None) -> ScoredSetting:
        request = self.opened.request
        answering = Answering(
            self.asking.subject, request.batch_size, request.max_length, progress=False, scores=found.scores
        )
        row = ScoredModel(answering, self.data, request.metric).score(_SHOWN)
        return named(replace(row, changed=found.changed, seconds=found.seconds, not_finite=found.not_finite), setting)


def _importances(opened: OpenedSweep, record: Record, vectors: Vectors) -> ByEstimator:
    """All importances, on disk; and ``vectors`` made. One model is in memory at a time."""
    record.keep()
    vectors.make(opened)
    keep_vectors(opened, record, vectors)
    kept = load_kept(opened, record)
    if kept is None:
        subject = opened.load((opened.sources.model if opened.request.at == "model" else opened.sources.base).path)
        record.save()  # the type in which it runs
        kept = opened.estimate(subject, record.importances)
    return opened.load_given() | keep_importances(opened, record, kept)


def _is_narrowed(opened: OpenedSweep, skeleton: Skeleton) -> bool:
    """Whether the model runs in a narrower type than it is stored in: a live model is then rounded beforehand."""
    dtype: Any = skeleton.model.dtype
    sizes = (ITEM_SIZES[match.theta.dtype] for match in opened.sources.matches if match.copied is None)
    return any(size > dtype.itemsize for size in sizes)
