"""Files of hidden states: what is read is what was written, with zeros for padding."""

from pathlib import Path

import pytest
import torch

from perta_fast.errors import InputError
from perta_fast.streaming.scratch_files import Piece, Spill
from tests.support.checkpoints import draw

LENGTHS = ((5, 3, 3), (2, 1))


def pieces() -> list[Piece]:
    made = []
    begin = 0
    for lengths in LENGTHS:
        made.append(Piece(torch.zeros((len(lengths), max(lengths)), dtype=torch.int64), lengths, begin))
        begin += sum(lengths)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", [(4,), (3, 2)])
def test_round_trip_without_padding(row: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    given = [draw((*piece.input_ids.shape, *row), dtype, seed) for seed, piece in enumerate(pieces())]
    for piece, values in zip(pieces(), given, strict=True):
        spill.write("a", piece, values)
    rows = sum(map(sum, LENGTHS))
    assert (tmp_path / "a").stat().st_size == rows * torch.Size(row).numel() * dtype.itemsize
    for piece, values in zip(pieces(), given, strict=True):
        found = spill.read("a", piece)
        for k, length in enumerate(piece.lengths):
            assert torch.equal(found[k, :length], values[k, :length])
            assert not found[k, length:].any()
        for k, alone in enumerate(piece.apart()):
            assert torch.equal(spill.read("a", alone)[0], values[k, : piece.lengths[k]])


def test_names_do_not_mix(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    first, second = draw((3, 5, 4), seed=1), draw((3, 5, 2), torch.bfloat16, seed=2)
    spill.write("a", pieces()[0], first)
    spill.write("b", pieces()[0], second)
    assert torch.equal(spill.read("a", pieces()[0])[0], first[0])
    assert torch.equal(spill.read("b", pieces()[0])[0], second[0])
    spill.forget("a")
    assert len(list(tmp_path.iterdir())) == 2  # until the step is settled
    spill.settle().clear()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_whole_tensors(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    given = draw((7, 3))
    spill.put("sum", given)
    assert torch.equal(spill.take("sum", torch.device("cpu")), given)
    spill.settle().clear()
    assert list(tmp_path.iterdir()) == []


def test_restored(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    given = [draw((*piece.input_ids.shape, 4), torch.bfloat16, seed) for seed, piece in enumerate(pieces())]
    for piece, values in zip(pieces(), given, strict=True):
        spill.write("a", piece, values)
    spill.put("b", given[0])
    settled = spill.settle()
    assert {path.name for path in settled.fresh} == {"a", "b"}
    spill.write("late", pieces()[0], given[0])
    again = Spill(tmp_path)
    again.restore(settled.files, lambda _: None)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    for piece in pieces():
        assert torch.equal(again.read("a", piece), spill.read("a", piece))
    assert torch.equal(again.take("b", torch.device("cpu")), given[0])
    assert again.settle().files.keys() == {"a"}


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone"])
def test_damaged_meanwhile(damage: str, tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    spill.put("a", draw((7, 3)))
    files = spill.settle().files
    data = bytearray((tmp_path / "a").read_bytes())
    data[5] ^= 1
    (tmp_path / "a").write_bytes(data if damage == "changed" else data[:-4])
    if damage == "gone":
        (tmp_path / "a").unlink()
    with pytest.raises(InputError, match="a: is not what the run wrote"):
        Spill(tmp_path).restore(files, lambda _: None)
