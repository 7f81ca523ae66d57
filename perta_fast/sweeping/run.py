"""One sweep from its arguments to its record: checked, scored setting by setting, chosen from, written."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch

from perta_fast.errors import InputError, Interrupted, NotFiniteError, RunError, is_out_of_memory
from perta_fast.files.durable import remove
from perta_fast.files.new_directory import OutputDirectory
from perta_fast.progress import Progress
from perta_fast.records.typed_json import fits
from perta_fast.records.versions import now
from perta_fast.runs.settings import unfinished_advice
from perta_fast.subtraction.unfinished import has_begun as has_begun_other
from perta_fast.sweeping.chosen_checkpoint import check_place, write_best
from perta_fast.sweeping.importances import ByEstimator
from perta_fast.sweeping.measuring import score
from perta_fast.sweeping.opened import Job
from perta_fast.sweeping.plot import PLOT_NAME, draw
from perta_fast.sweeping.request import Request, absolute, listed
from perta_fast.sweeping.results import FILE_NAME, Sweep
from perta_fast.sweeping.unfinished import (
    STATE,
    Begun,
    Record,
    check_unchanged,
    has_begun,
    load_begun,
)

PathLike = str | Path


def sweep(
    model: PathLike,
    base: PathLike,
    tuned: PathLike,
    forget: PathLike,
    retain: PathLike,
    forget_importance: PathLike | Sequence[PathLike] | None = None,
    retain_importance: PathLike | Sequence[PathLike] | None = None,
    *,
    lams: Sequence[float] | None = None,
    target_retain_loss: float | None = None,
    max_retain_increase: float | None = None,
    retain_floor: float | None = None,
    rule: str | Sequence[str] = "fisher",
    p: float | Sequence[float] | None = None,
    alpha: float | Sequence[float] = 1.0,
    threshold: float | None = None,
    at: Literal["base", "model"] = "base",
    metric: str = "loss",
    select: Literal["best-forget", "closest"] | None = None,
    gold: PathLike | None = None,
    checkpoint: PathLike | None = None,
    out: PathLike | None = None,
    overwrite: bool = False,
    batch_size: int = 8,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = True,
) -> Sweep:
    """Score theta_full - lam * w * (theta_f - theta_0) at many settings, from one importance an estimator.

    Each row is what the checkpoint that ``apply`` writes for that setting scores on ``forget`` and ``retain``,
    its values rounded to the types in which ``model`` is stored; lam 0, the model as it is, always comes first.

    forget, retain: JSON lines files, to score on and to estimate importance on. forget_importance,
    retain_importance: directories of importances, one of each for an estimator; an estimator that the rules
    need and that has none is estimated. rule, p, alpha: one value or several, all of which are combined; rule
    ``tv`` has neither p nor alpha and comes once.

    lams: strengths, all different, tried in rising order. Without them the largest lam is searched that keeps
    the bound, of which there is one at most: target_retain_loss: a retain loss of at most this many nats;
    max_retain_increase: at most this many percent above that at lam 0; retain_floor: a retain ``metric`` of at
    least this. With lams a bound stops early: once a positive lam breaks it, all larger ones of the same rule,
    p and alpha are skipped. A number that is not finite breaks every bound.

    The search doubles lam from 1 until the bound is broken, at most to 1024, then closes in on it, by
    interpolation where the curve is smooth; seven settings are usual. The loss need not grow with lam, so this
    is what holds of each curve's largest lam that keeps the bound: no larger one that was measured does, and
    the next of those is at most 1 % larger. It is lam 0 if the bound was broken all the way down to 1/1024.

    metric: what settings are chosen by: the loss, or a metric of ``evaluate`` that it calls ``forget_`` and
    ``retain_`` this: Q_A_Prob, Q_A_ROUGE, extraction_strength, exact_memorization. select: of all measured
    settings that keep the bound, "best-forget" has the largest forget loss (or the smallest forget metric);
    "closest" the smallest Euclidean distance, in forget and retain metric, to the model ``gold``. Left out, a
    search chooses the best-forget of each curve's largest lam, lams with a bound best-forget, lams alone
    nothing. checkpoint: directory to make of the chosen setting, as ``apply`` does; needs ``out``.

    out: directory to make, with ``sweep.json`` and, where matplotlib is installed, ``sweep.png``. Every setting
    is recorded as soon as it is scored; a sweep that was stopped goes on from there when it is called with the
    same arguments again, or by ``resume``. dtype: the type to run in; one that is narrower than the stored one
    rounds theta_full before the subtraction too. Other arguments as in ``unlearn``.

    Everything is checked before the first gradient. Raises InputError for bad input, for a bound that lam 0
    breaks already, and for an input that has changed since the sweep began; RunError if the run fails, or if
    there is nothing to write to ``checkpoint``; ``errors.Interrupted`` if it is stopped with something scored.
    Memory: one model at a time, of which theta_full is read again from its files after each setting, some
    copies of its largest tensor, and, without ``out``, 8 bytes a parameter and estimator for importances that
    are estimated; with ``out`` these are on the disk while the sweep runs.
    """
    request = Request(
        model=absolute(model),
        base=absolute(base),
        tuned=absolute(tuned),
        forget=absolute(forget),
        retain=absolute(retain),
        forget_importance=[absolute(each) for each in listed(forget_importance or ())],
        retain_importance=[absolute(each) for each in listed(retain_importance or ())],
        lams=None if lams is None else [float(lam) for lam in lams],
        target_retain_loss=target_retain_loss,
        max_retain_increase=max_retain_increase,
        retain_floor=retain_floor,
        rules=listed(rule),
        ps=listed(p),
        alphas=listed(alpha),
        threshold=threshold,
        at=at,
        metric=metric,
        select=select,
        gold=None if gold is None else absolute(gold),
        checkpoint=None if checkpoint is None else absolute(checkpoint),
        out=None if out is None else absolute(out),
        overwrite=overwrite,
        batch_size=batch_size,
        max_length=max_length,
        device=None if device is None else str(device),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
    )
    return _run(request, progress, resumed=False)


def resume_sweep(final: Path, progress: Progress) -> Sweep:
    """Take up again the sweep to ``final``, or clear up after one that had all but finished."""
    if has_begun(final):
        begun = load_begun(final)
        if not fits(begun.request, Request):
            raise InputError(f"{final}: its sweep's record is damaged; start over with --overwrite")
        return _run(Request(**begun.request), progress, resumed=True)
    remove(final / STATE)
    return Sweep.read(final / FILE_NAME)


def _run(request: Request, progress: Progress, resumed: bool) -> Sweep:
    job = Job.open(request, progress)
    begun = Begun(asdict(request), job.identity(), now(), [])
    if request.out is None:
        return score(job, Record(begun, None))[0]
    final = Path(os.path.realpath(request.out))
    inputs = [path for each in job.inputs().values() for path in (each.path, *each.files())]
    inputs += [each.path for each in job.data.values()]
    goes_on = has_begun(final) and (resumed or not request.overwrite)
    if goes_on:
        begun = _taken_up(final, begun)
    else:
        if not request.overwrite and has_begun_other(final):
            raise InputError(unfinished_advice(final))
        check_place(request, inputs)
    target = OutputDirectory(final, overwrite=request.overwrite, inputs=inputs, resume=goes_on)
    try:
        with target:
            begun.save(target.path)
            try:
                found, importances = score(job, Record(begun, target))
                chosen = found.best is not None and bool(found.best.rule)
                if request.checkpoint is not None and chosen:
                    _write(job, found, importances)
            except (InputError, NotFiniteError) as error:
                if not any(row.rule for row in begun.rows):
                    raise
                # It is an input that has gone or changed meanwhile, and no reason to lose what was scored.
                raise RunError(f"{error}. What was scored is kept; go on with: perta resume {final}") from error
            if not draw(found, target.path / PLOT_NAME):
                found.notes.append(f"{PLOT_NAME} was not drawn: matplotlib is not installed.")
            found.save(target.path)
            target.commit()
    except KeyboardInterrupt:
        if not target.keep:
            raise
        raise Interrupted(f"interrupted; what was scored is kept. Go on with: perta resume {final}") from None
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error) and target.keep:
            raise RunError(
                f"out of memory; what was scored is kept. Go on where more is free with: perta resume {final}"
            ) from error
        raise
    remove(final / STATE)
    if request.checkpoint is not None and not chosen:
        raise RunError(
            f"{request.checkpoint}: not written: no setting is better than the model as it is; "
            f"try other strengths, or allow more. What was scored is in {final}"
        )
    return found


def _taken_up(final: Path, asked: Begun) -> Begun:
    """The sweep that was begun. Raises InputError unless it is what is asked for, on the same inputs."""
    begun = load_begun(final)
    if begun.request != asked.request:
        raise InputError(unfinished_advice(final))
    check_unchanged(begun.inputs, asked.inputs)
    return begun


def _write(job: Job, found: Sweep, importances: ByEstimator) -> None:
    """The checkpoint of what was chosen."""
    best = found.best
    assert best is not None
    estimator = next((each.estimator for each in job.curves if each.name == best.rule), None)
    weighed = {} if estimator is None else importances[estimator]
    estimated = estimator is not None and estimator not in job.given
    write_best(job.request, found, weighed, estimated, job.progress)
