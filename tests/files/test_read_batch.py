"""Reads of several files in one call: what arrives, what is hashed, and which error names which file."""

import os
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from perta_fast import compiled
from perta_fast.arrays import ByteArray
from perta_fast.errors import RunError
from perta_fast.files.hashing import NONE_IN_PASSING, HashesInPassing
from perta_fast.files.read_batch import ReadBatch
from perta_fast.files.reading import PositionReader
from perta_fast.rules import Rescaling

CONTENT = {"a": bytes(range(256)) * 40, "b": b"another file" * 1000}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    for name, content in CONTENT.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in CONTENT}


def array(size: int) -> ByteArray:
    return np.zeros(size, np.uint8)


@pytest.mark.parametrize("drop_cache", [False, True])
@pytest.mark.parametrize("soon", [(0, 0), (100, 50), (1 << 40, 1 << 30)], ids=["nothing", "inside", "far outside"])
def test_bytes_and_hashes(files: dict[str, Path], drop_cache: bool, soon: tuple[int, int]) -> None:
    hashes = HashesInPassing({files["a"]: len(CONTENT["a"])})  # the other file is passed over
    batch = ReadBatch(hashes, drop_cache)
    readers = {name: PositionReader(path) for name, path in files.items()}
    places = [("b", 7, 5000), ("a", 3000, len(CONTENT["a"]) - 3000), ("a", 0, 3000), ("b", 0, 0)]
    targets = [array(size) for _, _, size in places]
    for (name, begin, _), target in zip(places, targets, strict=True):
        batch.add(readers[name], begin, target, "it", soon)
    assert not any(target.any() for target in targets)
    batch.run()
    batch.run()  # nothing is noted any more
    for (name, begin, size), target in zip(places, targets, strict=True):
        assert target.tobytes() == CONTENT[name][begin : begin + size]
    assert hashes.digest(files["a"]) == blake3(CONTENT["a"]).hexdigest()
    for reader in readers.values():
        reader.close()


def test_one_that_is_cut_short(files: dict[str, Path]) -> None:
    batch, readers = ReadBatch(NONE_IN_PASSING), [PositionReader(path) for path in files.values()]
    os.truncate(files["b"], 10)
    batch.add(readers[0], 0, array(5), "tensor one")
    batch.add(readers[1], 5, array(6), "tensor two")
    with pytest.raises(RunError, match="b: ends inside tensor two: it was cut short during the run"):
        batch.run()
    batch.run()  # what failed is not tried again
    for reader in readers:
        reader.close()


def test_one_that_is_gone(files: dict[str, Path]) -> None:
    batch, target = ReadBatch(NONE_IN_PASSING), array(5)
    files["b"].unlink()
    batch.add(PositionReader(files["a"]), 0, target, "tensor one")
    batch.add(PositionReader(files["b"]), 0, array(5), "tensor two")
    with pytest.raises(RunError, match="b: tensor two cannot be read: No such file or directory"):
        batch.run()


def test_one_that_the_system_cannot_read(files: dict[str, Path]) -> None:
    class OfADirectory(PositionReader):
        def descriptor(self, what: str) -> int:
            return os.open(self.path.parent, os.O_RDONLY)

    batch = ReadBatch(NONE_IN_PASSING)
    batch.add(OfADirectory(files["a"]), 0, array(5), "tensor one")
    with pytest.raises(RunError, match="a: tensor one cannot be read: Is a directory"):
        batch.run()


def test_nothing_is_computed_from_what_was_not_read(files: dict[str, Path]) -> None:
    theta, other, out = (np.full(4, value, np.float32) for value in (1, 2, 3))
    operands = [int(values.ctypes.data) for values in (out, theta, other, other)] + [0, 0, (0,) * 5, 4]
    batch = ReadBatch(NONE_IN_PASSING)
    reader = PositionReader(files["a"])
    batch.add(reader, 1 << 20, theta.view(np.uint8), "theta")
    with pytest.raises(RunError, match="ends inside theta"):
        batch.run_in(
            lambda reads: compiled.kernels().rescaled_subtract(*operands, Rescaling(1.0), 1, False, None, reads)
        )
    reader.close()
    assert out.tolist() == [3] * 4
