"""Hashes of files whose bytes come in any order are those of whole files."""

import itertools
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from perta_fast import compiled
from perta_fast.errors import RunError
from perta_fast.files.hashing import HashesInPassing, bytes_to_read, hash_file, hash_files
from tests.support.children import run_child

# Around blocks (64), chunks (1024), vectors of chunks, and complete trees.
SIZES = [
    *(0, 1, 63, 64, 65, 1023, 1024, 1025, 2047, 2048, 2049, 3072, 4096, 4097, 7169, 8192, 8193),
    *(16383, 16384, 16385, 17408, 31744, 32768, 65536, 65537, 100_001, 131_072, 262_143, 262_145),
]


@pytest.fixture(params=compiled.kernels().build_info()["instruction_sets"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    compiled.kernels().select_instruction_set(request.param)
    yield request.param
    compiled.kernels().select_instruction_set("best")


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def digest_in_order(data: bytes, ranges: list[tuple[int, int]]) -> str:
    passing = HashesInPassing({Path("file"): len(data)})
    for begin, end in ranges:
        passing.add(Path("file"), begin, memoryview(data)[begin:end])
    assert not list(passing.rest(Path("file")))
    return passing.digest(Path("file"))


@pytest.mark.parametrize("size", SIZES)
def test_every_order_gives_the_same_hash(size: int, instruction_set: str) -> None:
    data, draw = content(size), random.Random(size)
    for pieces in (1, 2, 3, 10, 40):
        cuts = sorted([0, size, *(draw.randrange(size + 1) for _ in range(pieces - 1))])
        ranges = list(itertools.pairwise(cuts))
        draw.shuffle(ranges)
        assert digest_in_order(data, ranges) == blake3(data).hexdigest()


@given(st.integers(0, 70_000), st.lists(st.tuples(st.integers(0, 70_000), st.integers(0, 70_000)), max_size=8))
def test_bytes_that_come_again_are_passed_over(size: int, pairs: list[tuple[int, int]]) -> None:
    data, path = content(size), Path("file")
    passing, missing = HashesInPassing({path: size}), set(range(size))
    for pair in pairs:
        begin, end = sorted(min(bound, size) for bound in pair)
        passing.add(path, begin, memoryview(data)[begin:end])
        missing -= set(range(begin, end))
        rest = {k for piece in passing.rest(path) for k in range(piece.begin, piece.begin + piece.size)}
        assert rest == missing
    passing.add(path, 0, memoryview(data))
    assert passing.digest(path) == blake3(data).hexdigest()


def test_many_threads_may_add_to_one_file(instruction_set: str) -> None:
    data, path = content(3_000_001), Path("file")
    for seed in range(5):
        cuts = sorted([0, len(data), *(random.Random(seed).randrange(len(data)) for _ in range(200))])
        ranges = list(itertools.pairwise(cuts))
        random.Random(seed).shuffle(ranges)
        passing = HashesInPassing({path: len(data)})
        with ThreadPoolExecutor(4) as pool:
            added = [pool.submit(passing.add, path, begin, memoryview(data)[begin:end]) for begin, end in ranges * 2]
        assert [future.result() for future in added] == [None] * len(added)
        assert passing.digest(path) == blake3(data).hexdigest()


def test_only_the_rest_of_a_file_is_read(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(content(50_000))
    other.write_bytes(content(3000))
    passing = HashesInPassing({path: 50_000})
    passing.add(path, 100, memoryview(content(50_000))[100:40_000])
    passing.add(other, 0, memoryview(b"no file of these"))
    assert [bytes_to_read(each, passing) for each in (path, other)] == [10_100, 3000]
    read: list[int] = []
    hashes = hash_files([path, other, path], 2, read.append, passing=passing)
    assert hashes == {path: hash_file(path), other: hash_file(other)}
    assert sum(read) == 13_100
    assert bytes_to_read(path, passing) == 0


def test_the_hash_is_of_what_was_added_and_not_of_what_came_later(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(5000))
    passing = HashesInPassing({path: 5000})
    passing.add(path, 0, memoryview(content(5000)))
    path.write_bytes(bytes(5000))
    assert hash_files([path], 1, passing=passing) == {path: blake3(content(5000)).hexdigest()}


@pytest.mark.parametrize("size", [4999, 5001])
def test_a_file_that_changes_its_size_is_an_error(size: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(5000))
    passing = HashesInPassing({path: 5000})
    passing.add(path, 0, memoryview(content(5000)))
    path.write_bytes(bytes(size))
    with pytest.raises(RunError, match="file: has changed its size during the run"):
        hash_files([path], 1, passing=passing)


def test_a_file_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(4000))
    with pytest.raises(RunError, match="file: ends inside what is only hashed"):
        hash_files([path], 1, passing=HashesInPassing({path: 5000}))


@pytest.mark.parametrize("size", [0, 1, 5000, (8 << 20) - 1, 8 << 20, (8 << 20) + 1])
def test_a_whole_file(size: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(size))
    read: list[int] = []
    assert hash_file(path, read.append) == blake3(content(size)).hexdigest()
    assert sum(read) == size


def test_what_is_added_to_a_file_while_it_is_read_is_hashed_too(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(5000))

    def append(count: int) -> None:
        if path.stat().st_size == 5000:
            with path.open("ab") as file:
                file.write(content(20_000))

    assert hash_file(path, append) == blake3(content(5000) + content(20_000)).hexdigest()


def test_no_hash_before_all_bytes_are_there() -> None:
    unfinished = compiled.kernels().FileHash(3000)
    assert unfinished.missing() == [(0, 3000)]
    with pytest.raises(ValueError, match="missing"):
        unfinished.digest()


def test_the_recipe_of_the_documentation_gives_the_same_hash(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(70_000))
    formats = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    command = next(line for line in formats.splitlines() if "blake3.blake3()" in line).split('"')[1]
    done = run_child([sys.executable, "-c", command, str(path)])
    assert done.stdout.strip() == hash_file(path)
