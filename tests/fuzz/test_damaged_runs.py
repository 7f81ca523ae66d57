"""Damage to the files of an unfinished run: ``perta resume`` refuses them or gives the result of the whole run.

In both cases only the run's own files change. ``PERTA_SOAK=1`` as in test_damaged_files.py.
"""

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from perta_fast.errors import RunError
from perta_fast.runs.apply import apply
from perta_fast.subtraction import compute as subtraction
from perta_fast.subtraction import in_place
from tests.fuzz import mutation
from tests.fuzz.test_damaged_files import contents, examples, perta
from tests.support.inputs import write_inputs
from tests.support.patience import patience

pytestmark = pytest.mark.usefixtures("one_thread")

SHARD = "model-00001-of-00002.safetensors"


@dataclass(frozen=True)
class Unfinished:
    """A file of an unfinished run. folder: of the run, in the folder of ``write_unfinished``."""

    folder: str
    file: str
    damage: Callable[[bytes], SearchStrategy[bytes]]


TARGETS = {
    "last segment": Unfinished("in-place", "model/.perta-journal/segment-1", mutation.any_bytes),
    "job in the journal": Unfinished("in-place", "model/.perta-journal/job.json", mutation.any_bytes),
    "job": Unfinished("out", ".model.perta-partial/.perta-run/job.json", mutation.any_bytes),
    "note of a shard": Unfinished("out", f".model.perta-partial/.perta-run/done-{SHARD}.json", mutation.any_bytes),
    "segment before": Unfinished("in-place", "model/.perta-journal/segment-0", mutation.any_bytes),
    "index set aside": Unfinished("in-place", "model/.perta-journal/model.safetensors.index.json", mutation.index),
    "header of a shard": Unfinished("in-place", f"model/{SHARD}", mutation.safetensors_header),
}


def write_unfinished(folder: Path) -> None:
    """Write one run three times: finished, stopped while it works in place, stopped before its last rename."""
    inputs = write_inputs(folder / "inputs", shards=2)
    settings: dict[str, Any] = {"rule": "grad", "lam": 0.5, "threads": 1, "progress": False}
    apply(*inputs.all, **settings, out=folder / "whole")
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, in_place, "new_segment", lambda directory, number: number == 5)
        patch.setattr(subtraction, "CHUNK", 64)
        patch.setattr(in_place, "SEGMENT", 700)
        model = folder / "in-place" / "model"
        shutil.copytree(inputs["model"], model)
        with pytest.raises(RunError, match="perta resume"):
            apply(model, *inputs.all[1:], **settings, in_place=True)
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, Path, "rename", lambda source, target: Path(target).name == "model")
        with pytest.raises(RunError, match="perta resume"):
            apply(*inputs.all, **settings, out=folder / "out" / "model")


def fail_at(patch: pytest.MonkeyPatch, owner: object, name: str, condition: Callable[..., bool]) -> None:
    """Make a function fail as on a full disk if ``condition`` is true of its arguments."""
    function = getattr(owner, name)

    def failing(*arguments: object) -> object:
        if condition(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*arguments)

    patch.setattr(owner, name, failing)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "runs"
    write_unfinished(folder)
    return folder


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.data())
@examples(ordinary=25, soak=1000)
def test_resuming(target: str, runs: Path, data: st.DataObject) -> None:
    run = runs / TARGETS[target].folder
    original = runs.with_name("original")
    shutil.copytree(run, original)
    path = run / TARGETS[target].file
    try:
        path.write_bytes(data.draw(TARGETS[target].damage(path.read_bytes())))
        before = outside(runs, run)
        with patience():
            status, out, err = perta(f"resume --quiet {run / 'model'}")
        assert outside(runs, run) == before
        if err:
            assert (status in (1, 2), out, err[:14]) == (True, "", "perta: error: ")
        else:
            assert status == 0
            for shard in (runs / "whole").glob("*.safetensors"):
                assert (run / "model" / shard.name).read_bytes() == shard.read_bytes()
    finally:
        shutil.rmtree(run)
        original.rename(run)


def outside(runs: Path, run: Path) -> dict[Path, tuple[int, bytes | None]]:
    """Everything that ``run`` must not change."""
    return {path: state for path, state in contents(runs.parent).items() if run not in (path, *path.parents)}
