"""The arguments of a sweep, checked; they are kept on disk, so that a resumed sweep can compare them."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from perta_fast.arguments import check_device, check_limits, check_sizes, listed, plain
from perta_fast.data.chat import ChatSettings
from perta_fast.data.forms import check_fields
from perta_fast.data.given import is_given
from perta_fast.dtypes import torch_name
from perta_fast.errors import InputError
from perta_fast.files.hub import local_data, local_model, path_text
from perta_fast.files.identity import is_same
from perta_fast.files.reading import absolute, checked_path
from perta_fast.importance.kept_form import KeptForm
from perta_fast.records.declared import declared
from perta_fast.rules import PLACES
from perta_fast.runs.settings import check_threads
from perta_fast.scoring.criteria import GENERATED_METRICS, LOSS, SELECTIONS
from perta_fast.scoring.scored_data import check_metric
from perta_fast.scoring.setting import Limits, ScoredSetting
from perta_fast.subtraction.scope import Scope
from perta_fast.sweeping.grid import DEFAULT_STRENGTHS, Curve, check_strengths, curves_of

BOUNDS = ("target_retain_loss", "max_retain_rise", "max_retain_increase", "retain_floor")
_MODELS, _DATA = ("model", "base", "tuned", "gold"), ("forget", "retain", "holdout")
_OUTPUTS = ("out", "save_importance", "save_tuned")
_IMPORTANCES = ("forget_importance", "retain_importance", "importance")
_PATHS, _SEVERAL_PATHS = (*_MODELS, *_DATA, *_OUTPUTS), (*_IMPORTANCES, "also")
# The argument of ``sweep`` that has one value or several.
_SEVERAL = {"rules": "rule", "ps": "p", "alphas": "alpha", "mus": "mu"}


@dataclass(frozen=True)
class Request:
    """The arguments of ``sweep``."""

    model: str
    base: str
    tuned: str
    forget: str
    retain: str
    forget_importance: list[str]
    retain_importance: list[str]
    lams: list[float] | None
    target_retain_loss: float | None
    max_retain_increase: float | None
    retain_floor: float | None
    rules: list[str]
    ps: list[float | None]
    alphas: list[float]
    threshold: float | None
    at: str | None
    metric: str
    select: str | None
    gold: str | None
    checkpoint: str | None
    out: str | None
    overwrite: bool
    batch_size: int
    max_length: int | None
    device: str | None
    dtype: str | None
    common_rows: bool = False
    only: list[str] | None = None
    leave: list[str] | None = None
    fields: dict[str, str] | None = None
    system_prompt: str | None = None
    date_string: str | None = None
    max_retain_rise: float | None = None
    mus: list[float | None] = field(default_factory=lambda: [None])
    importance: list[str] = field(default_factory=list)
    also: list[str] = field(default_factory=list)
    holdout: str | None = None
    stream: bool = False
    in_place: bool = False
    leave_others: bool = False
    memory: int | None = None
    device_memory: int | None = None
    threads: int | None = None
    save_importance: str | None = None
    save_as: str | None = None
    importance_dtype: str | None = None
    save_tuned: str | None = None
    check: bool = False
    up_to_base: bool | None = False

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Request":
        """From the arguments of ``sweep`` by name; names of the hub stay such until they are ``located``.

        Rows given in Python are ``taken_out``. Raises InputError for what is of another type.
        """
        values = {field.name: plain(arguments[_SEVERAL.get(field.name, field.name)]) for field in fields(cls)}
        check_fields(values["fields"])
        for name in (*_MODELS, *_DATA):
            values[name] = os.fspath(values[name]) if isinstance(values[name], os.PathLike) else values[name]
        values["also"] = [path_text(path, "also") for path in listed(values["also"])]
        for name in (*_OUTPUTS, "checkpoint"):
            values[name] = None if values[name] is None else absolute(values[name])
        for name in _SEVERAL:
            values[name] = listed(values[name])
        for name in _IMPORTANCES:
            values[name] = [absolute(path) for path in listed(values[name] or ())]
        if values["lams"] is not None:
            values["lams"] = listed(values["lams"])
        scope = Scope.of(values["only"], values["leave"])
        values |= {"only": list(scope.only) or None, "leave": list(scope.leave) or None}
        for name in ("device", "dtype"):
            values[name] = None if values[name] is None else torch_name(values[name])
        return declared(cls, values, _SEVERAL)

    def located(self, download: bool) -> "Request":
        """With absolute paths of models and data, also in place of names of the hub. download: fetch these first."""
        changes: dict[str, Any] = {
            name: absolute(local_model(path, download, in_place=self.in_place and name == "model"))
            for name in _MODELS
            if (path := getattr(self, name)) is not None
        }
        for name in _DATA:
            path = getattr(self, name)
            changes[name] = path if path is None or is_given(path) else absolute(local_data(path, download))
        if self.up_to_base is None:
            changes["up_to_base"] = self.is_bounded and not is_same(changes["base"], changes["model"])
        return replace(self, **changes, also=[absolute(local_data(path, download)) for path in self.also])

    @property
    def kept_form(self) -> KeptForm:
        """How estimated importances are kept. Raises InputError for what is no form, or no type."""
        return KeptForm.of(self.save_as, self.importance_dtype)

    @property
    def is_of_given_rows(self) -> bool:
        """Whether a data set was given in Python, which only the same call can give again."""
        return any(is_given(getattr(self, name)) for name in _DATA)

    @property
    def bound(self) -> tuple[str, float] | None:
        """The name and the value of the bound that settings have to keep."""
        return next(((name, getattr(self, name)) for name in BOUNDS if getattr(self, name) is not None), None)

    @property
    def is_bounded(self) -> bool:
        """Whether settings have to keep a bound."""
        return self.bound is not None

    @property
    def searches_streamed(self) -> bool:
        """Whether the strengths within a bound are searched for in walks: first a row of them, then closer ones."""
        return self.stream and self.lams is None

    @property
    def bounds_absolutely(self) -> bool:
        """Whether the bound is a number of its own, which the model as it is may break."""
        return self.target_retain_loss is not None or self.retain_floor is not None

    def check_paths(self) -> None:
        """Raise InputError for a path that no file can have; those of a record may be anything."""
        several = [path for name in _SEVERAL_PATHS for path in getattr(self, name)]
        for path in (*(getattr(self, name) for name in (*_PATHS, "checkpoint")), *several):
            if path is not None:
                checked_path(path)

    def settings(self) -> dict[str, Any]:
        """All but the inputs, for the record of the sweep."""
        inputs = (*_PATHS, *_SEVERAL_PATHS)
        return {name: value for name, value in asdict(self).items() if name not in inputs}

    @property
    def strengths(self) -> list[float] | None:
        """The strengths to try, without 0; None if they are to be searched for, one after the other."""
        lams = DEFAULT_STRENGTHS if self.lams is None and self.stream else self.lams
        return None if lams is None else [lam for lam in lams if lam != 0]

    @property
    def criterion(self) -> str | None:
        """What chooses among the settings: ``select``, or else what follows from the bound."""
        if self.select is not None or not self.is_bounded:
            return self.select
        return "largest" if self.strengths is None else "best-forget"

    @property
    def makes_result(self) -> bool:
        """Whether what is chosen becomes a checkpoint."""
        return self.checkpoint is not None or self.in_place

    @property
    def result(self) -> Path:
        """The directory that becomes what is chosen, with links resolved."""
        return Path(os.path.realpath(self.model if self.checkpoint is None else self.checkpoint))

    def curves(self) -> list[Curve]:
        """The curves of settings that are asked for. Raises InputError for settings that are not possible."""
        return curves_of(self.rules, self.ps, self.alphas, self.threshold, self.mus)

    def check_arguments(self) -> None:
        """Raise InputError for what is wrong with the arguments themselves."""
        self.curves()
        check_metric(self.metric)
        check_sizes(self.batch_size, self.max_length)
        check_device(self.device)
        check_threads(self.threads)
        ChatSettings.of(self.system_prompt, self.date_string)
        if self.at not in (None, *PLACES):
            raise InputError(f"‹at› is {self.at!r}; it must be base or model")
        self._check_bounds()
        if self.lams is not None:
            check_strengths(self.lams)
        elif not self.is_bounded:
            raise InputError(f"give ‹lams›, or a bound up to which to search: {_marked(BOUNDS)}")
        if self.select not in (None, *SELECTIONS):
            raise InputError(f"‹select› is {self.select!r}; it must be one of {', '.join(SELECTIONS)}")
        if self.select == "best-forget" and not self.is_bounded:
            raise InputError(f"‹select› best-forget needs a bound on what is retained: {_marked(BOUNDS)}")
        if self.select == "closest" and self.gold is None:
            raise InputError("‹select› closest needs ‹gold›: the model to be close to")
        self._check_result()
        self._check_streamed()
        self.kept_form.check_is_asked_for(self.save_as, self.importance_dtype, self.save_importance is not None)

    def limits(self, original: ScoredSetting, base_loss: float | None) -> Limits:
        """What settings have to keep.

        original: the model as it is. base_loss: the largest forget loss, if there is one. Raises InputError if the
        model as it is breaks the bound, or its scores are not finite.
        """
        limit, floor = self.target_retain_loss, self.retain_floor
        if self.max_retain_rise is not None:
            limit = original.retain_loss + self.max_retain_rise
        elif self.max_retain_increase is not None:
            limit = original.retain_loss * (1 + self.max_retain_increase / 100)
        limits = Limits(limit, floor, base_loss)
        if self.criterion is None or original.keeps(limits):
            return limits
        if not original.is_finite:
            reason = "what it scores is not finite; run it in float32 or bfloat16 (‹dtype›)"
        elif floor is None:
            loss = f"{original.retain_loss:.6g}"
            reason = f"with a retain loss of {loss}, it breaks the limit of {limit:.6g} on that already; allow more"
        else:
            value = f"{self.metric} of {original.retain:.6g}"
            reason = f"with a retain {value}, it breaks the floor of {floor:.6g} already; allow more"
        raise InputError(f"the model as it is, at lambda 0, cannot be chosen against: {reason}")

    def _check_result(self) -> None:
        if self.checkpoint is not None and self.in_place:
            raise InputError("give either ‹checkpoint›, a directory to make, or ‹in_place›")
        name = "in_place" if self.in_place else "checkpoint"
        if self.makes_result and (self.criterion is None or self.out is None):
            raise InputError(f"‹{name}› needs ‹select›, which chooses what is written, and ‹out›, the sweep's record")
        if self.check and not self.makes_result:
            raise InputError("‹check› is of a result; give ‹checkpoint› or ‹in_place› too, or leave it out")

    def _check_streamed(self) -> None:
        check_limits(self.stream, self.memory, self.device_memory)
        if not self.stream:
            return
        if self.out is None:
            raise InputError("‹stream› needs ‹out›: importances, hidden states and the sweep's record lie there")
        if self.metric in GENERATED_METRICS:
            raise InputError(
                f"metric {self.metric} needs answers that the model generates, and a streamed sweep only scores given "
                "ones; take another metric, such as Q_A_Prob or extraction_strength"
            )

    def _check_bounds(self) -> None:
        if self.up_to_base and not self.is_bounded:
            raise InputError(f"‹up_to_base› goes with a bound on what is retained; give one of {_marked(BOUNDS)}")
        bounds = {name: getattr(self, name) for name in BOUNDS if getattr(self, name) is not None}
        if len(bounds) > 1:
            raise InputError(f"give only one of {_marked(bounds, ' and ')}")
        for name, value in bounds.items():
            if not math.isfinite(value):
                raise InputError(f"‹{name}› is {value}; it must be a finite number")
        for name, unit in (("max_retain_rise", "nats"), ("max_retain_increase", "percent")):
            if bounds.get(name, 0) < 0:
                raise InputError(f"‹{name}› is {bounds[name]}; it must be at least 0 {unit}")
        if self.retain_floor is not None and self.metric == LOSS:
            raise InputError(
                "‹retain_floor› is for a metric that falls as knowledge is lost, and a loss rises; "
                "give ‹target_retain_loss›, or another metric"
            )


def _marked(names: Iterable[str], separator: str = ", ") -> str:
    return separator.join(f"‹{name}›" for name in names)
