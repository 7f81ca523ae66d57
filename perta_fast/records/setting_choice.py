"""How the setting of a checkpoint was chosen among many that were scored, for its report."""

from dataclasses import dataclass

_LOSS = "loss"
_ROLES = ("forget", "retain")
_CRITERIA = {
    "best-forget": "the one that has forgotten most",
    "largest": "the one that has forgotten most, of each curve's largest lambda",
    "closest": "the one that is closest to the gold model",
}


@dataclass
class TriedSetting:
    """A setting as ``unlearn`` takes it, with what it scores; a number that is not finite is None.

    rule: empty for the model as it is, and for a gold model. forget_loss, retain_loss: in nats. forget, retain: the
    metric. changed: share of the elements, in [0, 1], whose stored value differs from the model's.
    """

    rule: str
    mu: float | None
    p: float
    alpha: float
    lam: float
    forget_loss: float | None
    retain_loss: float | None
    forget: float | None
    retain: float | None
    changed: float | None

    @property
    def curve(self) -> str:
        """The rule with its numbers, without the strength."""
        if self.mu is not None:
            return f"{self.rule}, μ {self.mu:g}"
        return self.rule if self.rule == "tv" else f"{self.rule}, p {self.p:g}, α {self.alpha:g}"


@dataclass
class SettingChoice:
    """One of many scored settings, chosen within a bound.

    bound: the argument of ``sweep`` that sets it, with its ``value``; None where there was none. limit: the largest
    allowed retain loss in nats that follows from it; floor: the smallest allowed retain metric. metric: what ``forget``
    and ``retain`` of a setting are. select: how the choice was made. streamed: whether one part of the model was in
    memory at a time. rows: by role, how many were scored. before: the model as it is. after: the chosen setting. tried:
    every setting that was scored; so many more were ``skipped``, since a smaller strength broke the bound. gold: what
    the gold model scores, if there is one. base_forget_loss: of theta_0; the forget loss is at most this too. None if
    it is no limit.
    """

    bound: str | None
    value: float | None
    limit: float | None
    floor: float | None
    metric: str
    select: str
    streamed: bool
    rows: dict[str, int]
    before: TriedSetting
    after: TriedSetting
    tried: list[TriedSetting]
    skipped: int = 0
    gold: TriedSetting | None = None
    base_forget_loss: float | None = None

    def lines(self) -> list[str]:
        """For a person: what was chosen among what, and what it scores."""
        how = "layer by layer" if self.streamed else "with the model in memory"
        chosen = (
            f"{self.after.curve}, lambda {self.after.lam!r} was chosen of {len(self.tried)} settings, scored {how}, as "
            f"{self._criterion()}{self.within()}"
        )
        rows = " and ".join(f"{count:,} {role} rows" for role, count in self.rows.items() if role in _ROLES)
        scores = [self._score(role, f"{role}_loss", "loss") for role in _ROLES]
        if self.metric != _LOSS:
            scores += [self._score(role, role, self.metric) for role in _ROLES]
        return [chosen, f"on {rows}: {'; '.join(scores)}"]

    def _criterion(self) -> str:
        if self.select == "largest" and len({each.curve for each in self.tried}) == 1:
            return "the largest lambda"
        return _CRITERIA.get(self.select, self.select)

    def within(self) -> str:
        """The bounds as the end of a sentence, "" without one."""
        if self.bound is None or self.value is None:
            return ""
        bound = {
            "target_retain_loss": f"the retain loss is at most {self.value:g} nats",
            "max_retain_rise": f"the retain loss rises by at most {self.value:g} nats",
            "max_retain_increase": f"the retain loss rises by at most {self.value:g} %",
            "retain_floor": f"the retain {self.metric} is at least {self.value:g}",
        }.get(self.bound, f"{self.bound} is {self.value:g}")
        if self.base_forget_loss is not None:
            bound = f"the forget loss is at most that of base, {self.base_forget_loss:.4g}, and {bound}"
        return f" while {bound}"

    def _score(self, role: str, name: str, metric: str) -> str:
        before, after = getattr(self.before, name), getattr(self.after, name)
        allowed = ""
        if name == "retain_loss" and self.limit is not None:
            allowed = f" (at most {self.limit:.4g} is allowed)"
        elif name == "retain" and self.floor is not None:
            allowed = f" (at least {self.floor:.4g} is asked for)"
        return f"{role} {metric} {_number(before)} before, {_number(after)} after{allowed}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
