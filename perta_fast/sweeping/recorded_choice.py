"""The choice of a sweep, and a recipe of what was chosen, for the report of the checkpoint that is made of it."""

import math

from perta_fast.records.recipe_of_run import as_recipe
from perta_fast.records.report import Scalar
from perta_fast.records.setting_choice import SettingChoice, TriedSetting
from perta_fast.rules import Rule
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.sweeping.request import Request
from perta_fast.sweeping.results import Sweep

# What a run of one setting shares with the sweep that has chosen it.
_ALIKE = (
    *("model", "base", "tuned", "common_rows", "forget", "retain", "fields", "only", "leave", "system_prompt"),
    *("batch_size", "max_length", "device", "dtype", "stream", "memory", "device_memory", "threads"),
)


def recorded_choice(request: Request, sweep: Sweep) -> SettingChoice:
    """How ``sweep.best``, which is another setting than the model as it is, was chosen."""
    best = sweep.best
    assert best is not None and sweep.select is not None
    bound = request.bound
    scored = [setting for setting in sweep.rows if setting.rule and not setting.skipped]
    return SettingChoice(
        bound=None if bound is None else bound[0],
        value=None if bound is None else float(bound[1]),
        limit=sweep.limit,
        floor=sweep.floor,
        metric=sweep.metric,
        select=sweep.select,
        streamed=request.stream,
        rows={role: record["samples"] for role, record in sweep.data.items()},
        before=_tried(sweep.original),
        after=_tried(best),
        tried=list(map(_tried, scored)),
        skipped=sum(setting.skipped for setting in sweep.rows),
        gold=None if sweep.gold is None else _tried(sweep.gold),
        base_forget_loss=sweep.forget_limit,
    )


def chosen_recipe(request: Request, sweep: Sweep) -> dict[str, Scalar]:
    """``sweep.best`` as a run of ``unlearn`` on its own, which makes the same checkpoint."""
    best = sweep.best
    assert best is not None
    weighs = Rule.of_unlearn(best.rule, 0.0).estimator is not None
    numbers = {"p": best.p, "alpha": best.alpha, "threshold": request.threshold} if weighs else {"mu": best.mu}
    chosen = {"rule": best.rule, "lam": best.lam, **numbers, "at": request.at}
    date = request.date_string or sweep.settings.get("date")
    return as_recipe({name: getattr(request, name) for name in _ALIKE} | chosen | {"date_string": date})


def _tried(setting: ScoredSetting) -> TriedSetting:
    numbers = ("forget_loss", "retain_loss", "forget", "retain", "changed")
    values = {name: float(getattr(setting, name)) for name in numbers}
    return TriedSetting(
        rule=setting.rule,
        mu=setting.mu,
        p=setting.p,
        alpha=setting.alpha,
        lam=setting.lam,
        **{name: value if math.isfinite(value) else None for name, value in values.items()},
    )
