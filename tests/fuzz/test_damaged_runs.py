"""Damage to what an unfinished run keeps: ``perta resume`` refuses it or makes what the run would have made.

Either way nothing changes but the run's own files. ``PERTA_SOAK=1`` as in test_damaged_files.py.
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
from tests.fuzz.patience import patience
from tests.fuzz.test_damaged_files import contents, examples, perta
from tests.support.inputs import write_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

SHARD = "model-00001-of-00002.safetensors"


@dataclass(frozen=True)
class Unfinished:
    """A file of the unfinished run in ``folder``, which is below that of ``write_unfinished``."""

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
    """One run three times: whole, stopped in place, and stopped before its new directory is put in place."""
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
    """Make a function fail, as on a full disk, where ``condition`` holds for its arguments."""
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
    kept = runs / TARGETS[target].folder
    original = runs.with_name("original")
    shutil.copytree(kept, original)
    path = kept / TARGETS[target].file
    try:
        path.write_bytes(data.draw(TARGETS[target].damage(path.read_bytes())))
        before = elsewhere(runs, kept)
        with patience():
            status, out, err = perta(f"resume --quiet {kept / 'model'}")
        assert elsewhere(runs, kept) == before
        if err:
            assert (status in (1, 2), out, err[:14]) == (True, "", "perta: error: ")
        else:
            assert status == 0
            for shard in (runs / "whole").glob("*.safetensors"):
                assert (kept / "model" / shard.name).read_bytes() == shard.read_bytes()
    finally:
        shutil.rmtree(kept)
        original.rename(kept)


def elsewhere(runs: Path, kept: Path) -> dict[Path, tuple[int, bytes | None]]:
    """All that the run in ``kept`` must leave alone."""
    return {path: found for path, found in contents(runs.parent).items() if kept not in (path, *path.parents)}
