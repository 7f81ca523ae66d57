"""What a run has forgotten and kept, in numbers: of its check, or else of how its strength was chosen."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from perta_fast.records.check import FORGOTTEN_RISE, FORGOTTEN_SHARE, LOST_RISE, LOST_SHARE, CheckedData, Measured
from perta_fast.records.report import Report
from perta_fast.records.setting_choice import TriedSetting
from perta_fast.records.strength_choice import TriedStrength

_FORGOTTEN, _LOST = (f"{100 * share:.0f}\N{NO-BREAK SPACE}%" for share in (FORGOTTEN_SHARE, LOST_SHARE))
CRITERIA = (
    f"Rows count as forgotten if their loss rose by at least {FORGOTTEN_RISE:g}, or if {_FORGOTTEN} fewer answers are "
    f"exact; as kept, unless their loss rose by more than {LOST_RISE:g}, or more than {_LOST} fewer answers are exact. "
    "Neither is known of rows whose loss was not finite before."
)


@dataclass(frozen=True)
class Measurement:
    """data: by ``forget`` and ``retain``, before and after. how: a sentence on where the numbers are from."""

    data: Mapping[str, CheckedData]
    how: str


def measured(report: Report) -> Measurement | str:
    """The numbers, or why there are none."""
    check = report.check
    if check is not None and check.is_whole:
        counts = " and ".join(f"{data.rows:,} of {data.total:,} {role} rows" for role, data in check.data.items())
        return Measurement(check.data, f"Measured by the run itself, with both models, on {counts}.")
    missing = "the run did not look (--no-check, no data, or perta apply)"
    exact = "Exact answers were not counted."
    if check is not None:
        missing = check.left_out or "the run was stopped before"
        exact = f"Exact answers were not counted: {missing}."
    if report.setting_choice is not None:
        chosen = report.setting_choice
        data = _data(chosen.rows, chosen.rows, chosen.before, chosen.after)
        scored = "layer by layer" if chosen.streamed else "in memory"
    elif report.choice is not None:
        data = _data(report.choice.rows, report.choice.totals, report.choice.before, report.choice.after)
        scored = "in memory"
    else:
        command = "" if check is None else f" To measure it: {check.command}"
        return f"Not measured: {missing}.{command}"
    if data is None:
        return f"Not measured: {missing}."
    return Measurement(data, f"Measured when the strength was chosen, with the model {scored}. {exact}")


def _data(
    rows: Mapping[str, int],
    totals: Mapping[str, int],
    before: TriedSetting | TriedStrength,
    after: TriedSetting | TriedStrength,
) -> dict[str, CheckedData] | None:
    if not {"forget", "retain"} <= rows.keys():
        return None
    losses = {"forget": (before.forget_loss, after.forget_loss), "retain": (before.retain_loss, after.retain_loss)}
    return {
        role: CheckedData(rows[role], totals.get(role, rows[role]), 0, Measured(first, 0), Measured(last, 0))
        for role, (first, last) in losses.items()
    }


def chance(loss: float | None) -> str:
    """What a mean loss says: the chance, on geometric average, that the model gives to each right token."""
    if loss is None:
        return "–"
    share = 100 * math.exp(-min(max(loss, 0.0), 700.0))
    if share < 0.001:
        return "under 0.001\N{NO-BREAK SPACE}%"
    return f"{share:.0f}\N{NO-BREAK SPACE}%" if share >= 10 else f"{share:.2g}\N{NO-BREAK SPACE}%"


def meaning(measurement: Measurement) -> str:
    """What the loss means, said with the numbers of the forget rows."""
    forget = measurement.data["forget"]
    assert forget.after is not None
    before, after = forget.before.loss, forget.after.loss
    said = "The loss, in nats, says how unexpected the right answer is to the model."
    if before is None or after is None:
        return said
    return (
        f"{said} On the rows to forget it was {number(before)}: the model gave each next piece of the right answer a "
        f"chance of {chance(before)}, on average. Now it is {number(after)}: a chance of {chance(after)}."
    )


def number(loss: float | None) -> str:
    """A loss for a person."""
    if loss is None:
        return "not finite"
    return f"{loss:.2f}" if abs(loss) >= 0.1 else f"{loss:.2g}"
