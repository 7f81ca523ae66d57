"""Data that is tokenised already, as data sets, loaders and collators of torch and transformers give it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM

from perta_fast import Importance, InputError, estimate_importance
from perta_fast.data.samples import IGNORED, Sample
from tests.support.models import FORGET, draw_samples, llama, tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = draw_samples(9)
ROWS = [{"input_ids": list(each.input_ids), "labels": list(each.labels)} for each in SAMPLES]


class MapStyle(Dataset[dict[str, Any]]):
    """As a Trainer takes it: no iterator, and no end but its length."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert index < len(self.rows), "read past the end"
        return {"index": index, **self.rows[index]}


def collated(side: str, rows: list[dict[str, Any]] = ROWS) -> DataLoader[Any]:
    """Batches of four, padded by transformers' own collator."""
    padding = tokenizer()
    padding.padding_side = side
    return DataLoader(rows, batch_size=4, collate_fn=DataCollatorForSeq2Seq(padding))  # type: ignore[arg-type]


def importance(model: Any, data: Any, **settings: Any) -> Importance:
    return estimate_importance(model, data, progress=False, **settings)


def assert_same(found: Importance, expected: Importance) -> None:
    """Bit for bit, and the same metadata."""
    assert found.metadata == expected.metadata
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama()


@pytest.fixture(scope="module")
def expected(model: LlamaForCausalLM) -> Importance:
    return importance(model, SAMPLES)


def as_arrays(kind: Any) -> list[dict[str, Any]]:
    return [{key: kind(value) for key, value in row.items()} for row in ROWS]


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        as_arrays(torch.tensor),
        as_arrays(np.array),
        MapStyle(ROWS),
        MapStyle(as_arrays(torch.tensor)),
        [{key: torch.tensor([value]) for key, value in row.items()} for row in ROWS],
        collated("right"),
        collated("left"),
    ],
    ids=["lists", "tensors", "arrays", "data set", "data set of tensors", "batches of one", "right", "left"],
)
def test_the_same_samples_give_the_same_bits(data: Any, model: LlamaForCausalLM, expected: Importance) -> None:
    assert_same(importance(model, data), expected)


def test_an_iterable_is_read_once(model: LlamaForCausalLM, expected: Importance) -> None:
    given = 0

    def batches() -> Iterator[Any]:
        nonlocal given
        for batch in collated("right"):
            given += 1
            yield batch

    assert_same(importance(model, batches()), expected)
    assert given == 3


def test_as_records(model: LlamaForCausalLM) -> None:
    """What the model's tokenizer makes of text; without labels every token has one."""
    texts = [row["answer"] for row in FORGET]
    records = importance(model, [{"text": text} for text in texts], tokenizer=tokenizer())
    assert_same(importance(model, tokenizer()(texts, padding=True, return_tensors="pt")), records)
    assert_same(importance(model, [tokenizer()(text) for text in texts]), records)


def test_a_checkpoint_needs_no_tokenizer(model: LlamaForCausalLM, expected: Importance, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    found = importance(tmp_path, ROWS)
    assert all(torch.equal(found.tensors[name], each) for name, each in expected.tensors.items())
    with pytest.raises(InputError, match="cannot load"):
        importance(tmp_path, [{"text": "words"}])


def test_the_hash_is_of_ids_and_labels(model: LlamaForCausalLM, expected: Importance) -> None:
    content = repr([(each.input_ids, each.labels) for each in SAMPLES])
    assert expected.metadata.data_hash == blake3(content.encode()).hexdigest()
    other = [{**ROWS[0], "labels": [IGNORED, *ROWS[0]["input_ids"][1:]]}, *ROWS[1:]]
    assert other != ROWS
    assert importance(model, other).metadata.data_hash != expected.metadata.data_hash


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"input_ids": [5, 6]}, {"labels": [5, 6]}], 'row 1: has no "input_ids"'),
        ([{"input_ids": [5, 6]}, Sample((5, 6), (5, 6))], 'row 1: has no "input_ids"'),
        ([{"input_ids": [5, 6], "labels": [6]}], 'row 0: "labels" has shape (1,), "input_ids" has (2,)'),
        ([{"input_ids": [[5, 6]], "attention_mask": [1, 1]}], '"attention_mask" has shape (2,)'),
        ([{"input_ids": "text"}], 'row 0: "input_ids" is not an array of numbers'),
        ([{"input_ids": [[5, 6], [7]]}], 'row 0: "input_ids" is not an array of numbers'),
        ([{"input_ids": [None, 5]}], 'row 0: "input_ids" is not an array of numbers'),
        ([{"input_ids": torch.rand(3)}], 'row 0: "input_ids" is torch.float32 of shape (3,)'),
        ([{"input_ids": torch.ones(1, 2, 2, dtype=int)}], "of shape (1, 2, 2)"),
        ([{"input_ids": 5}], "of shape ()"),
        ([{"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}], 'row 0: "attention_mask" must be 1 on one run'),
        ([{"input_ids": [5, 6], "attention_mask": [1, 2]}], 'row 0: "attention_mask" must be 1 on one run'),
        (
            [{"input_ids": [[5, 6], [7, 8], [9, 9]], "attention_mask": [[1, 1], [0, 1], [-1, 1]]}],
            'batch 0, row 2: "attention_mask"',
        ),
        ([{"input_ids": [5, 6], "position_ids": [0, 0]}], 'row 0: has "position_ids"'),
        ([ROWS[0], {"input_ids": [5, 6], "labels": [5, 7]}], "sample 1: needs one label for each token"),
        ([ROWS[0], {"input_ids": [5, 300]}], "sample 1: has tokens from 5 to 300"),
        ([ROWS[0], {"input_ids": [5, 6], "attention_mask": [0, 0]}], "sample 1: has no token"),
        ([{"input_ids": torch.empty(0, 4, dtype=int)}], "there are no samples"),
        ([{"input_ids": []}], 'row 0: "input_ids" is torch.float32'),
        (iter(()), "there are no samples"),
        (3, "data is int; it must be a file"),
    ],
)
def test_bad_rows(rows: Any, message: str, model: LlamaForCausalLM) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        importance(model, rows)
