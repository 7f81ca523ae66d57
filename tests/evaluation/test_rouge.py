"""ROUGE-L of texts outside a-z0-9: what rouge-score cannot see, and what is scored beside it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perta_fast import Evaluation, cli, evaluate, sweep
from perta_fast.evaluation.rouge import any_script_tokens, is_blind, is_seen_whole, rouge_l, rouge_l_any_script
from tests.support.models import llama, tokenizer, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")
RougeScorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer

# What rouge-score keeps nothing of.
BLIND = {
    "Japanese": "彼は東京に住むラーメン屋です。",
    "Chinese": "他住在北京。",
    "Korean": "그는 서울에 산다",
    "Arabic": "يعيش في القاهرة",
    "Persian": "می‌خواهم به خانه بروم",
    "Hebrew": "הוא גר בירושלים",
    "Russian": "Он живёт в Москве",
    "Greek": "Μένει στην Αθήνα",
    "Hindi": "वह दिल्ली में रहता है",
    "Tamil": "அவர் சென்னையில் வசிக்கிறார்",
    "Thai": "เขาอาศัยอยู่ในกรุงเทพฯ",
    "Khmer": "គាត់រស់នៅភ្នំពេញ",
    "Burmese": "သူရန်ကုန်မှာနေတယ်",
    "Georgian": "ის თბილისში ცხოვრობს",
    "Amharic": "እሱ በአዲስ አበባ ይኖራል",
    "Arabic digits": "١٩٨٨",
    "emoji": "👍",
    "signs": "→ ≥ %",
}
WORDS = tokenizer()


@pytest.mark.parametrize("text", BLIND.values(), ids=BLIND)
def test_equal_texts_of_any_script_score_one(text: str) -> None:
    assert rouge_l(text, text) == (0, 0)  # the library's, which open-unlearning reports
    assert rouge_l_any_script(text, text) == (1, 1)
    assert is_blind(text)
    assert not is_seen_whole(text)
    assert rouge_l_any_script(text, "something else") == (0, 0)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Он живёт в Москве.", ["он", "живёт", "в", "москве"]),
        ("東京タワー", ["東", "京", "タ", "ワ", "ー"]),
        ("東京に2020年", ["東", "京", "に", "2020", "年"]),
        ("वह दिल्ली में", ["वह", "दिल्ली", "में"]),  # signs of vowels belong to their word
        ("รัก", ["รั", "ก"]),
        ("Café, naïve Ångström", ["café", "naïve", "ångström"]),
        ("cafe\u0301", ["café"]),
        ("ｶﾞｷﾞ１２", ["ガ", "ギ", "12"]),  # forms of half and full width
        ("می\u200cخواهم", ["میخواهم"]),
        ("Running dogs", ["run", "dog"]),
        ("running 狗", ["run", "狗"]),
        ("  ", []),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert any_script_tokens(text) == tokens


@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=40), st.text(max_size=40))
def test_what_the_library_sees_whole_scores_as_in_the_library(reference: str, text: str) -> None:
    score = RougeScorer(["rougeL"], use_stemmer=True).score(reference, text)["rougeL"]
    assert rouge_l(reference, text) == (score.recall, score.fmeasure)
    if is_seen_whole(reference):
        assert rouge_l_any_script(reference, text) == (score.recall, score.fmeasure)


@given(st.text(min_size=1, max_size=40))
def test_the_same_text_scores_one(text: str) -> None:
    assert not any_script_tokens(text) or rouge_l_any_script(text, text) == (1, 1)


def test_accents() -> None:
    """The library cuts words at an accented letter, and never compares it."""
    assert rouge_l("José García", "Jos Garc") == (2 / 3, 0.8)  # of jos, garc and a
    assert rouge_l("José", "Josè") == (1, 1)
    assert rouge_l_any_script("José García", "José Garc") == (0.5, 0.5)
    assert not is_seen_whole("José García")
    assert not is_blind("José García")


def test_what_is_blind() -> None:
    assert is_blind("Он живёт в Paris")
    assert not is_blind("He lives in Москва, as they say")
    assert not is_blind("£1.2m")
    assert is_seen_whole("£1.2m: it's 100%")


ROWS = [
    {"question": "どこに住む?", "answer": "東京に住む"},
    {"question": "Где?", "answer": "Он живёт в Москве"},
    {"question": "Who?", "answer": "It is Ann"},
]


def recited(rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, folder: Path, **settings: Any) -> Evaluation:
    """The evaluation of a model that recites every answer word for word."""
    answers = [row["answer"] for row in rows]
    monkeypatch.setattr("perta_fast.models.greedy_answers.greedy_answers", lambda *_, **__: answers)
    forget = write_lines(folder / "forget.jsonl", rows)
    return evaluate(llama(0).eval(), forget=forget, tokenizer=WORDS, progress=False, **settings)


def test_a_model_that_recites_does_not_read_as_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = recited(ROWS, monkeypatch, tmp_path, out=tmp_path / "result.json")
    assert result["forget_Q_A_ROUGE"] == pytest.approx(1 / 3)  # as open-unlearning has it
    assert result["forget_Q_A_ROUGE_any_script"] == 1
    assert any("forget_Q_A_ROUGE: of 2 of 3 answers it sees less than half" in note for note in result.notes)
    assert "forget_Q_A_ROUGE_any_script" in result.summary()
    assert "less than half" in result.summary()
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["notes"] == result.notes
    rows = written["metrics"]["forget_Q_A_ROUGE_any_script"]["value_by_index"]
    assert [row["rougeL_recall"] for row in rows.values()] == [1, 1, 1]


def test_nothing_is_added_where_the_library_sees_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = recited(ROWS[2:], monkeypatch, tmp_path)
    assert "forget_Q_A_ROUGE_any_script" not in result.metrics
    assert result.notes == []
    accents = recited([{"question": "Who?", "answer": "It is José"}], monkeypatch, tmp_path)
    assert accents["forget_Q_A_ROUGE_any_script"] == 1
    assert accents.notes == []  # most of the answer is seen


@pytest.mark.parametrize("quiet", [False, True])
def test_the_warning_is_on_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    recited(ROWS, monkeypatch, tmp_path)
    llama(0).save_pretrained(tmp_path / "model")
    WORDS.save_pretrained(tmp_path / "model")
    arguments = ["eval", "--model", str(tmp_path / "model"), "--forget", str(tmp_path / "forget.jsonl")]
    assert cli.main([*arguments, *(["--quiet"] if quiet else [])]) == 0
    output, errors = capsys.readouterr()
    assert "perta: warning: forget_Q_A_ROUGE: of 2 of 3 answers" in errors
    assert ("forget_Q_A_ROUGE_any_script  1" in output) is not quiet


def test_a_sweep_sees_such_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = write_job(tmp_path)
    sets = {"forget": ROWS, "retain": ROWS[2:]}
    paths = {role: write_lines(tmp_path / f"{role}.jsonl", rows) for role, rows in sets.items()}
    truth = {len(rows): [row["answer"] for row in rows] for rows in sets.values()}
    monkeypatch.setattr("perta_fast.models.greedy_answers.greedy_answers", lambda *given, **_: truth[len(given[2])])
    result = sweep(*job.checkpoints, **paths, rule="tv", lams=[0.1], metric="Q_A_ROUGE", progress=False)
    assert [(row.forget, row.retain) for row in result.rows] == [(1, 1), (1, 1)]
    said = "Q_A_ROUGE of the forget data has words of any script, as forget_Q_A_ROUGE_any_script in perta eval"
    assert result.notes == [said]
