"""What a run has forgotten and kept: loss and exact answers before and after, a verdict, and warnings.

It holds numbers alone, no text of the data.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

# What counts as a real change: of a loss in nats, and of exact answers as a share of those that were measured.
FORGOTTEN_RISE = 0.1
FORGOTTEN_SHARE = 0.1
LOST_RISE = 0.2
LOST_SHARE = 0.2
# Base and tuned were exchanged if the forget loss rises so much between them; forget and retain, if the retain loss
# falls so much, and so many times as much as the forget loss falls.
EXCHANGED_RISE = 0.1
EXCHANGED_TIMES = 2.0


@dataclass
class Measured:
    """Of the measured rows, the mean loss in nats, None if it is not finite; and how many answers are exact.

    exact: greedy decoding of the question gives the answer, to its end.
    """

    loss: float | None
    exact: int


@dataclass
class CheckedData:
    """One data set. rows: how many were measured, of ``total``; answers: how many of them have a question."""

    rows: int
    total: int
    answers: int
    before: Measured
    after: Measured | None

    @property
    def is_known(self) -> bool:
        """Whether what came of it can be told: not if the loss was not finite before."""
        return self.before.loss is not None

    @property
    def rise(self) -> float:
        """By how much the loss rose, in nats; infinite if it is not finite afterwards, NaN if it was not before."""
        assert self.after is not None
        if self.before.loss is None:
            return math.nan
        return math.inf if self.after.loss is None else self.after.loss - self.before.loss

    @property
    def lost_share(self) -> float:
        """How many fewer answers are exact, as a share of all that were measured."""
        assert self.after is not None
        return (self.before.exact - self.after.exact) / self.answers if self.answers else 0.0

    @property
    def is_forgotten(self) -> bool:
        """Whether the loss, or the number of exact answers, has really changed, as far as it is known."""
        return self.is_known and (self.rise >= FORGOTTEN_RISE or self.lost_share >= FORGOTTEN_SHARE)

    @property
    def is_lost(self) -> bool:
        """Whether much was lost, if this was to be kept, as far as it is known."""
        return self.is_known and (self.rise > LOST_RISE or self.lost_share > LOST_SHARE)

    HEAD: ClassVar[tuple[str, ...]] = ("rows", "loss before", "loss after", "exact before", "exact after", "answers")

    def cells(self, role: str) -> list[str]:
        """Its numbers in a table, under ``HEAD``."""
        assert self.after is not None
        exact = [str(measured.exact) for measured in (self.before, self.after)] if self.answers else ["–", "–"]
        losses = [_nats(measured.loss) for measured in (self.before, self.after)]
        return [f"{role}, {self.rows} of {self.total}", *losses, *exact, str(self.answers)]

    def in_words(self, role: str) -> str:
        """A clause with all its numbers."""
        assert self.after is not None
        before, after = self.before.loss, self.after.loss
        loss = f"the loss on the {role} rows "
        if before is None:
            loss += f"was not finite before, and is {_nats(after)}"
        elif after is None:
            loss += f"is not finite ({_nats(before)} before)"
        elif _nats(before) == _nats(after):
            loss += f"stayed at {_nats(after)}"
        else:
            loss += f"{'rose' if after > before else 'fell'} from {_nats(before)} to {_nats(after)}"
        if not self.answers:
            return loss
        return f"{loss}, and {self.after.exact} of {self.answers} answers are exact ({self.before.exact} before)"


@dataclass
class Check:
    """The check of one run.

    data: by ``forget`` and ``retain``. base, tuned: the loss of these two on the first rows of each, which tells
    whether any was exchanged. left_out: why nothing was measured, or not all; "" if nothing is missing. command: what
    measures it all the same.
    """

    data: dict[str, CheckedData]
    base: dict[str, float | None]
    tuned: dict[str, float | None]
    left_out: str
    command: str

    @classmethod
    def begun(cls, command: str, left_out: str = "") -> "Check":
        """With nothing measured yet."""
        return cls({}, {}, {}, left_out, command)

    @property
    def is_whole(self) -> bool:
        """Whether both data sets were measured before and after."""
        measured = [role for role, data in self.data.items() if data.after is not None]
        return not self.left_out and sorted(measured) == ["forget", "retain"]

    @property
    def is_due(self) -> bool:
        """Whether the result is still to be measured."""
        return not self.left_out and not self.is_whole

    def lines(self) -> list[str]:
        """For a person: the verdict and what it rests on, or what is missing."""
        if not self.is_whole:
            reason = self.left_out or "the run was stopped before"
            return [f"not checked what was forgotten and kept: {reason}. To measure it: {self.command}"]
        counts = [f"{data.rows} of {data.total} {role} rows" for role, data in self.data.items()]
        lines = [self.verdict()]
        if any(data.rows < data.total for data in self.data.values()):
            lines.append(f"measured on {' and '.join(counts)}; all rows: {self.command}")
        return lines

    def verdict(self) -> str:
        """What was forgotten and what was kept, in two sentences."""
        heads = outcomes(self.data)
        return " ".join(f"{heads[role]}: {data.in_words(role)}." for role, data in self.data.items())

    def early_warnings(self) -> list[str]:
        """What the losses of base and tuned tell, before anything is subtracted."""
        falls = {role: _fall(self.base.get(role), self.tuned.get(role)) for role in ("forget", "retain")}
        retain_learnt = falls["retain"] >= max(EXCHANGED_RISE, EXCHANGED_TIMES * falls["forget"])
        forget_lost = falls["forget"] <= -EXCHANGED_RISE
        if retain_learnt and forget_lost:  # one of the two was learnt, to the smallest loss of all
            retain_learnt = self.tuned["retain"] < self.base["forget"]  # type: ignore[operator]
        if retain_learnt:
            return [
                "tuned has learnt the retain rows, not the forget rows: from base to tuned the loss fell from "
                f"{_nats(self.base['retain'])} to {_nats(self.tuned['retain'])} on the retain rows, and went from "
                f"{_nats(self.base['forget'])} to {_nats(self.tuned['forget'])} on the forget rows; were forget and "
                "retain exchanged?"
            ]
        if forget_lost:
            return [
                f"the loss on the forget rows is {_nats(self.tuned['forget'])} with tuned and "
                f"{_nats(self.base['forget'])} with base, so tuned has not learnt them; were base and tuned exchanged?"
            ]
        return []

    def late_warnings(self) -> list[str]:
        """What is wrong with the result. Of a check that is whole."""
        forget, retain = self.data["forget"], self.data["retain"]
        exchanged = not forget.is_forgotten and retain.is_forgotten and retain.rise > forget.rise
        told = self.early_warnings()  # these say what to do
        if exchanged and not told:
            return [
                "the retain rows have lost more than the forget rows; were forget and retain exchanged (the files, or "
                "the importances), or is tuned not the base tuned on the forget rows?"
            ]
        warnings = []
        if forget.is_known and not forget.is_forgotten:
            warnings.append(
                f"nothing was forgotten: the loss on the forget rows rose by less than {FORGOTTEN_RISE:g} nats"
                + ("" if told else "; give a larger lambda, or allow the retain loss a larger rise")
            )
        if retain.is_lost:
            warnings.append(
                f"much was lost: {retain.in_words('retain')}; give a smaller lambda, or a larger alpha if the rule "
                "has one"
            )
        return warnings


def outcomes(data: Mapping[str, CheckedData]) -> dict[str, str]:
    """In a few words, whether the forget rows were forgotten and the retain rows kept."""
    forget, retain = data["forget"], data["retain"]
    assert forget.after is not None
    heads = {"forget": "Forgotten", "retain": "Lost" if retain.is_lost else "Kept"}
    if not forget.is_forgotten:
        heads["forget"] = "Not forgotten"
    elif 2 * forget.after.exact > forget.before.exact:
        heads["forget"] = "Forgotten in part"
    unknown = {"forget": "Not known if forgotten", "retain": "Not known if kept"}
    return {role: head if data[role].is_known else unknown[role] for role, head in heads.items()}


def _fall(before: float | None, after: float | None) -> float:
    """By how much a loss fell; 0 if it is not known."""
    return 0.0 if before is None or after is None else before - after


def _nats(loss: float | None) -> str:
    if loss is None:
        return "not finite"
    return f"{loss:.2f}" if loss >= 0.1 else f"{loss:.2g}"
