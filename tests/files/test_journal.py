"""The write-ahead journal: valid as a whole or not at all, whatever became of its bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perta_fast.files.journal import SLOTS, START, new_segment, valid_segments

SIZES = (0, 1, 7, 100, 4097)
once = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, number: int, pieces: list[tuple[str, int, bytes]], state: Any = None) -> Path:
    """A sealed segment."""
    position = START
    with new_segment(folder, number) as segment:
        for name, offset, data in pieces:
            segment.put(name, offset, memoryview(data), position)
            position += len(data)
        segment.seal(state)
        return segment.path


def numbers(folder: Path) -> list[int]:
    found = []
    for segment in valid_segments(folder):
        with segment:
            found.append(segment.number)
    return found


def descriptors() -> int:
    place = Path("/proc/self/fd")
    return len(list(place.iterdir())) if place.exists() else 0


def replay(folder: Path, shards: dict[str, Path]) -> None:
    for segment in valid_segments(folder):
        with segment:
            segment.apply(shards)


@given(pieces=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 50), st.binary(max_size=40)), max_size=6))
@once
def test_the_pieces_land_where_they_belong(pieces: list[tuple[str, int, bytes]], tmp_path: Path) -> None:
    shards = {name: tmp_path / name for name in "ab"}
    expected = {name: bytearray(range(100)) for name in "ab"}
    for name, offset, data in pieces:
        expected[name][offset : offset + len(data)] = data
    for path in shards.values():
        path.write_bytes(bytes(range(100)))
    write(tmp_path, 0, pieces, {"done": 3})
    for _ in range(2):  # once more changes nothing
        replay(tmp_path, shards)
        assert {name: path.read_bytes() for name, path in shards.items()} == expected
    for slot in range(1, SLOTS):
        assert not (tmp_path / f"segment-{slot}").exists()


def test_the_state_comes_back(tmp_path: Path) -> None:
    state = {"chunks": 7, "totals": {"0": {"changed": 1, "sum": float("inf")}}}
    write(tmp_path, 4, [("a", 3, b"xyz")], state)
    (segment,) = valid_segments(tmp_path)
    with segment:
        assert (segment.number, segment.state) == (4, state)
        assert [(extent.name, extent.offset, extent.size) for extent in segment.extents] == [("a", 3, 3)]


def test_a_later_segment_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    for number in range(8):
        write(tmp_path, number, [("a", number, bytes(200 - number))])
        assert numbers(tmp_path) == list(range(max(0, number - SLOTS + 1), number + 1))
    with new_segment(tmp_path, 8) as segment:  # begun: what it replaces is gone, the rest stands
        segment.put("a", 0, memoryview(b"half"), START)
    assert numbers(tmp_path) == [6, 7]


@given(data=st.data())
@settings(once, max_examples=300)
def test_a_damaged_segment_is_no_segment(data: st.DataObject, tmp_path: Path) -> None:
    """Any byte changed, or the end cut off."""
    path = write(tmp_path, 2, [("a", 0, b"abcdef"), ("b", 9, b"gh" * 30)], {"chunks": 1})
    content = path.read_bytes()
    gap = range(56, START)  # bytes between the start and the first piece carry nothing
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(content) - 1).filter(lambda k: k not in gap))
        damaged = bytearray(content)
        damaged[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(damaged)
    else:
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert numbers(tmp_path) == []


@given(content=st.binary(max_size=200))
@once
def test_rubbish_is_no_segment(content: bytes, tmp_path: Path) -> None:
    for slot in range(SLOTS):
        (tmp_path / f"segment-{slot}").write_bytes(content)
    assert numbers(tmp_path) == []


def test_a_segment_in_another_ones_place_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 0, [("a", 0, b"x")]).rename(tmp_path / "segment-1")
    assert numbers(tmp_path) == []


def test_only_known_shards_are_written(tmp_path: Path) -> None:
    """A table with a good hash but a name that is no shard's reaches nothing outside."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    write(tmp_path, 0, [("../outside", 0, b"evil")])
    (segment,) = valid_segments(tmp_path)
    with segment, pytest.raises(KeyError):
        segment.apply({"a": tmp_path / "a"})
    assert outside.read_bytes() == b"mine"


def test_descriptors_are_closed(tmp_path: Path) -> None:
    before = descriptors()
    for number in range(5):
        write(tmp_path, number, [("a", 0, json.dumps(number).encode())])
    (tmp_path / "segment-0").write_bytes(b"broken")
    numbers(tmp_path)
    assert descriptors() == before
