"""Scores on questions in other words, where the data has them."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from perta_fast import Evaluation, evaluate
from perta_fast.data.rows import load_rows
from perta_fast.errors import InputError
from perta_fast.models import greedy_answers
from tests.evaluation.test_suites import TOFU, WORDS, losses
from tests.support.models import FORGET, llama, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [{**row, "paraphrased_question": f"Say, {row['question']}"} for row in FORGET]
NAMES = ["forget_paraphrased_question_Prob", "forget_paraphrased_question_ROUGE"]
SETTINGS: dict[str, Any] = {"tokenizer": WORDS, "progress": False, "max_new_tokens": 4}


def on_own(model: LlamaForCausalLM, rows: list[dict[str, Any]], folder: Path, metrics: list[str] | None) -> Evaluation:
    return evaluate(model, forget=write_lines(folder / "f.jsonl", rows), metrics=metrics, **SETTINGS)


def on_tofu(model: LlamaForCausalLM, rows: list[dict[str, Any]], folder: Path, metrics: list[str] | None) -> Evaluation:
    for name, others in TOFU.items():
        write_lines(folder / f"{name}.jsonl", others)
    both = [{**first, **second} for first, second in zip(TOFU["forget01_perturbed"], rows, strict=True)]
    write_lines(folder / "forget01_perturbed.jsonl", both)
    return evaluate(model, suite="tofu", data=folder, split="forget01", metrics=metrics, **SETTINGS)


@pytest.mark.parametrize("on", [on_own, on_tofu])
def test_the_question_in_other_words_is_asked(on: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answering(_: Any, tokenizer: Any, prompts: Any, **__: Any) -> list[str]:
        asked.extend(tokenizer.batch_decode(prompts))
        return [row["answer"] for row in ROWS]

    monkeypatch.setattr(greedy_answers, "greedy_answers", answering)
    model = llama(1).eval()
    result = on(model, ROWS, tmp_path, NAMES)
    assert list(result.metrics) == NAMES
    assert asked == [f"Question: {row['paraphrased_question']}\nAnswer:" for row in ROWS]
    expected = losses(model, [{"question": row["paraphrased_question"], "answer": row["answer"]} for row in ROWS])
    found = [row["avg_loss"] for row in result.metrics[NAMES[0]].samples]
    assert found == pytest.approx(expected, rel=1e-4)
    assert result[NAMES[1]] == 1


@pytest.mark.parametrize("on", [on_own, on_tofu])
def test_only_if_it_is_named(on: Any, tmp_path: Path) -> None:
    model = llama(1).eval()
    with_questions = on(model, ROWS, tmp_path, None)
    assert not set(NAMES) & set(with_questions.metrics)
    assert on(model, FORGET, tmp_path, None).metrics == with_questions.metrics


LACKING = r"Prob needs a paraphrased_question in every row of the forget set"


@pytest.mark.parametrize("on", [on_own, on_tofu])
def test_rows_that_lack_it(on: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=LACKING):
        on(llama(1), [*ROWS[:-1], FORGET[-1]], tmp_path, NAMES)


BAD = [3, " ", "\ud800"]


@pytest.mark.parametrize("bad", [None, "", [], ["Who?"], *BAD])
def test_rows_where_it_is_no_text(bad: Any, tmp_path: Path) -> None:
    """What else has this name in another program's data is no error, unless the field is needed."""
    rows = [*ROWS[:-1], {**FORGET[-1], "paraphrased_question": bad}]
    assert on_own(llama(1), rows, tmp_path, ["forget_loss"]).metrics
    assert load_rows(tmp_path / "f.jsonl")[-1].content == FORGET[-1]
    with pytest.raises(InputError, match=LACKING):
        on_own(llama(1), rows, tmp_path, NAMES)


@pytest.mark.parametrize("bad", BAD)
def test_rows_of_tofu_where_it_is_no_text(bad: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 5: (\"paraphrased_question\"|has half a character)"):
        on_tofu(llama(1), [*ROWS[:-1], {**FORGET[-1], "paraphrased_question": bad}], tmp_path, NAMES)
