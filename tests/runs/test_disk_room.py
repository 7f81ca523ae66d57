"""The disks are looked at before the long work, and what a killed command left there is not in the way."""

from pathlib import Path
from typing import Any

import pytest

import perta_fast as pf
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.errors import RunError
from perta_fast.files.disk_space import FREE_MARGIN
from perta_fast.files.new_directory import importance_path, partial_path
from perta_fast.runs import estimate
from perta_fast.runs.strength import StrengthSearch
from tests.support.disks import with_free
from tests.support.models import Job

# By way: arguments; bytes of a parameter that lie beside the result for a while, and that are kept.
WAYS: dict[str, tuple[dict[str, Any], int, int]] = {
    "rule tv": ({"rule": "tv"}, 0, 0),
    "nothing kept": ({"rule": "fisher"}, 8, 0),
    "pair": ({"rule": "fisher", "save_importance": "kept"}, 0, 8),
    "narrow pair": ({"rule": "fisher", "save_importance": "kept", "importance_dtype": "bfloat16"}, 0, 4),
    "ratio": ({"rule": "fisher", "save_importance": "kept", "save_as": "ratio"}, 8, 2),
    "preconditioned": ({}, 4, 0),
    "preconditioned and kept": ({"save_tuned": "kept"}, 0, 4),
}


class Begun(Exception):
    """The long work would begin."""


@pytest.fixture(autouse=True)
def begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_: object, **__: object) -> None:
        raise Begun

    monkeypatch.setattr(StrengthSearch, "begin", begin)
    monkeypatch.setattr(estimate, "accumulate", begin)


def run(job: Job, **settings: Any) -> None:
    pf.unlearn(*job.checkpoints, job.forget, job.retain, progress=False, check=False, **settings)


def sizes(job: Job, way: str, folder: Path) -> tuple[dict[str, Any], int, int, int]:
    """The arguments of a way, and bytes of the result, beside it and kept."""
    settings, beside, kept = WAYS[way]
    settings = {key: folder / "kept/it" if value == "kept" else value for key, value in settings.items()}
    checkpoint = Checkpoint.open(job.model)
    count = sum(entry.count for entry in checkpoint.tensors.values())
    return settings, checkpoint.size + FREE_MARGIN, beside * count, kept * count


@pytest.mark.parametrize("way", WAYS)
def test_the_disk_must_hold_all_that_is_written(
    way: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, result, beside, kept = sizes(job, way, tmp_path)
    slack = 4096  # of headers, which ``preconditioned`` does not count
    with_free(result + beside + kept + slack, monkeypatch)
    with pytest.raises(Begun):
        run(job, out=tmp_path / "out", **settings)
    with_free(result + beside + kept - slack, monkeypatch)
    with pytest.raises(RunError, match=r"of disk space, .*; nothing was written"):
        run(job, out=tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_importances_cover_what_an_adapter_leaves_alone(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    pf.tune(job.base, job.forget, adapter, rank=2, epochs=1, progress=False)
    settings, result, _, kept = sizes(job, "pair", tmp_path)

    def start() -> None:
        pf.unlearn(
            *(job.model, job.base, adapter, job.forget, job.retain), progress=False, out=tmp_path / "out", **settings
        )

    with_free(result + kept + 4096, monkeypatch)
    with pytest.raises(Begun):
        start()
    with_free(result + kept - 4096, monkeypatch)
    with pytest.raises(RunError, match=r"of disk space, .*; nothing was written"):
        start()


@pytest.mark.parametrize("way", ["pair", "ratio", "preconditioned and kept"])
def test_what_is_kept_may_lie_on_another_disk(
    way: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, result, beside, kept = sizes(job, way, tmp_path)
    with_free(result + beside + 4096, monkeypatch, {tmp_path / "kept": kept + 4096})
    with pytest.raises(Begun):
        run(job, out=tmp_path / "out", **settings)
    with_free(result + beside + 4096, monkeypatch, {tmp_path / "kept": kept - 4096})
    with pytest.raises(RunError, match="kept/it: needs"):
        run(job, out=tmp_path / "out", **settings)


def test_in_place_the_result_takes_no_room(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, beside, _ = sizes(job, "nothing kept", tmp_path)
    with_free(beside, monkeypatch)
    with pytest.raises(Begun):
        run(job, in_place=True, rule="fisher")
    with_free(beside - 1, monkeypatch)
    with pytest.raises(RunError, match="needs 0"):
        run(job, in_place=True, rule="fisher")


@pytest.mark.parametrize("way", ["rule tv", "nothing kept", "preconditioned", "pair"])
def test_what_a_killed_run_left_is_not_in_the_way(
    way: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, result, beside, kept = sizes(job, way, tmp_path)
    out = tmp_path / "out"
    with_free(4096, monkeypatch)
    sizes_of_leftovers = {out: result, importance_path(out): beside, tmp_path / "kept" / "it": kept}
    for final, size in sizes_of_leftovers.items():
        if size:
            partial_path(final).mkdir(parents=True)
            (partial_path(final) / "model.safetensors").write_bytes(bytes(size))
    with pytest.raises(Begun):
        run(job, out=out, **settings)


def test_an_importance_is_refused_before_the_first_gradient(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4 * sum(entry.count for entry in Checkpoint.open(job.model).tensors.values())
    with_free(size, monkeypatch)
    with pytest.raises(Begun):
        pf.estimate_importance(job.model, job.forget, out=tmp_path / "out", progress=False)
    with_free(size - 1, monkeypatch)
    with pytest.raises(RunError, match="out: needs"):
        pf.estimate_importance(job.model, job.forget, out=tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())
