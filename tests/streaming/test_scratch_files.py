"""Files of hidden states: what is read is what was written, with zeros for padding."""

from pathlib import Path

import pytest
import torch

from perta_fast.errors import InputError
from perta_fast.streaming.micro_batch import MicroBatch
from perta_fast.streaming.scratch_files import ScratchFiles
from tests.support.checkpoints import draw

LENGTHS = ((5, 3, 3), (2, 1))


def micro_batches() -> list[MicroBatch]:
    made = []
    begin = 0
    for lengths in LENGTHS:
        made.append(MicroBatch(torch.zeros((len(lengths), max(lengths)), dtype=torch.int64), lengths, begin))
        begin += sum(lengths)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", [(4,), (3, 2)])
def test_round_trip_without_padding(row: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    scratch = ScratchFiles(tmp_path)
    given = [draw((*batch.input_ids.shape, *row), dtype, seed) for seed, batch in enumerate(micro_batches())]
    for batch, values in zip(micro_batches(), given, strict=True):
        scratch.write("a", batch, values)
    rows = sum(map(sum, LENGTHS))
    assert (tmp_path / "a").stat().st_size == rows * torch.Size(row).numel() * dtype.itemsize
    for batch, values in zip(micro_batches(), given, strict=True):
        found = scratch.read("a", batch)
        for k, length in enumerate(batch.lengths):
            assert torch.equal(found[k, :length], values[k, :length])
            assert not found[k, length:].any()
        for k, alone in enumerate(batch.split()):
            assert torch.equal(scratch.read("a", alone)[0], values[k, : batch.lengths[k]])


def test_names_do_not_mix(tmp_path: Path) -> None:
    scratch = ScratchFiles(tmp_path)
    first, second = draw((3, 5, 4), seed=1), draw((3, 5, 2), torch.bfloat16, seed=2)
    scratch.write("a", micro_batches()[0], first)
    scratch.write("b", micro_batches()[0], second)
    assert torch.equal(scratch.read("a", micro_batches()[0])[0], first[0])
    assert torch.equal(scratch.read("b", micro_batches()[0])[0], second[0])
    scratch.discard("a")
    assert len(list(tmp_path.iterdir())) == 2  # until the step is settled
    scratch.end_step().remove_discarded()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_whole_tensors(tmp_path: Path) -> None:
    scratch = ScratchFiles(tmp_path)
    given = draw((7, 3))
    scratch.put("sum", given)
    assert torch.equal(scratch.take("sum", torch.device("cpu")), given)
    scratch.end_step().remove_discarded()
    assert list(tmp_path.iterdir()) == []


def test_restored(tmp_path: Path) -> None:
    scratch = ScratchFiles(tmp_path)
    given = [draw((*batch.input_ids.shape, 4), torch.bfloat16, seed) for seed, batch in enumerate(micro_batches())]
    for batch, values in zip(micro_batches(), given, strict=True):
        scratch.write("a", batch, values)
    scratch.put("b", given[0])
    ended = scratch.end_step()
    assert {path.name for path in ended.written} == {"a", "b"}
    scratch.write("late", micro_batches()[0], given[0])
    again = ScratchFiles(tmp_path)
    again.restore(ended.files, lambda _: None)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    for batch in micro_batches():
        assert torch.equal(again.read("a", batch), scratch.read("a", batch))
    assert torch.equal(again.take("b", torch.device("cpu")), given[0])
    assert again.end_step().files.keys() == {"a"}


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone"])
def test_damaged_meanwhile(damage: str, tmp_path: Path) -> None:
    scratch = ScratchFiles(tmp_path)
    scratch.put("a", draw((7, 3)))
    files = scratch.end_step().files
    data = bytearray((tmp_path / "a").read_bytes())
    data[5] ^= 1
    (tmp_path / "a").write_bytes(data if damage == "changed" else data[:-4])
    if damage == "gone":
        (tmp_path / "a").unlink()
    with pytest.raises(InputError, match="a: is not what the run wrote"):
        ScratchFiles(tmp_path).restore(files, lambda _: None)
