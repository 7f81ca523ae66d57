"""The list of an importance's rows: what makes two rows the same, and what becomes of the list on disk."""

import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from perta_fast import InputError
from perta_fast.data.samples import IGNORED, Sample
from perta_fast.importance.row_digests import FILE_NAME, RowDigests, row_digest

SAMPLE = Sample((3, 1, 2), (IGNORED, 1, 2))


@pytest.mark.parametrize(
    "other",
    [
        replace(SAMPLE, input_ids=(3, 1, 4)),
        replace(SAMPLE, labels=(IGNORED, IGNORED, 2)),
        replace(SAMPLE, share=0.5),
        Sample((3, 1), (IGNORED, 1)),
        Sample((3, 1, 2, 0), (IGNORED, 1, 2, IGNORED)),
    ],
)
def test_rows_of_another_gradient_differ(other: Sample) -> None:
    assert row_digest([SAMPLE]) != row_digest([other])
    assert row_digest([SAMPLE, other]) != row_digest([SAMPLE])
    assert row_digest([SAMPLE, other]) != row_digest([other, SAMPLE])


def test_what_makes_no_other_gradient_makes_no_other_row() -> None:
    """A row that was cut, and one that ends there."""
    assert row_digest([SAMPLE]) == row_digest([replace(SAMPLE, truncated=True)])


def test_a_digest_stays_what_it_is() -> None:
    """What docs/formats.md says: files of one version are read by the next."""
    content = struct.pack("<Qd6q", 3, 1.0, 3, 1, 2, -100, 1, 2)
    assert row_digest([SAMPLE]) == blake3(content).hexdigest()[:32]


def test_the_turns_of_a_conversation_are_one_row() -> None:
    turns = [replace(SAMPLE, share=0.25), replace(SAMPLE, share=0.75)]
    digests = RowDigests.of([SAMPLE, *turns, SAMPLE])
    assert digests.count == 3
    assert digests.counts == Counter({row_digest([SAMPLE]): 2, row_digest(turns): 1})


ROWS = st.lists(st.integers(0, 5), max_size=12)


def of(numbers: list[int]) -> RowDigests:
    return RowDigests.of([Sample((0, number), (IGNORED, number)) for number in numbers])


@given(ROWS, ROWS)
def test_sums_and_differences(first: list[int], second: list[int]) -> None:
    assert of(first) + of(second) == of(first + second)
    assert (of(first) + of(second)) - of(second) == of(first)
    assert of(first).hash == of(first[::-1]).hash


def written(folder: Path, digests: RowDigests) -> Path:
    (folder / FILE_NAME).write_bytes(digests.content)
    return folder


@given(ROWS)
def test_the_file_is_read_again(tmp_path_factory: pytest.TempPathFactory, numbers: list[int]) -> None:
    digests = of(numbers)
    folder = written(tmp_path_factory.mktemp("rows"), digests)
    lines = (folder / FILE_NAME).read_text().splitlines()
    assert lines == sorted(lines)
    assert len(lines) == len(numbers)
    assert RowDigests.read(folder, digests.hash, len(numbers)) == digests


def test_what_is_not_as_it_was_written_is_refused(tmp_path: Path) -> None:
    digests = of([1, 2])
    with pytest.raises(InputError, match="does not know its rows, as it is of an earlier version"):
        RowDigests.read(tmp_path, "", 2)
    with pytest.raises(InputError, match=rf"{FILE_NAME}: is gone"):
        RowDigests.read(tmp_path, digests.hash, 2)
    written(tmp_path, digests)
    with pytest.raises(InputError, match=rf"{FILE_NAME}: has 2 rows, and the importance 3"):
        RowDigests.read(tmp_path, digests.hash, 3)
    (tmp_path / FILE_NAME).write_bytes(digests.content[:-1])
    with pytest.raises(InputError, match=rf"{FILE_NAME}: is not what was written"):
        RowDigests.read(tmp_path, digests.hash, 2)
