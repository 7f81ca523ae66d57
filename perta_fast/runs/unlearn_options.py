"""The arguments of ``unlearn``, checked."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from perta_fast.arguments import check_device, check_limits, check_sizes
from perta_fast.data.chat import ChatSettings
from perta_fast.data.formats import data_files
from perta_fast.data.forms import Fields, check_fields
from perta_fast.data.given_data import Data, Source, source_of
from perta_fast.errors import InputError
from perta_fast.files.hub import local_model
from perta_fast.files.reading import checked_path
from perta_fast.importance.kept_form import KeptForm
from perta_fast.progress import Progress
from perta_fast.rules import (
    DEFAULT_MU,
    PLACES,
    PRECONDITIONED,
    Place,
    Rule,
    check_mu,
    check_strength,
    check_takes_importances,
    resolved_at,
)
from perta_fast.runs.settings import check_one_result, check_threads
from perta_fast.subtraction.scope import Patterns, Scope

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

_ROLES = ["forget", "retain"]


@dataclass(frozen=True)
class Options:
    """The arguments of ``unlearn``."""

    model: str | Path
    base: str | Path
    tuned: str | Path
    forget: Data | Source | None
    retain: Data | Source | None
    fields: Fields | None
    download: bool
    rule: str
    lam: float | None
    max_retain_rise: float | None
    mu: float | None
    p: float | None
    alpha: float
    threshold: float | None
    only: Patterns
    leave: Patterns
    at: Place | None
    out: str | Path | None
    in_place: bool
    overwrite: bool
    link_unchanged: bool
    drop_cache: bool | None
    whole_importance: str | Path | None
    save_importance: str | Path | None
    save_as: str | None
    importance_dtype: str | None
    save_tuned: str | Path | None
    check: bool
    stream: bool
    memory: int | None
    device_memory: int | None
    batch_size: int
    max_length: int | None
    system_prompt: str | None
    date_string: str | None
    device: "str | torch.device | None"
    dtype: "torch.dtype | None"
    threads: int | None
    common_rows: bool
    allow_zero: bool
    leave_others: bool
    progress: Progress
    group: "ProcessGroup | None"

    @property
    def data(self) -> dict[str, Source]:
        """The data by role, once it is ``located``."""
        both = {"forget": self.forget, "retain": self.retain}
        return {role: cast(Source, data) for role, data in both.items() if data is not None}

    @property
    def preconditions(self) -> bool:
        """Whether theta_f is preconditioned first."""
        return self.rule == PRECONDITIONED

    @property
    def kept_form(self) -> KeptForm:
        """How the importances are kept. Raises InputError for what is no form, or no type."""
        return KeptForm.of(self.save_as, self.importance_dtype)

    @property
    def makes_temporary(self) -> bool:
        """Whether importances, or a preconditioned θ_f, lie beside the result for a while."""
        if self.preconditions:
            return self.save_tuned is None
        return self.save_importance is None or self.kept_form.as_ratio

    @property
    def scope(self) -> Scope:
        """Which parameters are changed. Raises InputError for what are no patterns."""
        return Scope.of(self.only, self.leave)

    @property
    def paths(self) -> list[Path]:
        """Everything that is read."""
        files = [file for path in self.data.values() for file in data_files(path)]
        whole = [] if self.whole_importance is None else [checked_path(self.whole_importance)]
        return [*map(Path, (self.model, self.base, self.tuned)), *whole, *files]

    def loaded(self, rule: Rule) -> list[Path]:
        """The checkpoints that the run cannot do without loading, once they are ``located``."""
        places = {"model": Path(self.model), "base": Path(self.base)}
        seen = [places[self.at]] if self.at is not None and (rule.estimator is not None or self.preconditions) else []
        return seen if self.lam is not None else [*seen, places["model"]]

    @property
    def in_one_walk(self) -> bool:
        """Whether the model is weighed and written layer by layer while the importances are estimated."""
        return self.stream and not self.in_place and self.whole_importance is None

    def check_arguments(self) -> None:
        """Raise InputError for what is wrong with the arguments themselves."""
        check_strength(self.lam, self.max_retain_rise, self.stream, self.allow_zero)
        self._check_data(self.subtracting_rule())
        ChatSettings.of(self.system_prompt, self.date_string)
        if self.at not in (None, *PLACES):
            raise InputError(f"‹at› is {self.at!r}; it must be base or model")
        check_sizes(self.batch_size, self.max_length)
        check_limits(self.stream, self.memory, self.device_memory)
        check_device(self.device)
        check_threads(self.threads)
        if self.stream and self.link_unchanged and not self.in_place:
            raise InputError("‹stream› writes every shard as it goes; leave ‹link_unchanged› out")
        check_one_result(self.out, self.in_place, self.leave_others)
        Scope.of(self.only, self.leave)
        check_fields(self.fields)

    def _check_data(self, rule: Rule) -> None:
        """Raise InputError unless the data is given that the rule and the search for a strength read."""
        needing = f"rule {rule.name}"
        needed = [] if rule.estimator is None else ["forget"] if self.whole_importance is not None else _ROLES
        if self.preconditions:
            needing, needed = f"rule {PRECONDITIONED}, which is the default,", ["retain"]
        for role in needed:
            if getattr(self, role) is None:
                raise InputError(f"{needing} needs {role} data; give a file of it as ‹{role}›")
        for role in _ROLES if self.lam is None else []:
            if getattr(self, role) is None:
                raise InputError(f"choosing ‹lam› needs {role} data; give a file of it as ‹{role}›, or give ‹lam›")

    def subtracting_rule(self) -> Rule:
        """The rule that subtracts. Raises InputError for settings that are not for it."""
        if self.whole_importance is not None:
            check_takes_importances(self.rule, "whole_importance")
        rule = Rule.of_unlearn(self.rule, self.lam or 0.0, self.p, self.alpha, self.threshold)
        self._check_form()
        if self.preconditions:
            check_mu(DEFAULT_MU if self.mu is None else self.mu)
            if self.save_importance is not None:
                raise InputError(
                    f"rule {PRECONDITIONED}, which is the default, takes no importance to save; ‹save_tuned› keeps "
                    "what it makes, or give a rule that takes importances, such as fisher"
                )
            return rule
        if rule.estimator is None and self.save_importance is not None:
            raise InputError("rule tv takes no importance, so there is none to save; leave ‹save_importance› out")
        for name in ("mu", "save_tuned"):
            if getattr(self, name) is not None:
                raise InputError(f"‹{name}› is for rule {PRECONDITIONED}; leave it out, or take that rule")
        return rule

    def _check_form(self) -> None:
        KeptForm.check_is_asked_for(self.save_as, self.importance_dtype, self.save_importance is not None)
        form = self.kept_form  # which checks both
        if self.whole_importance is not None and form.dtype != "float32" and not form.as_ratio:
            raise InputError(
                f"‹importance_dtype› {form.dtype}: the next request takes rows out of what is kept, so it must be "
                "exact; leave it out, or keep the ratio alone"
            )

    def located(self) -> "Options":
        """With paths in place of names of the hub, and what the rule leaves open."""
        data = {role: source_of(data, self.download, role) for role, data in self.data.items()}
        return replace(
            self,
            at=resolved_at(self.rule, self.at),
            mu=DEFAULT_MU if self.preconditions and self.mu is None else self.mu,
            model=local_model(self.model, self.download, in_place=self.in_place),
            base=local_model(self.base, self.download),
            tuned=local_model(self.tuned, self.download),
            forget=data.get("forget"),
            retain=data.get("retain"),
        )
