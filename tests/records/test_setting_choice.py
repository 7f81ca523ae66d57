"""What is said of a choice among settings, and that it is read again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perta_fast.errors import InputError
from perta_fast.records.report import Report
from perta_fast.records.setting_choice import SettingChoice, TriedSetting


def setting(rule: str, lam: float, forget: float | None, retain: float | None, **changes: Any) -> TriedSetting:
    """One that is scored by its loss."""
    return replace(TriedSetting(rule, None, 1.0, 1.0, lam, forget, retain, forget, retain, 0.5), **changes)


BEFORE = setting("", 0.0, 0.08, 0.07)
AFTER = setting("preconditioned", 4.0, 2.5, 0.073, mu=10.0)
WEIGHED = setting("empirical-fisher", 8.0, 1.5, 0.072, alpha=16.0)
BROKEN = setting("tv", 1.0, None, None)


def choice(**changes: Any) -> SettingChoice:
    made = SettingChoice(
        bound="max_retain_increase",
        value=5.0,
        limit=0.0735,
        floor=None,
        metric="loss",
        select="best-forget",
        streamed=True,
        rows={"forget": 40, "retain": 1200, "also": 3},
        before=BEFORE,
        after=AFTER,
        tried=[AFTER, WEIGHED, BROKEN],
    )
    return replace(made, **changes)


def test_in_words() -> None:
    assert choice().lines() == [
        "preconditioned, μ 10, lambda 4.0 was chosen of 3 settings, scored layer by layer, as the one that has "
        "forgotten most while the retain loss rises by at most 5 %",
        "on 40 forget rows and 1,200 retain rows: forget loss 0.08 before, 2.5 after; retain loss 0.07 before, 0.073 "
        "after (at most 0.0735 is allowed)",
    ]


@pytest.mark.parametrize(
    ("changes", "ending"),
    [
        (
            {"bound": "max_retain_rise", "value": 0.05},
            "forgotten most while the retain loss rises by at most 0.05 nats",
        ),
        (
            {"bound": "max_retain_rise", "value": 0.05, "base_forget_loss": 2.6},
            "forgotten most while the forget loss is at most that of base, 2.6, and the retain loss rises by at most "
            "0.05 nats",
        ),
        ({"bound": "target_retain_loss", "value": 2.0}, "forgotten most while the retain loss is at most 2 nats"),
        (
            {"bound": "retain_floor", "value": 0.7, "metric": "Q_A_Prob"},
            "forgotten most while the retain Q_A_Prob is at least 0.7",
        ),
        (
            {"select": "largest", "streamed": False},
            "scored with the model in memory, as the one that has forgotten most, of each curve's largest lambda while "
            "the retain loss rises by at most 5 %",
        ),
        ({"select": "largest", "tried": [AFTER]}, "as the largest lambda while the retain loss rises by at most 5 %"),
        ({"select": "closest", "bound": None, "value": None}, "as the one that is closest to the gold model"),
    ],
)
def test_bounds_and_criteria_in_words(changes: dict[str, Any], ending: str) -> None:
    assert choice(**changes).lines()[0].endswith(ending)


def test_the_metric_in_words() -> None:
    before, after = replace(BEFORE, forget=0.9, retain=0.95), replace(AFTER, forget=0.1, retain=0.9)
    made = choice(
        metric="Q_A_Prob", bound="retain_floor", value=0.85, limit=None, floor=0.85, before=before, after=after
    )
    assert made.lines()[1].endswith(
        "retain loss 0.07 before, 0.073 after; forget Q_A_Prob 0.9 before, 0.1 after; retain Q_A_Prob 0.95 before, 0.9 "
        "after (at least 0.85 is asked for)"
    )


def test_names_of_curves() -> None:
    assert [each.curve for each in (AFTER, WEIGHED, BROKEN)] == [
        "preconditioned, μ 10",
        "empirical-fisher, p 1, α 16",
        "tv",
    ]


def report(made: SettingChoice | None) -> Report:
    return Report("tv", 4.0, 1.0, 1.0, None, inputs={}, setting_choice=made)


def test_it_is_read_again(tmp_path: Path) -> None:
    made = choice(gold=BEFORE, skipped=2)
    report(made).save(tmp_path)
    found = Report.load(tmp_path)
    assert found.setting_choice == made
    assert set(made.lines()) <= set(found.summary().splitlines())


def test_older_reports_have_none(tmp_path: Path) -> None:
    report(None).save(tmp_path)
    path = tmp_path / "perta_report.json"
    content = json.loads(path.read_text())
    assert content.pop("setting_choice") is None
    path.write_text(json.dumps(content))
    assert Report.load(tmp_path).setting_choice is None


def test_a_damaged_one_is_refused(tmp_path: Path) -> None:
    report(choice()).save(tmp_path)
    path = tmp_path / "perta_report.json"
    content = json.loads(path.read_text())
    content["setting_choice"]["tried"][1]["lam"] = "8"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"setting_choice\.tried\[1\]\.lam is '8', not a number"):
        Report.load(tmp_path)
