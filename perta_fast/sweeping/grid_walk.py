"""A sweep of a model that fits into the memory, in one walk: inputs are read once, not once for each setting.

Only where no setting can be skipped, since all are scored together; and on a CPU, where that was measured to be faster.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from perta_fast.dtypes import ITEM_SIZES
from perta_fast.errors import NotStreamable
from perta_fast.files.durable import remove
from perta_fast.models.loading import Subject
from perta_fast.runs.settings import threads_for
from perta_fast.scoring.criteria import GENERATED_METRICS
from perta_fast.scoring.live_model import ScoredData, ScoredModel
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.streaming.forward.asked import Answering, Asking
from perta_fast.streaming.forward.score_walk import score_versions
from perta_fast.streaming.forward.version import Version
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule
from perta_fast.sweeping.keeping import keep_importances, keep_vectors, load_kept
from perta_fast.sweeping.measured import Measured
from perta_fast.sweeping.opened import ByEstimator, OpenedSweep
from perta_fast.sweeping.unfinished import Record
from perta_fast.sweeping.vectors import Vectors
from perta_fast.sweeping.weighing import Setting, Weighing, named

_SHOWN = "settings"


def measure_in_a_walk(opened: OpenedSweep, record: Record, vectors: Vectors) -> Measured | None:
    """Measure all settings that ``record`` lacks, and the model as it is; None if one walk cannot."""
    request, estimated = opened.request, bool(opened.estimated())
    in_memory = estimated and record.importances is None and request.save_importance is None
    if request.is_bounded or request.metric in GENERATED_METRICS or in_memory:
        return None
    try:
        subject, skeleton = opened.structure(opened.sources.model.path)
        if skeleton.device.type != "cpu" or _is_narrowed(opened, skeleton):
            return None
        scored = _Scored.of(opened, subject)
        importances = _importances(opened, record, vectors)
        every: list[Setting | None] = [None, *((curve, lam) for curve in opened.curves for lam in _strengths(opened))]
        lacking = [setting for setting in every if _found(record, setting) is None]
        if lacking:
            _walk(opened, record, skeleton, scored, Weighing(opened, importances, vectors), lacking)
    except NotStreamable:
        return None
    except OSError:
        if record.target is not None:
            raise
        return None  # the live model needs no temporary files
    rows = [row for setting in every if (row := _found(record, setting)) is not None]
    opened.request.bounds(rows[0])
    return Measured(rows, importances, scored.asking.subject, skeleton.device, scored.data.samples, request.batch_size)


@dataclass(frozen=True)
class _Scored:
    """What each version is run over. asking: has the sets of it."""

    asking: Asking
    data: ScoredData

    @classmethod
    def of(cls, opened: OpenedSweep, subject: Subject) -> "_Scored":
        request = opened.request
        asking = Asking(opened.told(subject), request.batch_size, request.max_length, progress=False)
        data = ScoredData.of(asking, opened.scored, request.metric)
        ScoredModel(asking, data, request.metric).score(_SHOWN)
        return cls(asking, data)


def _strengths(opened: OpenedSweep) -> list[float]:
    return sorted(opened.request.strengths or ())


def _found(record: Record, setting: Setting | None) -> ScoredSetting | None:
    """What a setting has scored; None is the model as it is."""
    return record.begun.original if setting is None else record.begun.find(*setting)


def _importances(opened: OpenedSweep, record: Record, vectors: Vectors) -> ByEstimator:
    """All importances, on disk; and ``vectors`` made. One model is in memory at a time."""
    record.keep()
    vectors.make(opened)
    keep_vectors(opened, record, vectors)
    kept = load_kept(opened, record)
    if kept is None:
        checkpoint = opened.sources.model if opened.request.at == "model" else opened.sources.base
        kept = opened.estimate(opened.load(checkpoint.path), record.importances)
    return opened.load_given() | keep_importances(opened, record, kept)


def _walk(
    opened: OpenedSweep,
    record: Record,
    skeleton: Skeleton,
    scored: _Scored,
    weighing: Weighing,
    settings: Sequence[Setting | None],
) -> None:
    """Score ``settings``, and add them to the record."""
    request, asking = opened.request, scored.asking
    with TemporaryDirectory(prefix="perta-sweep-") if record.target is None else nullcontext("") as temporary:
        folder = Path(temporary) if record.target is None else record.walk("grid")
        found = score_versions(
            skeleton,
            [Version("the model as it is") if setting is None else weighing.version(setting) for setting in settings],
            list(asking.sets.values()),
            schedule=Schedule(request.batch_size),
            threads=threads_for(request.threads, opened.ranks),
            folder=folder,
            resumable=record.target is not None,
            progress=opened.progress,
            description=f"{len(settings)} settings",
        )
        rows = []
        for setting, scores in zip(settings, found, strict=True):
            answering = Answering(asking.subject, request.batch_size, request.max_length, False, scores=scores.scores)
            row = ScoredModel(answering, scored.data, request.metric).score(_SHOWN)
            row = replace(row, changed=scores.changed, seconds=scores.seconds, not_finite=scores.not_finite)
            rows.append(named(row, setting))
        record.add(*rows)
        remove(folder)


def _is_narrowed(opened: OpenedSweep, skeleton: Skeleton) -> bool:
    """Whether the model runs in a narrower type than it is stored in: a live model is then rounded beforehand."""
    dtype: Any = skeleton.model.dtype
    sizes = (ITEM_SIZES[match.theta.dtype] for match in opened.sources.matches if match.copied is None)
    return any(size > dtype.itemsize for size in sizes)
