"""The settings of a sweep that fits into the memory, in one walk: their inputs are read once, not once for each.

Only where no setting can be skipped, since all are scored together; and on a CPU, where that was measured to be faster.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from perta_fast.dtypes import ITEM_SIZES
from perta_fast.errors import NotStreamable
from perta_fast.files.durable import remove
from perta_fast.importance.ratio import ImportanceRatio
from perta_fast.runs.settings import threads_for
from perta_fast.scoring.criteria import GENERATED_METRICS
from perta_fast.scoring.live_model import ScoredData, ScoredModel
from perta_fast.streaming.forward.asked import Answering, Asking
from perta_fast.streaming.forward.score_walk import score_versions
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule
from perta_fast.sweeping.opened import ByEstimator, OpenedSweep
from perta_fast.sweeping.unfinished import Record
from perta_fast.sweeping.vectors import Vectors, temporary_folder
from perta_fast.sweeping.weighing import Setting, Weighing, named

_SHOWN = "settings"


def score_grid(opened: OpenedSweep, record: Record, importances: ByEstimator, vectors: Vectors) -> None:
    """Score the settings that ``record`` lacks, if one walk can; what it cannot is left to the live model."""
    request, begun = opened.request, record.begun
    lacking: list[Setting] = [
        (curve, lam)
        for curve in opened.curves
        for lam in sorted(request.strengths or ())
        if begun.find(curve, lam) is None
    ]
    if len(lacking) < 2 or request.is_bounded or request.metric in GENERATED_METRICS or not _on_disk(importances):
        return
    try:
        _walk(opened, record, Weighing(opened, importances, vectors), lacking)
    except NotStreamable:
        return


def _walk(opened: OpenedSweep, record: Record, weighing: Weighing, settings: Sequence[Setting]) -> None:
    request = opened.request
    subject, skeleton = opened.structure(opened.sources.model.path)
    if skeleton.device.type != "cpu" or _is_narrowed(opened, skeleton):
        return
    told = opened.told(subject)
    asking = Asking(told, request.batch_size, request.max_length, progress=False)
    data = ScoredData.of(asking, opened.scored, request.metric)
    ScoredModel(asking, data, request.metric).score(_SHOWN)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(temporary_folder())) if record.target is None else record.walk("grid")
        found = score_versions(
            skeleton,
            list(map(weighing.version, settings)),
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
            answering = Answering(told, request.batch_size, request.max_length, False, scores=scores.scores)
            row = ScoredModel(answering, data, request.metric).score(_SHOWN)
            row = replace(row, changed=scores.changed, seconds=scores.seconds, not_finite=scores.not_finite)
            rows.append(named(row, setting))
        record.add(*rows)
        remove(folder)


def _on_disk(importances: ByEstimator) -> bool:
    """Whether all importances can be read from files; without ``out``, those that a sweep estimates cannot."""
    return all(
        each.directory is not None
        for of_estimator in importances.values()
        for each in ([of_estimator] if isinstance(of_estimator, ImportanceRatio) else of_estimator.values())
    )


def _is_narrowed(opened: OpenedSweep, skeleton: Skeleton) -> bool:
    """Whether the model runs in a narrower type than it is stored in: a live model is then rounded beforehand."""
    dtype: Any = skeleton.model.dtype
    sizes = (ITEM_SIZES[match.theta.dtype] for match in opened.sources.matches if match.copied is None)
    return any(size > dtype.itemsize for size in sizes)
