"""By what weights are known again: not by their place, and by bytes of every tensor."""

from pathlib import Path

import pytest
import torch

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.weights_hash import BLOCK_BYTES, BLOCKS, weights_hash
from tests.support.checkpoints import draw, write_checkpoint

LARGE = BLOCKS * BLOCK_BYTES // 4 * 3 + 5  # elements of float32: three times what is read whole
TENSORS = {"a": draw((7, 5), seed=1), "large": draw((LARGE,), seed=2), "none": draw((0,)), "scalar": draw((), seed=3)}


def of(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> str:
    return weights_hash(Checkpoint.open(write_checkpoint(folder, tensors, shards)))


def test_the_same_in_other_shards_and_order(tmp_path: Path) -> None:
    expected = of(tmp_path / "one", TENSORS)
    assert of(tmp_path / "three", TENSORS, shards=3) == expected
    assert of(tmp_path / "other order", dict(reversed(TENSORS.items()))) == expected


@pytest.mark.parametrize(
    ("name", "element"), [("a", 0), ("a", 17), ("a", 34), ("scalar", 0), ("large", 0), ("large", LARGE - 1)]
)
def test_one_value_changes_it(name: str, element: int, tmp_path: Path) -> None:
    changed = {key: tensor.clone() for key, tensor in TENSORS.items()}
    changed[name].reshape(-1)[element] += 1
    assert of(tmp_path / "changed", changed) != of(tmp_path / "as it was", TENSORS)


@pytest.mark.parametrize("change", ["name", "shape", "type", "one less", "a little everywhere"])
def test_other_tensors_change_it(change: str, tmp_path: Path) -> None:
    changed = dict(TENSORS)
    if change == "name":
        changed["b"] = changed.pop("a")
    elif change == "shape":
        changed["a"] = changed["a"].reshape(5, 7)
    elif change == "type":
        changed["none"] = changed["none"].bfloat16()
    elif change == "one less":
        del changed["scalar"]
    else:
        changed["large"] = changed["large"] * (1 + 1e-6)
    assert of(tmp_path / "changed", changed) != of(tmp_path / "as it was", TENSORS)


def test_between_the_blocks_it_looks_away(tmp_path: Path) -> None:
    """As docs/formats.md says: it protects from mistakes, not from intent."""
    changed = TENSORS["large"].clone()
    changed[BLOCK_BYTES // 4] += 1
    assert of(tmp_path / "changed", TENSORS | {"large": changed}) == of(tmp_path / "as it was", TENSORS)
