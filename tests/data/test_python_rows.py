"""Data given to Python functions: data sets, DataFrames, dictionaries of columns, tables; taken or refused in words."""

from pathlib import Path
from typing import Any

import pytest

from perta_fast import InputError, estimate_importance
from perta_fast.data.python_rows import rows_of
from perta_fast.data.rows import load_rows, rows_from
from perta_fast.runs.estimate_importance import _checked_rows
from tests.data.test_forms import CALL, TALK, TOOL
from tests.support.models import FORGET, llama, tokenizer

ROWS = [{"question": "Who?", "answer": "Me."}, {"question": "And 2?", "answer": "Author 2."}]
COLUMNS = {"question": ["Who?", "And 2?"], "answer": ["Me.", "Author 2."]}
OTHER = {"type": "function", "function": {"name": "g", "parameters": {"properties": {"y": {"type": "int"}}}}}
CALLS = {"messages": [TALK[0], CALL, {"role": "tool", "content": "1", "name": "f"}, TALK[1]], "tools": [TOOL, OTHER]}


def contents(data: Any) -> list[Any]:
    return [row.content for row in rows_from(rows_of(data))]


def test_a_dictionary_of_columns() -> None:
    assert contents(COLUMNS) == ROWS
    assert contents({"text": ("a", "b"), "more": [None, "x"]}) == [{"text": "a"}, {"text": "b"}]
    assert contents({"messages": [TALK, TALK]}) == [{"messages": TALK}] * 2


def test_a_data_set_and_its_splits() -> None:
    datasets = pytest.importorskip("datasets")
    data_set = datasets.Dataset.from_list(ROWS)
    assert contents(data_set) == contents(datasets.DatasetDict({"train": data_set})) == ROWS
    assert contents(data_set.to_iterable_dataset()) == ROWS
    assert contents(datasets.IterableDatasetDict({"train": data_set.to_iterable_dataset()})) == ROWS
    splits = datasets.DatasetDict({"train": data_set, "test": data_set})
    with pytest.raises(InputError, match=r"data has the splits train, test; give one of them, as in data\['train'\]"):
        rows_of(splits)
    # Arrow gives a tool the parameters of all others, as null.
    assert contents(datasets.Dataset.from_list([CALLS])) == [CALLS]


def test_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas")
    assert contents(pandas.DataFrame(ROWS)) == ROWS
    holes = pandas.DataFrame([{"text": "a"}, {"question": "Who?", "answer": "Me."}])  # cells without a value are NaN
    assert contents(holes) == [{"text": "a"}, ROWS[0]]
    assert contents(holes.convert_dtypes()) == [{"text": "a"}, ROWS[0]]
    assert contents(pandas.DataFrame({"messages": [TALK]})) == [{"messages": TALK}]


def test_a_data_frame_of_a_parquet_file(tmp_path: Path) -> None:
    pandas, _ = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    pandas.DataFrame({"messages": [CALLS["messages"]], "tools": [CALLS["tools"]]}).to_parquet(tmp_path / "a.parquet")
    assert contents(pandas.read_parquet(tmp_path / "a.parquet")) == [CALLS]  # lists are arrays of NumPy's there


def test_a_table_of_arrow() -> None:
    pa = pytest.importorskip("pyarrow")
    assert contents(pa.Table.from_pylist([CALLS])) == [CALLS]


BAD: dict[str, tuple[Any, str]] = {
    "one row": ({"question": "Who?", "answer": "Me."}, "a dictionary, but no columns: put one row in a list"),
    "one conversation": ({"messages": TALK}, "a dictionary, but no columns: put one row in a list"),
    "columns of different lengths": ({"a": ["x"], "b": ["x", "y"]}, "data has columns of different lengths: a 1, b 2"),
    "nothing": ({}, "but no columns"),
    "a number": (3, "data is int; it must be a file, or have __iter__"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str) -> None:
    data, reason = BAD[case]
    with pytest.raises(InputError, match=reason.replace("[", r"\[")):
        rows_of(data)


def test_importance_is_the_same_however_the_rows_come() -> None:
    expected = estimate_importance(llama(), FORGET, tokenizer=tokenizer(), progress=False)
    prompts = {"prompt": [row["question"] for row in FORGET], "completion": [row["answer"] for row in FORGET]}
    named = {"q": prompts["prompt"], "a": prompts["completion"]}
    for data, fields, read_as in (
        (prompts, None, "prompt as question, completion as answer"),
        (named, {"question": "q", "answer": "a"}, "q as question, a as answer"),
    ):
        found = estimate_importance(llama(), data, tokenizer=tokenizer(), fields=fields, progress=False)
        assert found.metadata.read_as == read_as
        assert found.metadata.data_hash == expected.metadata.data_hash
        assert all(found.tensors[name].equal(tensor) for name, tensor in expected.tensors.items())
    assert expected.metadata.read_as == ""


def test_the_advice_to_write_a_file_is_right(tmp_path: Path) -> None:
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    datasets.Dataset.from_list(ROWS).to_json(tmp_path / "a.jsonl")
    pandas.DataFrame(ROWS).to_json(tmp_path / "b.jsonl", orient="records", lines=True)
    for name in ("a", "b"):
        assert [row.content for row in load_rows(tmp_path / f"{name}.jsonl")] == ROWS


def test_texts_alone_need_a_name() -> None:
    with pytest.raises(InputError, match="sample 0: is not a JSON object, but a text; give it a name"):
        contents(["one", "two"])


def test_fields_are_not_for_tokens() -> None:
    with pytest.raises(InputError, match="fields is for rows of text, and this data is tokenised already"):
        _checked_rows([{"input_ids": [1, 2]}], {"text": "input_ids"})
