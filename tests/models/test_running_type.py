"""A model runs in float32 where the processor has no instructions for its own type."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from perta_fast import estimate_importance
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.models import loading, running_type
from perta_fast.models.loading import load_subject
from perta_fast.models.running_type import first_type
from perta_fast.streaming.model.skeleton import Skeleton
from tests.support.checkpoints import read_checkpoint
from tests.support.models import Job
from tests.support.processors import have_instructions

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def type_on(device: torch.device, own: torch.dtype) -> torch.dtype:
    return running_type.running_type(own, device)


def without_instructions(dtype: torch.dtype, device: torch.device) -> bool:
    """In place of ``_is_multiplied_fast``."""
    return dtype == F32


@pytest.fixture(params=[True, False], ids=["has instructions", "has none"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether torch says that the processor multiplies bfloat16 and float16."""
    have_instructions(monkeypatch, request.param)
    yield request.param


@pytest.mark.parametrize("own", [BF16, F16, F32])
def test_float32_without_instructions(instructions: bool, own: torch.dtype) -> None:
    assert type_on(CPU, own) == (own if instructions else F32)
    assert type_on(CUDA, own) == own


@pytest.mark.parametrize("own", [BF16, F16])
def test_torch_without_onednn_has_no_such_products(monkeypatch: pytest.MonkeyPatch, own: torch.dtype) -> None:
    monkeypatch.setattr(running_type, "_ASKED_BY", {BF16: "_no_such_operation", F16: "_no_such_operation"})
    assert type_on(CPU, own) == F32


def test_whole_and_streamed_models_take_the_same(instructions: bool, job: Job) -> None:
    taken = BF16 if instructions else F32
    assert load_subject(job.base, "cpu", None).module.dtype == taken
    assert Skeleton.open(job.base, CPU, None).model.dtype == taken


@pytest.mark.parametrize("asked", [BF16, F16, F32])
def test_what_is_asked_for_is_taken(instructions: bool, job: Job, asked: torch.dtype) -> None:
    assert load_subject(job.base, "cpu", asked).module.dtype == asked
    assert Skeleton.open(job.base, CPU, asked).model.dtype == asked


def test_a_configuration_that_names_no_type(instructions: bool, job: Job, tmp_path: Path) -> None:
    shutil.copytree(job.base, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if not key.endswith("dtype")}))
    assert first_type(Checkpoint.open(path.parent)) == BF16
    taken = BF16 if instructions else F32
    assert load_subject(path.parent, "cpu", None).module.dtype == taken
    assert Skeleton.open(path.parent, CPU, None).model.dtype == taken


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_an_importance_is_that_of_float32(
    monkeypatch: pytest.MonkeyPatch, job: Job, tmp_path: Path, stream: bool
) -> None:
    monkeypatch.setattr(running_type, "_is_multiplied_fast", without_instructions)
    found = [
        estimate_importance(job.base, job.forget, stream=stream, device="cpu", dtype=dtype, out=tmp_path / str(dtype))
        for dtype in (None, F32)
    ]
    assert [importance.metadata.dtype for importance in found] == ["float32"] * 2
    taken, asked = (read_checkpoint(tmp_path / str(dtype)) for dtype in (None, F32))
    assert all(torch.equal(taken[name], asked[name]) for name in asked)


@pytest.mark.parametrize(("spare", "warned"), [(None, 0), (0, 0), (-1, 1)], ids=["unknown", "enough", "too little"])
def test_a_warning_where_float32_takes_more_than_is_free(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, job: Job, spare: int | None, warned: int
) -> None:
    """The type does not follow from what happens to be free: all models of one run have the same."""
    monkeypatch.setattr(running_type, "_is_multiplied_fast", without_instructions)
    needed = 4 * sum(entry.count for entry in Checkpoint.open(job.base).tensors.values())
    monkeypatch.setattr(loading, "available_bytes", lambda: None if spare is None else needed + spare)
    with caplog.at_level(logging.WARNING, "perta_fast"):
        assert load_subject(job.base, "cpu", None).module.dtype == F32
    told = [message for message in caplog.messages if "stream it, or run it in bfloat16" in message]
    assert len(told) == warned
