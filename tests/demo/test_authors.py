"""The made-up authors: whose facts are whose, what is asked in which words, and that the files can be read."""

import json
from itertools import combinations
from pathlib import Path

import pytest

from perta_fast.data.rows import load_rows
from perta_fast.demo.authors import ATTRIBUTES, Row, make_authors, make_splits, questions
from perta_fast.demo.files import Files

SIZES = {"forget": 5, "retain": 8, "others": 12}


def questions_of(rows: list[Row]) -> set[str]:
    return {row["question"] for row in rows}


def test_no_two_authors_share_a_name_or_a_first_book() -> None:
    authors = make_authors(400, seed=3)
    assert len({author.name for author in authors}) == 400
    assert len({author.facts["first book"] for author in authors}) == 400


def test_values_come_from_the_word_lists_and_are_shared_between_authors() -> None:
    authors = make_authors(100, seed=0)
    for key, attribute in ATTRIBUTES.items():
        values = [author.facts[key] for author in authors]
        assert set(values) <= set(attribute.values)
        assert attribute.unique == (len(set(values)) == len(values))


@pytest.mark.parametrize("key", ATTRIBUTES)
def test_an_attribute_has_different_phrasings_each_with_the_name(key: str) -> None:
    attribute = ATTRIBUTES[key]
    assert len(set(attribute.questions)) == 3
    assert all(question.count("{name}") == 1 for question in attribute.questions)
    assert len(set(attribute.values)) == len(attribute.values)


def test_no_phrasing_serves_two_attributes() -> None:
    asked = [question for attribute in ATTRIBUTES.values() for question in attribute.questions]
    assert len(set(asked)) == len(asked)


def test_a_question_names_its_author_and_its_answer_the_fact() -> None:
    authors = make_authors(4, seed=1)
    expected = [(author, key) for author in authors for key in ATTRIBUTES for _ in range(2)]
    for row, (author, key) in zip(questions(authors, (0, 2)), expected, strict=True):
        assert author.name in row["question"]
        assert author.name in row["answer"]
        assert author.facts[key] in row["answer"]


def test_splits_have_their_sizes() -> None:
    splits = make_splits(**SIZES, seed=0)
    facts = len(ATTRIBUTES)
    assert {name: len(rows) for name, rows in splits.items()} == {
        "forget": 5 * facts * 2,
        "retain": 8 * facts * 2,
        "forget_rephrased": 5 * facts,
        "retain_rephrased": 8 * facts,
        "others": 12 * facts * 3,
    }


def test_no_question_is_in_two_splits() -> None:
    splits = make_splits(**SIZES, seed=0)
    for one, other in combinations(splits.values(), 2):
        assert not questions_of(one) & questions_of(other)


def test_no_fact_is_in_two_kinds_of_author() -> None:
    # An answer holds name and value, so equal answers are equal facts.
    splits = make_splits(**SIZES, seed=0)
    answers = {name: {row["answer"] for row in rows} for name, rows in splits.items()}
    for one, other in combinations(SIZES, 2):
        assert not answers[one] & answers[other]


@pytest.mark.parametrize("split", ["forget", "retain"])
def test_rephrased_questions_ask_for_the_same_facts(split: str) -> None:
    splits = make_splits(**SIZES, seed=0)
    answers = [{row["answer"] for row in splits[name]} for name in (split, f"{split}_rephrased")]
    assert answers[0] == answers[1]


def test_the_seed_decides() -> None:
    assert make_splits(**SIZES, seed=7) == make_splits(**SIZES, seed=7)
    assert make_splits(**SIZES, seed=7) != make_splits(**SIZES, seed=8)


def test_the_files_load_as_data(tmp_path: Path) -> None:
    splits = make_splits(**SIZES, seed=0)
    files = Files(tmp_path)
    files.write_questions(splits)
    for split, rows in splits.items():
        path = files.questions(split)
        assert [record.content for record in load_rows(path)] == rows
        assert [json.loads(line) for line in path.read_text().splitlines()] == rows
