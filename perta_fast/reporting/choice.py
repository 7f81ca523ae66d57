"""How the strength or the setting of a run was chosen: sentences, a curve with limit and choice, and what was tried."""

from collections.abc import Sequence
from dataclasses import dataclass

from perta_fast.records.report import Report
from perta_fast.records.setting_choice import SettingChoice, TriedSetting
from perta_fast.records.strength_choice import StrengthChoice
from perta_fast.reporting import figures
from perta_fast.reporting.figures import Plot
from perta_fast.reporting.html import Cell
from perta_fast.scoring.criteria import LOSS


@dataclass(frozen=True)
class Choice:
    """What the page shows of it. notes: on what the plot leaves out. rows: one for each that was tried."""

    sentences: list[str]
    plot: Plot
    notes: list[str]
    columns: list[str]
    rows: list[Sequence[Cell]]


def choice_of(report: Report) -> Choice | None:
    """None if the strength was given."""
    if report.setting_choice is not None:
        return _of_setting(report.setting_choice)
    return None if report.choice is None else _of_strength(report.choice)


def _of_strength(choice: StrengthChoice) -> Choice:
    rows: list[Sequence[Cell]] = [
        (each.lam, each.forget_loss, each.retain_loss, "chosen" if each.lam == choice.after.lam else "")
        for each in (choice.before, *sorted(choice.tried, key=lambda each: each.lam))
    ]
    columns = ["λ", "forget loss", "retain loss", ""]
    return Choice(_capitals(choice.lines()), figures.strength_choice(choice), [], columns, rows)


def _of_setting(choice: SettingChoice) -> Choice:
    notes = [] if not choice.skipped else [f"{choice.skipped} more were skipped: a smaller λ had broken the bound."]
    if choice.metric != LOSS and choice.limit is not None:
        notes.append(f"The bound is on the retain loss, which a plot of {choice.metric} does not show.")
    metrics = [] if choice.metric == LOSS else [f"{role} {choice.metric}" for role in ("forget", "retain")]
    return Choice(
        _capitals(choice.lines()),
        figures.setting_choice(choice),
        notes,
        ["setting", "λ", "forget loss", "retain loss", *metrics, "parameters changed (%)", ""],
        [_setting(each, choice) for each in (choice.before, *choice.tried)],
    )


def _setting(each: TriedSetting, choice: SettingChoice) -> Sequence[Cell]:
    """A row of the table of settings."""
    metrics = () if choice.metric == LOSS else (each.forget, each.retain)
    changed = None if each.changed is None else 100 * each.changed
    name, mark = each.curve if each.rule else "the model as it is", "chosen" if each == choice.after else ""
    return name, each.lam, each.forget_loss, each.retain_loss, *metrics, changed, mark


def _capitals(lines: list[str]) -> list[str]:
    return [f"{line[:1].upper()}{line[1:]}." for line in lines]
