"""A sweep that fits into the memory gives the same numbers whether its settings are walked together or one by one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import Sweep, estimate_importance, resume, sweep
from perta_fast.errors import NotStreamable
from perta_fast.scoring.live_model import LiveModel
from perta_fast.streaming.forward import score_walk
from perta_fast.sweeping import grid_walk, measuring
from tests.support.models import Job, write_job

pytestmark = pytest.mark.usefixtures("one_thread")

F32, BF16 = torch.float32, torch.bfloat16
LAMS = [0.5, 1.0, 4.0]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return write_job(tmp_path_factory.mktemp("job"), F32)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The settings that are measured on the live model."""
    names: list[str] = []
    measure = LiveModel.measure

    def measuring_one(self: LiveModel, rule: Any, *others: Any) -> Any:
        names.append(f"{rule.name} {rule.rescaling.lam:g}")
        return measure(self, rule, *others)

    monkeypatch.setattr(LiveModel, "measure", measuring_one)
    return names


def run(job: Job, **chosen: Any) -> Sweep:
    return sweep(*job.checkpoints, job.forget, job.retain, **{"lams": LAMS, "progress": False} | chosen)


def rows(result: Sweep) -> list[Any]:
    return [replace(row, seconds=0.0) for row in result.rows]


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    def run_live(job: Job, **chosen: Any) -> Sweep:
        with monkeypatch.context() as patch:
            patch.setattr(measuring, "measure_in_a_walk", lambda *_: None)
            return run(job, **chosen)

    return run_live


@pytest.mark.parametrize(
    "chosen",
    [
        {"rule": "tv"},
        {"rule": ["fisher", "empirical-fisher"], "alpha": [1.0, 16.0]},
        {"rule": ["preconditioned", "tv"], "mu": [1.0, 10.0]},
        {"rule": "tv", "metric": "extraction_strength"},
        {"rule": "tv", "metric": "Q_A_Prob", "only": "model.layers.0.*"},
    ],
    ids=str,
)
def test_the_same_numbers(
    chosen: dict[str, Any], job: Job, one_by_one: Callable[..., Sweep], measured: list[str], tmp_path: Path
) -> None:
    live = one_by_one(job, out=tmp_path / "live", **chosen)
    assert len(measured) == len(live.rows) - 1
    measured.clear()
    together = run(job, out=tmp_path / "together", also=[], **chosen)
    assert measured == []
    assert rows(together) == rows(live)
    assert not list(tmp_path.glob("**/hidden-*"))


def test_without_out(job: Job, measured: list[str], tmp_path: Path) -> None:
    """Importances that are given lie on the disk; those that are estimated are in memory, where no walk reads them."""
    for role in ("forget", "retain"):
        estimate_importance(job.base, getattr(job, role), "grad", out=tmp_path / role, progress=False)
    given = run(job, rule="fisher", forget_importance=tmp_path / "forget", retain_importance=tmp_path / "retain")
    assert measured == []
    estimated = run(job, rule="fisher")
    assert len(measured) == len(LAMS)
    assert rows(estimated) == rows(given)


@pytest.mark.parametrize(
    "chosen",
    [
        {"max_retain_rise": 0.5},  # beyond which strengths are skipped
        {"dtype": BF16},  # narrower than what is stored
    ],
    ids=str,
)
def test_measured_one_by_one(chosen: dict[str, Any], job: Job, measured: list[str]) -> None:
    run(job, rule="tv", **chosen)
    assert measured


def test_a_model_that_cannot_be_streamed(job: Job, measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotStreamable("its layers are no chain")

    monkeypatch.setattr(grid_walk, "score_versions", refuse)
    run(job, rule="tv")
    assert measured == ["tv 0.5", "tv 1", "tv 4"]


def test_stopped_and_resumed(job: Job, measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(job, rule="tv", out=tmp_path / "whole")
    steps: list[int] = []
    step = score_walk._ScoreWalk._step

    def stopping(self: Any, part: int, number: int, names: Any) -> None:
        steps.append(part)
        if len(steps) == 5:
            raise KeyboardInterrupt
        step(self, part, number, names)

    monkeypatch.setattr(score_walk._ScoreWalk, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(job, rule="tv", out=tmp_path / "out")
    resumed = resume(tmp_path / "out", progress=False)
    assert isinstance(resumed, Sweep)
    assert rows(resumed) == rows(whole)
    parts = len(steps) - 5
    assert parts == 4 * 4 - 4  # versions, parts of the model; four were recorded
    assert measured == []
