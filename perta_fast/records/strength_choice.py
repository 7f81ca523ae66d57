"""How a run has chosen its strength, for its report."""

from dataclasses import dataclass


@dataclass
class TriedStrength:
    """Mean over the rows of their mean token loss, in nats; None if it is not finite. lam: 0 is the model as it is."""

    lam: float
    forget_loss: float | None
    retain_loss: float | None


@dataclass
class StrengthChoice:
    """The largest strength at which the retain loss is at most ``max_retain_rise`` nats above that of the model.

    metric: what the bound is on, ``loss``. rows: by role, how many were scored, of ``totals``. before: the model as it
    is. after: at the chosen strength. tried: every strength, in the order of trial. base_forget_loss: of theta_0; the
    forget loss is at most this too. None if the bound alone has decided.
    """

    max_retain_rise: float
    metric: str
    rows: dict[str, int]
    totals: dict[str, int]
    before: TriedStrength
    after: TriedStrength
    tried: list[TriedStrength]
    base_forget_loss: float | None = None

    def condition(self) -> str:
        """What holds of the chosen strength, in a clause."""
        kept = f"the retain loss rises by at most {self.max_retain_rise:g} nats"
        if self.base_forget_loss is None:
            return kept
        return f"the forget loss is at most that of base, {_nats(self.base_forget_loss)}, and {kept}"

    def lines(self) -> list[str]:
        """For a person."""
        before, after = self.before, self.after
        rows = [f"{count:,} of {self.totals.get(role, count):,} {role} rows" for role, count in self.rows.items()]
        return [
            f"lambda {after.lam!r} was chosen of {len(self.tried)} tried, as the largest at which {self.condition()}",
            f"on {' and '.join(rows)}: retain loss {_nats(before.retain_loss)} before, {_nats(after.retain_loss)} "
            f"after; forget loss {_nats(before.forget_loss)} before, {_nats(after.forget_loss)} after",
        ]


def _nats(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4g}"
