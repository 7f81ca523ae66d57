"""``sweep``: check the inputs, score the settings, write the record and the chosen checkpoint."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from perta_fast.data.chat import parse_date, today
from perta_fast.data.forms import Fields
from perta_fast.errors import InputError, Interrupted, NotFiniteError, RunError, is_out_of_memory, shell_command
from perta_fast.files.apart import check_name
from perta_fast.files.durable import remove
from perta_fast.files.identity import is_same
from perta_fast.files.new_directory import (
    OutputDirectory,
    check_replaceable,
    has_record,
    remove_replaced,
    unfinished_advice,
)
from perta_fast.files.own import check_own
from perta_fast.progress import Progress
from perta_fast.records.report import FILE_NAME as REPORT
from perta_fast.records.versions import now
from perta_fast.rules import DEFAULT_ALPHA, PRECONDITIONED
from perta_fast.subtraction.scope import Patterns
from perta_fast.subtraction.unfinished import has_begun
from perta_fast.sweeping.chosen_checkpoint import check_destination, write_best
from perta_fast.sweeping.measuring import score
from perta_fast.sweeping.opened import OpenedSweep
from perta_fast.sweeping.plot import PLOT_NAME, draw
from perta_fast.sweeping.request import Request
from perta_fast.sweeping.results import FILE_NAME, Sweep
from perta_fast.sweeping.unfinished import STATE, Begun, Record, check_unchanged, load_begun
from perta_fast.sweeping.vectors import Vectors, temporary_folder

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
    importance: PathLike | Sequence[PathLike] | None = None,
    fields: Fields | None = None,
    download: bool = False,
    lams: Sequence[float] | None = None,
    target_retain_loss: float | None = None,
    max_retain_rise: float | None = None,
    max_retain_increase: float | None = None,
    retain_floor: float | None = None,
    rule: str | Sequence[str] = PRECONDITIONED,
    mu: float | Sequence[float] | None = None,
    p: float | Sequence[float] | None = None,
    alpha: float | Sequence[float] = DEFAULT_ALPHA,
    threshold: float | None = None,
    only: Patterns = None,
    leave: Patterns = None,
    at: Literal["base", "model"] | None = None,
    metric: str = "loss",
    select: Literal["best-forget", "closest"] | None = None,
    gold: PathLike | None = None,
    checkpoint: PathLike | None = None,
    out: PathLike | None = None,
    overwrite: bool = False,
    common_rows: bool = False,
    batch_size: int = 8,
    max_length: int | None = None,
    system_prompt: str | None = None,
    date_string: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = True,
) -> Sweep:
    """Score theta_full - lam * w * (theta_f - theta_0) at many settings, from one importance for each estimator.

    A setting has the scores of the checkpoint that ``apply`` writes for it. lam 0, the model as it is, comes first.
    The documentation ("Sweeps") describes the search and the choice.

    model, base, tuned, fields, download, at, threshold, only, leave, batch_size, max_length, device, common_rows,
    progress: as in ``unlearn``. forget, retain: data files, to score on and to estimate importance on.
    system_prompt, date_string: as in ``unlearn``, and for the scores. A resumed sweep keeps the date of its start.
    forget_importance, retain_importance: directories to use instead; a pair for each estimator. importance: the same,
    as one directory for each estimator, which holds both or their ratio.
    rule, mu, p, alpha: one value or several; every combination is a curve. mu (10) is for ``preconditioned``, p and
    alpha are for rules with importances; ``tv`` comes once.
    lams: different strengths, tried in rising order; None searches for the largest within the bound.
    target_retain_loss, max_retain_rise, max_retain_increase, retain_floor: the bound; give at most one. The largest
    retain loss in nats, or in nats or percent above that at lam 0, or the smallest retain ``metric``.
    metric: what settings are chosen by: loss, Q_A_Prob, Q_A_ROUGE, extraction_strength, exact_memorization.
    select: "best-forget" chooses what has forgotten most within the bound, "closest" what is nearest to ``gold`` in
    both metrics. None: best-forget if there is a bound (after a search, among each curve's largest lam), else none.
    gold: directory of a model trained without the forget data.
    checkpoint: directory to make of the chosen setting, as ``apply`` does; needs ``out``.
    out: directory to make, with ``sweep.json`` and, if matplotlib is installed, ``sweep.png``. Each setting is kept
    as soon as it is scored; the same call, or ``resume``, goes on with a stopped sweep. overwrite: start over.
    dtype: to run in; if it is narrower than the stored type, theta_full is rounded before the subtraction too.

    Raises InputError for bad input, a bound that lam 0 breaks, or an input that changed since the sweep began;
    RunError if the run fails or no setting can be written to ``checkpoint``; ``errors.Interrupted`` if it is
    stopped with something scored. Memory: one model, a few copies of its largest tensor, and, without ``out``,
    8 bytes a parameter for each estimator whose importances are estimated (with ``out`` they are on disk).
    """
    return _run(Request.of(locals()), progress, resumed=False)


def resume_sweep(final: Path, progress: Progress) -> Sweep:
    """Go on with the stopped sweep to ``final``; if it has finished, only remove its record."""
    if has_record(final, STATE):
        request = load_begun(final).request
        if request.out is None or not is_same(request.out, final):
            raise InputError(
                f"{final}: the sweep to finish is one to {request.out}; give the directory that name again"
            )
        if request.checkpoint is not None:
            check_replaceable(Path(os.path.realpath(request.checkpoint)), [REPORT], f"the sweep to {final}")
        return _run(request, progress, resumed=True)
    check_own(final / STATE)
    remove_replaced(final)
    remove(final / STATE)
    return Sweep.read(final / FILE_NAME)


def _run(request: Request, progress: Progress, resumed: bool) -> Sweep:
    opened = OpenedSweep.open(request, progress, today())
    begun = Begun(request, opened.identity(), now(), [], day=opened.day.isoformat())
    if request.out is None:
        return _score_without_out(opened, begun)
    check_name(request.out)
    final = Path(os.path.realpath(request.out))
    inputs = opened.paths()
    goes_on = has_record(final, STATE) and (resumed or not request.overwrite)
    if goes_on:
        earlier = load_begun(final)
        if earlier.request != begun.request:
            raise InputError(unfinished_advice(final))
        check_unchanged(earlier.inputs, begun.inputs)
        begun = earlier
        opened = replace(opened, day=parse_date(begun.day or begun.started[:10]))
    else:
        if not request.overwrite and has_begun(final):
            raise InputError(unfinished_advice(final))
        check_destination(request, final, inputs)
    target = OutputDirectory(final, overwrite=request.overwrite, inputs=inputs, resume=goes_on)
    record = Record(begun, target)
    vectors = Vectors(target.path / STATE / "tuned", opened.mus())
    with _kept_if_stopped(target, final), target:
        record.save()
        sweep = _score_and_write(opened, record, vectors, final)
        if not draw(sweep, target.path / PLOT_NAME):
            sweep.notes.append(f"{PLOT_NAME} was not drawn: matplotlib is not installed.")
        sweep.save(target.path)
        target.commit()
    remove(final / STATE)
    if request.checkpoint is not None and not sweep.has_choice:
        raise RunError(
            f"{request.checkpoint}: not written: no setting is better than the model as it is; "
            f"try other strengths, or allow more. What was scored is in {final}"
        )
    return sweep


def _score_without_out(opened: OpenedSweep, begun: Begun) -> Sweep:
    """Score all settings; what rule ``preconditioned`` makes lies where temporary files do."""
    mus = opened.mus()
    with temporary_folder() if mus else nullcontext("") as scratch:
        return score(opened, Record(begun, None), Vectors(Path(scratch) / "tuned", mus))[0]


def _score_and_write(opened: OpenedSweep, record: Record, vectors: Vectors, final: Path) -> Sweep:
    """Score all settings, and write the checkpoint of the chosen one if it was asked for."""
    try:
        sweep, importances = score(opened, record, vectors)
        if opened.request.checkpoint is not None and sweep.has_choice:
            write_best(opened, sweep, importances, vectors)
    except (InputError, NotFiniteError) as error:
        if not any(setting.rule for setting in record.begun.rows):
            raise
        # An input has gone or changed meanwhile: keep what was scored.
        raise RunError(f"{error}. What was scored is kept; go on with: {_resuming(final)}") from error
    return sweep


@contextmanager
def _kept_if_stopped(target: OutputDirectory, final: Path) -> Iterator[None]:
    """Say how to resume if the sweep is stopped after something was scored."""
    try:
        yield
    except KeyboardInterrupt:
        if not target.keep:
            raise
        raise Interrupted(f"interrupted; what was scored is kept. Go on with: {_resuming(final)}") from None
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error) and target.keep:
            raise RunError(
                f"out of memory; what was scored is kept. Go on where more is free with: {_resuming(final)}"
            ) from error
        raise


def _resuming(final: Path) -> str:
    """The command that goes on with the sweep to ``final``."""
    return shell_command("perta", "resume", final)
