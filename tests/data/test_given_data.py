"""What a Python function is given as data: a file, or rows that are known again by their hash."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from perta_fast import InputError, Sample
from perta_fast.data.formats import data_files, hash_data
from perta_fast.data.given import GivenRows, is_given
from perta_fast.data.given_data import source_of
from perta_fast.data.rows import read_data
from perta_fast.data.samples import encode
from tests.support.models import FORGET, tokenizer, write_lines

TOKENS = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9]}]
SAMPLES = [Sample((5, 6, 7), (-100, 6, 7)), Sample((8, 9), (8, 9))]


def given(data: Any) -> GivenRows:
    source = source_of(data, False, "forget")
    assert isinstance(source, GivenRows)
    return source


def test_rows_have_the_hash_of_the_file_that_json_writes(tmp_path: Path) -> None:
    source, file = given(FORGET), write_lines(tmp_path / "forget.jsonl", FORGET)
    rows, digest = read_data(source)
    assert [row.content for row in rows] == FORGET
    assert digest == hash_data(file) == blake3("".join(json.dumps(row) + "\n" for row in FORGET).encode()).hexdigest()
    assert source_of(file, False, "forget") == file


def test_the_hash_sees_every_row_and_their_order() -> None:
    hashes = {given(rows).digest for rows in (FORGET, FORGET[::-1], FORGET[:-1])}
    assert len(hashes) == 3
    assert given(iter(FORGET)).digest == given(FORGET).digest


def test_columns_that_are_no_json_do_not_matter() -> None:
    rows = [{**row, "picture": object()} for row in FORGET]
    assert given(rows).digest == given([{**row, "picture": object()} for row in FORGET]).digest
    assert [row.content for row in read_data(given(rows))[0]] == FORGET


def test_fields_name_the_columns() -> None:
    source = given([{"title": row["question"], "reply": row["answer"]} for row in FORGET])
    rows, _ = read_data(source, {"question": "title", "answer": "reply"})
    assert [row.content for row in rows] == FORGET


@pytest.mark.parametrize(
    "data", [TOKENS, SAMPLES, [{"input_ids": torch.tensor([[5, 6, 7]]), "labels": [[-100, 6, 7]]}]]
)
def test_what_is_tokenised_already(data: Any) -> None:
    rows, digest = read_data(given(data))
    assert encode(rows, tokenizer(), 2) == SAMPLES[: len(rows)]  # as they are, at any length
    assert digest == given(SAMPLES[: len(rows)]).digest


def test_the_parts_of_a_row_stay_together() -> None:
    parts = [Sample((1, 2), (1, 2), share=0.25), Sample((3, 4), (3, 4), share=0.75), Sample((5, 6), (5, 6))]
    rows, _ = read_data(given(parts))
    assert [row.content["samples"] for row in rows] == [tuple(parts[:2]), tuple(parts[2:])]


def test_the_name_stands_for_the_rows(tmp_path: Path) -> None:
    name = str(given(FORGET))
    assert is_given(name) and is_given(Path(name)) and not is_given(tmp_path / "python:1")
    assert data_files(name) == data_files(given(FORGET)) == []
    for use in (read_data, hash_data, lambda path: source_of(path, False, "forget")):
        with pytest.raises(InputError, match=r"^python:\w+: these rows given in Python are not kept; call the Python"):
            use(name)


BAD: dict[str, tuple[Any, str]] = {
    "no rows": ([], "forget data: there are no samples"),
    "a number": (3, "forget data: data is int; it must be a file, or have __iter__"),
    "tokens of two shapes": ([{"input_ids": [1], "labels": [1, 2]}], 'forget data: row 0: "labels" has shape'),
    "half a row": ([Sample((1, 2), (1, 2), share=0.5)], "the shares of the last samples do not add up to a row"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str) -> None:
    data, message = BAD[case]
    with pytest.raises(InputError, match=message):
        given(data)


def test_a_bad_row_is_named() -> None:
    with pytest.raises(InputError, match=r'^forget data, row 1: needs "question" and "answer"'):
        read_data(given([{"text": "a"}, {"txt": "b"}]))
    with pytest.raises(InputError, match="fields is for rows of text"):
        read_data(given(TOKENS), {"text": "body"})
