"""``choose``: a sweep within a bound, and the result of the setting that it chooses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from perta_fast.data.forms import Fields
from perta_fast.data.given_data import Data
from perta_fast.files.apart import check_apart
from perta_fast.files.reading import checked_path
from perta_fast.progress import Progress
from perta_fast.records.report import Report
from perta_fast.rules import DEFAULT_ALPHA, DEFAULT_RETAIN_RISE, PRECONDITIONED, AnyRule, Place, Rule
from perta_fast.runs.settings import check_one_result
from perta_fast.scoring.criteria import LOSS, Metric
from perta_fast.subtraction.scope import Patterns
from perta_fast.sweeping.request import BOUNDS
from perta_fast.sweeping.results import record_beside
from perta_fast.sweeping.run import sweep

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

PathLike = str | Path
DEFAULT_ALPHAS = (1.0, 16.0)  # of rules with importances


def choose(
    model: PathLike,
    base: PathLike,
    tuned: PathLike,
    forget: Data,
    retain: Data,
    *,
    fields: Fields | None = None,
    download: bool = False,
    max_retain_increase: float | None = None,
    max_retain_rise: float | None = None,
    target_retain_loss: float | None = None,
    retain_floor: float | None = None,
    up_to_base: bool | None = None,
    metric: Metric = LOSS,
    rules: AnyRule | Sequence[AnyRule] = PRECONDITIONED,
    lams: Sequence[float] | None = None,
    mus: float | Sequence[float] | None = None,
    p: float | None = None,
    alphas: float | Sequence[float] | None = None,
    threshold: float | None = None,
    only: Patterns = None,
    leave: Patterns = None,
    at: Place | None = None,
    also: PathLike | Sequence[PathLike] = (),
    holdout: Data | None = None,
    out: PathLike | None = None,
    in_place: bool = False,
    overwrite: bool = False,
    save_importance: PathLike | None = None,
    save_as: Literal["pair", "ratio"] | None = None,
    importance_dtype: Literal["float32", "bfloat16"] | None = None,
    save_tuned: PathLike | None = None,
    check: bool = True,
    stream: bool = False,
    memory: int | None = None,
    device_memory: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    system_prompt: str | None = None,
    date_string: str | None = None,
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
    threads: int | None = None,
    common_rows: bool = False,
    leave_others: bool = False,
    progress: Progress = True,
    group: "ProcessGroup | None" = None,
) -> Report:
    """Unlearn ``forget`` by the setting that forgets most within a bound: importances, ``sweep`` and ``apply`` in one.

    max_retain_increase, max_retain_rise, target_retain_loss, retain_floor: the bound; at most one. The retain loss of
    the result is at most so many percent, or nats, above that of ``model``, or at most so many nats; or the retain
    ``metric`` is at least so large. up_to_base: beside it, the forget loss is at most that of ``base``, which has not
    seen these rows. Without any of these, up to base, unless it is ``model``, and a rise of 0.05 nats.
    rules, mus, p, alphas, threshold: the curves to choose from, as in ``sweep``. By default there is one, rule
    ``preconditioned`` with mu 10, which forgets most in our study and keeps no importance; rules with importances are
    tried with alpha 1 and 16. lams: the strengths on each curve; None searches for the largest within the bound, or,
    with ``stream``, tries ``grid.DEFAULT_STRENGTHS``, then some closer to it.
    out: directory to make. in_place: change ``model`` instead. The sweep's record, ``sweep.json`` and a plot, is made
    beside it, as OUT.sweep or MODEL.sweep: the same call without ``overwrite`` goes on with a stopped run, or
    ``resume`` of that directory; in place, only once the model has begun to change.
    check: as in ``unlearn``. save_importance, save_as, importance_dtype, save_tuned and all other arguments as in
    ``sweep``.

    Returns the report of the result, whose ``setting_choice`` has every setting that was scored. Raises InputError for
    bad input, before anything is scored; RunError if the run fails or no setting keeps the bound (the scores are kept,
    and nothing else is made or changed); ``errors.Interrupted`` if it is stopped with something scored. Memory and
    disk: as ``sweep`` with ``out``.
    """
    sweep(**as_sweep(locals()))
    return Report.load(Path(model if out is None else out))


def as_sweep(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``sweep`` for those of ``choose``. Raises InputError unless there is one result."""
    settings = dict(arguments)
    is_bounded = any(settings.get(name) is not None for name in BOUNDS)
    if not is_bounded:
        settings["max_retain_rise"] = DEFAULT_RETAIN_RISE
    if settings.get("up_to_base") is None:
        settings["up_to_base"] = False if is_bounded else None
    check_one_result(settings["out"], settings["in_place"], leave_others=settings["leave_others"])
    _check_apart(settings)
    rules, mus, alphas, out = (settings.pop(name) for name in ("rules", "mus", "alphas", "out"))
    curves = {"rule": rules, "mu": mus, "alpha": _alphas(rules, alphas)}
    record = record_beside(settings["model"] if out is None else out)
    return settings | curves | {"checkpoint": out, "out": record}


def _check_apart(settings: Mapping[str, Any]) -> None:
    """Raise InputError, with the names of ``choose``, if a directory that it makes or changes lies in another."""
    names = ("model" if settings["in_place"] else "out", "save_importance", "save_tuned")
    check_apart({name: checked_path(settings[name]) for name in names if settings[name] is not None})


def _alphas(rules: str | Sequence[str], given: float | Sequence[float] | None) -> Any:
    """Those to try; rules without importances have none."""
    if given is not None:
        return given
    named = [rules] if isinstance(rules, str) else rules
    return DEFAULT_ALPHAS if any(Rule.of_unlearn(name, 0.0).estimator for name in named) else DEFAULT_ALPHA
