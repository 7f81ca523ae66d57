"""What the demo says of its numbers."""

from typing import Any

import pytest

from perta_fast.demo.scoring import Score
from perta_fast.demo.selectivity import Update
from perta_fast.demo.sweep import Run, best_run, gap_to_gold
from perta_fast.demo.table import Line, explain, format_table


def scores(forget: float, retain: float, questions: int = 100) -> dict[str, Score]:
    found = {"forget": forget, "retain": retain, "forget_rephrased": 12.5, "retain_rephrased": 62.5}
    return {split: Score(0.25, accuracy, questions) for split, accuracy in found.items()}


def line(name: str, gap: float, selectivity: float, **changes: Any) -> Line:
    return Line(name, 1.5, scores(50.0, 90.0, **changes), gap, Update(0.75, selectivity))


def test_gap_counts_forget_both_ways_and_retain_one_way() -> None:
    gold = scores(10.0, 95.0)
    assert gap_to_gold(scores(30.0, 85.0), gold) == 30.0
    assert gap_to_gold(scores(4.0, 95.0), gold) == 6.0
    assert gap_to_gold(scores(10.0, 99.0), gold) == 0.0


def test_best_run_has_the_smallest_gap_and_then_the_smallest_lambda() -> None:
    runs = [
        Run("tv", lam, Score(0.0, 0.0, 1), Score(0.0, 0.0, 1), gap) for lam, gap in ((2.0, 3.0), (1.0, 3.0), (0.5, 4.0))
    ]
    assert best_run(runs) is runs[1]


def test_standard_error_of_a_gap() -> None:
    # Proportions of 0.5 and 0.9 over 100 questions: variances 25 and 9 points squared.
    assert line("tv", 0.0, 1.0).error == pytest.approx(34**0.5)
    assert line("tv", 0.0, 1.0, questions=400).error == pytest.approx(34**0.5 / 2)


def test_table_shows_every_number() -> None:
    row = format_table([line("fisher", 7.25, 1.0)]).splitlines()[-1]
    assert row.split() == [
        *("fisher", "1.5", "0.250", "50.0", "%", "0.250", "90.0", "%"),
        *("0.250", "12.5", "%", "0.250", "62.5", "%", "7.2"),
    ]


@pytest.mark.parametrize(
    ("gap", "selectivity", "verdict", "reason"),
    [
        (20.0, 2.0, "closer to gold than tv", "changes more of the parameters that forget data need"),
        (20.0, 1.0, "closer to gold than tv", "the diagonal does not explain this"),
        (39.0, 2.0, "as close to gold as tv", "here the diagonal does not decide"),
        (60.0, 1.0, "further from gold than tv", "hardly tell forget from retain"),
    ],
)
def test_verdict_follows_from_the_numbers(gap: float, selectivity: float, verdict: str, reason: str) -> None:
    text = explain(line("tv", 40.0, 1.0), [line("grad", gap, selectivity)])
    assert f"- grad is {verdict}" in text
    assert f"gap {gap:.1f} against 40.0" in text
    assert f"selectivity {selectivity:.2f} times" in text
    assert reason in text


def test_rules_with_one_reason_share_its_sentence() -> None:
    text = explain(line("tv", 40.0, 1.0), [line("grad", 20.0, 2.0), line("fisher", 10.0, 3.0)])
    assert text.splitlines()[-1].startswith("grad, fisher: the update changes more")
