"""What removal leaves is what an estimate on the remaining rows gives, in three families and both estimators."""

from pathlib import Path
from typing import Any

import pytest

from perta_fast import Importance, estimate_importance, merge_importances, remove_importances
from perta_fast.rules import ESTIMATORS, Estimator
from tests.families.configs import FAMILIES
from tests.families.matrix import build, write
from tests.support.models import draw_samples

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = draw_samples(14)
FORGET, RETAIN = SAMPLES[:4], SAMPLES[4:]


def assert_close(found: Importance, expected: Importance) -> None:
    """To 1e-5 of the tensor; biases that have no gradient but rounding, to 1e-6 of the largest tensor."""
    norms = {name: float(tensor.norm()) for name, tensor in expected.tensors.items()}
    assert list(found.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        least = 1e-6 * max(norms.values()) if norms[name] < 1e-7 * max(norms.values()) else 0.0
        assert float((found.tensors[name] - tensor).norm()) <= 1e-5 * norms[name] + least, name


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["Qwen3 tied", "GPT-2", "Mixtral"])
def test_removing_and_merging(name: str, estimator: Estimator, stream: bool, tmp_path: Path) -> None:
    folder = write(build(next(family for family in FAMILIES if family.name == name), 3), tmp_path / "model")
    settings: dict[str, Any] = {"batch_size": 4, "stream": stream, "progress": False}
    whole, forget, retain = (
        estimate_importance(folder, samples, estimator, out=tmp_path / role, **settings)
        for role, samples in (("whole", SAMPLES), ("forget", FORGET), ("retain", RETAIN))
    )
    rest = remove_importances(whole, [forget], tmp_path / "rest", progress=False)
    assert_close(rest, retain)
    for field in ("rows_hash", "label_count", "sample_count", "weights_hash"):
        assert getattr(rest.metadata, field) == getattr(retain.metadata, field)
    again = merge_importances([rest, forget], tmp_path / "again", progress=False)
    assert_close(again, whole)
    with pytest.raises(AssertionError):
        assert_close(rest, whole)


def test_the_weights_are_known_by_their_content(tmp_path: Path) -> None:
    """Another place and other shards are the same weights; another model is not."""
    family = FAMILIES[0]
    found = []
    for seed, size in ((3, "40KB"), (3, "5GB"), (4, "40KB")):
        model = build(family, seed)
        place = tmp_path / f"{seed} {size}"
        model.save_pretrained(place, max_shard_size=size)
        metadata = estimate_importance(place, FORGET, progress=False).metadata
        found.append((metadata.weights_hash, metadata.rows_hash))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]
    assert found[0][1] == found[2][1]
