"""The truth ratio of data of one's own, where all rows have wrong answers: that of TOFU on the same rows."""

from pathlib import Path
from typing import Any

import pytest

from perta_fast import Evaluation, InputError, evaluate
from perta_fast.data.rows import load_rows
from tests.evaluation.test_suites import TOFU, WORDS
from tests.support.models import llama, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {"tokenizer": WORDS, "progress": False, "max_new_tokens": 2}
FORGET, RETAIN, AUTHORS = (TOFU[f"{name}_perturbed"] for name in ("forget01", "retain", "real_authors"))
NAMES = ["forget_truth_ratio", "retain_Truth_Ratio"]


def on_own(folder: Path, forget: list[Any], retain: list[Any], **chosen: Any) -> Evaluation:
    files = {name: write_lines(folder / f"{name}.jsonl", rows) for name, rows in (("f", forget), ("r", retain))}
    return evaluate(llama(1).eval(), forget=files["f"], retain=files["r"], **SETTINGS | chosen)


def on_tofu(folder: Path, metrics: list[str]) -> Evaluation:
    for name, rows in TOFU.items():
        write_lines(folder / f"{name}.jsonl", rows)
    return evaluate(llama(1).eval(), suite="tofu", data=folder, split="forget01", metrics=metrics, **SETTINGS)


def test_that_of_tofu(tmp_path: Path) -> None:
    own = on_own(tmp_path, FORGET, RETAIN)
    expected = on_tofu(tmp_path, NAMES)
    assert {name: own.metrics[name] for name in NAMES} == expected.metrics


def test_the_answer_itself_where_there_is_no_other(tmp_path: Path) -> None:
    own = on_own(tmp_path, FORGET, AUTHORS, metrics=["truth_ratio"])
    assert own.metrics["retain_Truth_Ratio"] == on_tofu(tmp_path, ["ra_Truth_Ratio"]).metrics["ra_Truth_Ratio"]


@pytest.mark.parametrize("wrong", [None, [], "one", ["one", 2], ["one", " "]])
def test_only_if_all_rows_have_wrong_answers(wrong: Any, tmp_path: Path) -> None:
    """What else has this name in another program's data is no error: no row needs the field."""
    rows = [*FORGET[1:], {**FORGET[0], "perturbed_answer": wrong}]
    own = on_own(tmp_path, rows, RETAIN, metrics=["truth_ratio"])
    assert list(own.metrics) == NAMES[1:]
    assert "perturbed_answer" not in load_rows(tmp_path / "f.jsonl")[-1].content
    with pytest.raises(InputError, match="metrics: 'forget_truth_ratio' is no metric of this data"):
        on_own(tmp_path, rows, RETAIN, metrics=["forget_truth_ratio"])
