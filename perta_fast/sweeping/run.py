"""``sweep``: check the inputs, score the settings, write the record and the chosen checkpoint.

What can be wrong with arguments, data and the places of outputs is said before torch is imported.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from perta_fast.checkpoints.fingerprint import check_as_opened
from perta_fast.data.chat import parse_date, today
from perta_fast.data.forms import Fields
from perta_fast.data.given import NOTHING_GIVEN, Given
from perta_fast.data.given_data import Data, taken_out
from perta_fast.distributed.ranks import Ranks
from perta_fast.distributed.shared_directory import check_shared
from perta_fast.errors import InputError, NotFiniteError, RunError
from perta_fast.files.apart import check_name
from perta_fast.files.durable import remove, sync_tree
from perta_fast.files.identity import is_same
from perta_fast.files.new_directory import (
    OutputDirectory,
    has_record,
    kept_if_stopped,
    remove_replaced,
    unfinished_advice,
)
from perta_fast.files.own import check_own
from perta_fast.progress import Progress
from perta_fast.records.versions import now
from perta_fast.rules import DEFAULT_ALPHA, PRECONDITIONED, AnyRule, Place
from perta_fast.scoring.criteria import LOSS, Metric, Selection
from perta_fast.subtraction.scope import Patterns
from perta_fast.subtraction.unfinished import has_begun
from perta_fast.sweeping.chosen_checkpoint import check_result, finish_in_place, has_changed, write_best
from perta_fast.sweeping.keeping import check_kept, check_places, check_replaced, find_kept
from perta_fast.sweeping.opened import ByEstimator, OpenedSweep
from perta_fast.sweeping.plot import PLOT_NAME, draw
from perta_fast.sweeping.request import Request
from perta_fast.sweeping.results import FILE_NAME, Sweep
from perta_fast.sweeping.unfinished import STATE, Begun, Record, check_unchanged, load_begun
from perta_fast.sweeping.vectors import Vectors, temporary_folder

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

PathLike = str | Path


def sweep(
    model: PathLike,
    base: PathLike,
    tuned: PathLike,
    forget: Data,
    retain: Data,
    forget_importance: PathLike | Sequence[PathLike] | None = None,
    retain_importance: PathLike | Sequence[PathLike] | None = None,
    *,
    importance: PathLike | Sequence[PathLike] | None = None,
    fields: Fields | None = None,
    download: bool = False,
    lams: Sequence[float] | None = None,
    target_retain_loss: float | None = None,
    max_retain_rise: float | None = None,
    max_retain_increase: float | None = None,
    retain_floor: float | None = None,
    up_to_base: bool | None = False,
    rule: AnyRule | Sequence[AnyRule] = PRECONDITIONED,
    mu: float | Sequence[float] | None = None,
    p: float | Sequence[float] | None = None,
    alpha: float | Sequence[float] = DEFAULT_ALPHA,
    threshold: float | None = None,
    only: Patterns = None,
    leave: Patterns = None,
    at: Place | None = None,
    metric: Metric = LOSS,
    select: Selection | None = None,
    also: PathLike | Sequence[PathLike] = (),
    holdout: Data | None = None,
    gold: PathLike | None = None,
    checkpoint: PathLike | None = None,
    in_place: bool = False,
    leave_others: bool = False,
    save_importance: PathLike | None = None,
    save_as: Literal["pair", "ratio"] | None = None,
    importance_dtype: Literal["float32", "bfloat16"] | None = None,
    save_tuned: PathLike | None = None,
    check: bool = False,
    out: PathLike | None = None,
    overwrite: bool = False,
    common_rows: bool = False,
    stream: bool = False,
    memory: int | None = None,
    device_memory: int | None = None,
    threads: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    system_prompt: str | None = None,
    date_string: str | None = None,
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
    progress: Progress = True,
    group: "ProcessGroup | None" = None,
) -> Sweep:
    """Score theta_full - lam * w * (theta_f - theta_0) at many settings, from one importance for each estimator.

    A setting has the scores of the checkpoint that ``apply`` writes for it. lam 0, the model as it is, comes first.
    The documentation ("Sweeps") describes the search and the choice.

    model, base, tuned, fields, download, at, threshold, only, leave, batch_size, max_length, device, common_rows,
    progress: as in ``unlearn``. forget, retain: files or rows as there, to score on and to estimate importance on.
    system_prompt, date_string: as in ``unlearn``, and for the scores. A resumed sweep keeps the date of its start.
    forget_importance, retain_importance: directories to use instead; a pair for each estimator. importance: the same,
    as one directory for each estimator, which holds both or their ratio.
    rule, mu, p, alpha: one value or several; every combination is a curve. mu (10) is for ``preconditioned``, p and
    alpha are for rules with importances; ``tv`` comes once.
    lams: different strengths, tried in rising order; None searches for the largest within the bound.
    target_retain_loss, max_retain_rise, max_retain_increase, retain_floor: the bound; give at most one. The largest
    retain loss in nats, or in nats or percent above that at lam 0, or the smallest retain ``metric``. up_to_base:
    beside it, a forget loss of at most that of ``base``, which has not seen these rows; None: where there
    is a bound, unless base is ``model``.
    metric: what settings are chosen by: loss, Q_A_Prob, Q_A_ROUGE, extraction_strength, exact_memorization.
    select: "best-forget" chooses what has forgotten most within the bound, "closest" what is nearest to ``gold`` in
    both metrics. None: best-forget if there is a bound (after a search, among each curve's largest lam), else none.
    gold: directory of a model trained without the forget data.
    also: further data files, which are scored too and choose nothing; in ``scores`` of a setting, under their names.
    holdout: one more, never trained on; with ``stream``, scores have the forget set's membership scores against it.
    checkpoint: directory to make of the chosen setting, as ``apply`` does; needs ``out``. in_place: change ``model``
    into it instead, where it lies. leave_others: as in ``apply``. check: as in ``unlearn``, for the
    report of that checkpoint; there is none if the importances of its rule were given.
    save_importance, save_as, importance_dtype: keep what is estimated, as ``unlearn`` does; of several estimators, each
    in a directory of its name in there. save_tuned: the same for the θ_f of rule ``preconditioned``; several have
    directories such as ``mu-10.0``. Settings are scored with what is kept, so ``apply`` makes the same bits of it.
    out: directory to make, with ``sweep.json`` and, if matplotlib is installed, ``sweep.png``. Each setting is kept
    as soon as it is scored; the same call without ``overwrite``, or ``resume``, goes on with a stopped sweep. In place
    it is the call alone, until the model has begun to change. overwrite: replace what is there, start over.
    stream: hold one part of the model at a time, for models larger than the memory; needs ``out``. Importances and θ_f
    are made layer by layer, then all settings go through the model in one walk, so that none can be skipped; or in two,
    if that is cheaper. Without lams, ``grid.DEFAULT_STRENGTHS`` are tried, then, in one more walk, some closer to the
    bound. ``scores`` has all metrics of ``evaluate`` that are made of token scores. memory, device_memory: bytes that
    this may take; None sets no limit. threads: to subtract with; None takes all processors. group: the processes that
    deal the samples of a streamed sweep among them. Each calls this with the same arguments; inputs and ``out`` must
    lie where all see them. None: this process alone.
    dtype: to run in; if it is narrower than the stored type, theta_full is rounded before the subtraction too.

    Raises InputError for bad input, a bound that lam 0 breaks, or an input that changed since the sweep began;
    RunError if the run fails or no setting can be written to ``checkpoint``; ``errors.Interrupted`` if it is
    stopped with something scored. Memory: one model, a few copies of its largest tensor, and, without ``out``,
    8 bytes a parameter for each estimator whose importances are estimated (with ``out`` they are on disk).
    """
    arguments: dict[str, Any] = locals()
    ranks = Ranks.of(group)
    with ranks.together("the arguments"):
        arguments, given = taken_out(arguments, ("forget", "retain", "holdout"))
        request = Request.of(arguments)
        request.check_arguments()
        request = request.located(download)
    return _run(request, progress, resumed=False, ranks=ranks, given=given)


def resume_sweep(final: Path, progress: Progress, ranks: Ranks = Ranks.ALONE) -> Sweep:
    """Go on with the stopped sweep to ``final``; if it has finished, only remove its record."""
    with ranks.together("the unfinished sweep"):
        request = _begun_request(final) if has_record(final, STATE) else None
    if request is not None:
        return _run(request, progress, resumed=True, ranks=ranks)
    with ranks.together("the unfinished sweep"):
        if ranks.first:
            check_own(final / STATE)
            remove_replaced(final)
            remove(final / STATE)
        return Sweep.read(final / FILE_NAME)


def _begun_request(final: Path) -> Request:
    """What the stopped sweep to ``final`` was asked for.

    Raises InputError if it names another place, or a model to change in place that no sweep has begun to change: a
    record alone, which may be anybody's, changes none.
    """
    begun = load_begun(final)
    request = begun.request
    if request.out is None or not is_same(request.out, final):
        raise InputError(f"{final}: the sweep to finish is one to {request.out}; give the directory that name again")
    check_replaced(request, final)
    if request.in_place and not has_changed(begun):
        raise InputError(
            f"{final}: the sweep is to change {request.model} in place, and has not begun to; go on with the command "
            "that began it, which keeps what was scored"
        )
    return request


def _run(
    request: Request, progress: Progress, resumed: bool, ranks: Ranks = Ranks.ALONE, given: Given = NOTHING_GIVEN
) -> Sweep:
    day = ranks.share(today())
    with ranks.together("the opening of the inputs"):
        if ranks.world > 1:
            _check_several(request)
        elif request.in_place and (resumed or not request.overwrite):
            changed = _finish_changed(request, progress)
            if changed is not None:
                return changed
        opened = OpenedSweep.open(request, progress, day, ranks, given)
        inputs = opened.state_of_inputs()
    with ranks.together("the inputs"):
        if any(others != inputs for others in ranks.gather(inputs)):
            raise InputError("not all processes see the same input files")
    begun = Begun(request, inputs, now(), opened.day.isoformat(), [], processes=ranks.world)
    if request.out is None:
        check_places(request, None)
        check_kept(opened)
        opened.check_base()
        return _score_without_out(opened, begun)
    with ranks.together("the unfinished sweep"):
        check_name(request.out)
        final = Path(os.path.realpath(request.out))
        earlier = _earlier(opened, begun, final, resumed) if ranks.first else None
    earlier = ranks.share(earlier)
    begun = ranks.share(begun) if earlier is None else earlier
    request = begun.request
    opened = replace(opened, request=request, day=parse_date(begun.day), types=begun.types)
    with ranks.together("the output directory"):
        target = OutputDirectory(final, overwrite=request.overwrite, inputs=opened.paths(), resume=earlier is not None)
    record = Record(begun, target, ranks.first)
    vectors = Vectors(target.path / STATE / "tuned", opened.mus())
    with ExitStack() as entered, ranks.sharing_errors("the sweep"):
        with ranks.together("the output directory"):
            if ranks.first:
                entered.enter_context(kept_if_stopped(target, "what was scored is kept", begun.going_on(final)))
                entered.enter_context(target)
                if earlier is not None:
                    earlier.check_record(target)
        find_kept(opened, record, vectors)
        with ranks.together("the record"):
            record.save()
        check_shared(target.path, ranks)
        sweep = _score_and_write(opened, record, vectors, final)
        with ranks.together("the sweep"):
            if ranks.first:
                target.commit()
    if ranks.first:
        remove(final / STATE)
    if request.makes_result and not sweep.has_choice:
        what = f"{request.checkpoint}: not written" if not request.in_place else f"{request.model}: not changed"
        nearest = sweep.nearest()
        reason = nearest or "no setting is better than the model as it is"
        raise RunError(f"{what}: {reason}. Try other strengths, or another bound. What was scored is in {final}")
    return sweep


def _check_several(request: Request) -> None:
    """Raise InputError for a sweep that one process does alone."""
    if not request.stream:
        raise InputError("a sweep on a model in memory is done by one process; start it without torchrun, or stream it")
    if request.in_place:
        raise InputError("a model is changed in place by one process alone; start it without torchrun")


def _earlier(opened: OpenedSweep, begun: Begun, final: Path, resumed: bool) -> Begun | None:
    """The stopped sweep to go on with; None to begin, if that is possible."""
    request = begun.request
    if has_record(final, STATE) and (resumed or not request.overwrite):
        earlier = load_begun(final)
        earlier.check_request(request, final)
        if earlier.request.overwrite and not request.overwrite:
            check_replaced(earlier.request, final)
        check_unchanged(earlier.inputs, begun.inputs)
        earlier.check_processes(begun.processes, final)
        return earlier
    if not request.overwrite and has_begun(final):
        raise InputError(unfinished_advice(final))
    check_places(request, final)
    check_result(opened)
    check_kept(opened)
    opened.check_base()
    return None


def _finish_changed(request: Request, progress: Progress) -> Sweep | None:
    """Finish the sweep if it was stopped while the model was changed in place; None if it was not."""
    final = Path(os.path.realpath(str(request.out)))
    begun = load_begun(final) if has_record(final, STATE) else None
    if begun is None or not begun.is_asked_for(request) or not has_changed(begun):
        return None
    target = OutputDirectory(final, overwrite=begun.request.overwrite, resume=True)
    with kept_if_stopped(target, "what was scored is kept", begun.going_on(final)), target:
        begun.check_record(target)
        finish_in_place(begun, progress)
        sweep = Sweep.read(target.path / FILE_NAME)
        target.commit()
    remove(final / STATE)
    return sweep


def _score_without_out(opened: OpenedSweep, begun: Begun) -> Sweep:
    """Score all settings; what rule ``preconditioned`` makes lies where temporary files do."""
    mus = opened.mus()
    with temporary_folder() if mus else nullcontext("") as scratch:
        return _score(opened, Record(begun, None), Vectors(Path(scratch) / "tuned", mus))[0]


def _score(opened: OpenedSweep, record: Record, vectors: Vectors) -> tuple[Sweep, ByEstimator]:
    # Imported late: what is wrong so far was said without waiting for torch.
    if opened.request.stream:
        from perta_fast.sweeping.streamed import measure
    else:
        from perta_fast.sweeping.measuring import measure
    measured = measure(opened, record, vectors)
    return measured.as_sweep(opened, record.begun, vectors), measured.importances


def _score_and_write(opened: OpenedSweep, record: Record, vectors: Vectors, final: Path) -> Sweep:
    """Score all settings, and make a checkpoint of the chosen one if it was asked for."""
    request, begun = opened.request, record.begun
    try:
        sweep, importances = _score(opened, record, vectors)
        check_as_opened(opened.inputs().values())  # else the result would be of other bytes than the scores
        if request.in_place:  # it is finished from here on even if the model it reads is another one
            _save(sweep, record)
            sync_tree(record.folder)
            begun.applying = sweep.has_choice
            record.save()
        if request.makes_result and sweep.has_choice:
            write_best(opened, sweep, importances, vectors)
    except (InputError, NotFiniteError) as error:
        if not record.has_work:
            record.give_up()
            raise
        if isinstance(error, NotFiniteError) and not begun.is_scored:
            raise
        # An input has gone or changed meanwhile: keep what was scored.
        raise RunError(f"{error}. What was scored is kept; go on with: {begun.going_on(final)}") from error
    if not request.in_place:
        _save(sweep, record)
    return sweep


def _save(sweep: Sweep, record: Record) -> None:
    """Write figures and plot."""
    if record.target is None or not record.writes:
        return
    if not draw(sweep, record.target.path / PLOT_NAME):
        sweep.notes.append(f"{PLOT_NAME} was not drawn: matplotlib is not installed.")
    sweep.save(record.target.path)
