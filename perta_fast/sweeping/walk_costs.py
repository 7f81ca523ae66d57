"""What each walk of a streamed sweep costs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from perta_fast.checkpoints.adapters import is_adapter
from perta_fast.distributed.ranks import Ranks
from perta_fast.importance.store import WIDTH
from perta_fast.rules import PRECONDITIONED
from perta_fast.runs.precondition import vector_size
from perta_fast.runs.settings import threads_for
from perta_fast.scoring.search import CLOSER
from perta_fast.streaming.forecast.costs import Load
from perta_fast.streaming.forecast.dry_run import Conditions, preview
from perta_fast.streaming.forecast.forecast import Forecast
from perta_fast.streaming.forecast.forward_costs import Compared, ForwardEstimate, stored_bytes
from perta_fast.sweeping.opened import OpenedSweep
from perta_fast.sweeping.walk_plan import Planning
from perta_fast.sweeping.walked_model import WalkedModel

_IMPORTANCES = 2 * WIDTH  # bytes of a parameter


def walks(opened: OpenedSweep, conditions: Conditions, world: int) -> Iterator[tuple[str, Forecast]]:
    """What each walk is of, and what it costs, in the order of the run."""
    request, threads = opened.request, threads_for(opened.request.threads, Ranks.ALONE)
    model = WalkedModel.open(opened, opened.sources.model.path)
    if request.up_to_base:
        yield "base, on the forget data:", _scoring(model.of_base(), 1, threads, world)
    if opened.gold is not None:
        yield "the gold model:", _scoring(WalkedModel.open(opened, opened.gold.path), 1, threads, world)
    if request.bounds_absolutely:
        yield "the model as it is, which may break the bound:", _scoring(model, 1, threads, world)
    place = Path(str(request.out))
    how: dict[str, Any] = {"subtract": False, "threads": threads}
    for estimator in opened.estimated():
        subject = Path(request.model if request.at == "model" else request.base)
        for role, file in opened.data.items():
            data = {role: file.path}
            costs = preview(subject, data, estimator, place, conditions, kept=WIDTH, ranks=world, **how)
            yield f"{role} importance, {estimator}:", costs
    if mus := opened.mus():
        subject = Path(request.model if opened.place(PRECONDITIONED) == "model" else request.base)
        retain, low_rank = {"retain": opened.data["retain"].path}, is_adapter(Path(request.tuned))
        each = f", for each of {len(mus)} mu" if len(mus) > 1 else ""
        costs = preview(subject, retain, None, place, conditions, low_rank=low_rank, **how)
        yield f"rule {PRECONDITIONED}{each}:", costs
    every = _count(opened)
    curves = len(opened.curves) if request.is_bounded else 0
    yield f"{every} settings:", _scoring(model, every, threads, world, curves)
    if curves and request.searches_streamed:
        closer = curves * CLOSER
        yield f"at most {closer} settings closer to the bound:", _scoring(model, closer, threads, world)


def _count(opened: OpenedSweep) -> int:
    """All settings, and the model as it is."""
    return 1 + len(opened.curves) * len(opened.request.strengths or ())


def _to_be_made(opened: OpenedSweep) -> int:
    """Bytes of the importances and θ_f that the sweep makes, and reads to change the model."""
    request = opened.request
    changed = sum(match.theta.count for match in opened.sources.matches if match.copied is None)
    vectors = vector_size(Path(request.base), Path(request.tuned)) * len(opened.mus())
    return _IMPORTANCES * changed * len(opened.estimated()) + vectors


def _scoring(walked: WalkedModel, count: int, threads: int, world: int, curves: int = 0) -> Forecast:
    """The costs of walking through a model for so many versions of it; one is the model as it is.

    curves: as in ``Planning``.
    """
    opened, request = walked.opened, walked.opened.request
    lengths = [[len(sample.input_ids) for sample in of_set.samples] for of_set in walked.sets]
    skeleton, load = walked.skeleton, Load(lengths).share(world)

    changing = (opened.sources, *opened.given.values()) if count > 1 else ()
    every = Compared.reading(count, changing, stored_bytes(skeleton), _to_be_made(opened) if changing else 0)

    def estimate(versions: int) -> ForwardEstimate:
        compared = replace(every, count=versions)
        return ForwardEstimate(skeleton, load, skeleton.device, compared, threads=threads)

    planning = Planning(estimate, count, curves, request, Path(str(request.out)), skeleton.first_shard, world)
    forecast = planning.plan(announce=True)[1]
    assert forecast is not None
    return forecast
