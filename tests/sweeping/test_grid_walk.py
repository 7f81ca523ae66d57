"""A sweep that fits into the memory gives the same numbers whether its settings are walked together or one by one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from perta_fast import InputError, Interrupted, Sweep, estimate_importance, resume, sweep
from perta_fast.errors import NotStreamable
from perta_fast.runs import estimate
from perta_fast.scoring.live_model import LiveModel
from perta_fast.streaming.forward import score_walk
from perta_fast.sweeping import grid_walk, measuring
from tests.support.models import Job, tokenizer, write_job
from tests.support.processors import have_instructions

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


def test_a_disk_without_room_for_hidden_states(job: Job, measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_walk.Budget, "at", lambda *_: grid_walk.Budget(1))
    run(job, rule="tv")
    assert measured == ["tv 0.5", "tv 1", "tv 4"]


def test_what_a_refused_walk_made_is_removed(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no work that could be resumed."""

    def refuse(*_: Any, folder: Path, **__: Any) -> None:
        (folder / "scratch").mkdir(parents=True)
        raise NotStreamable("its layers are no chain")

    def fail(*_: Any, **__: Any) -> None:
        raise InputError("an input has gone")

    monkeypatch.setattr(grid_walk, "score_versions", refuse)
    monkeypatch.setattr(LiveModel, "measure", fail)
    with pytest.raises(InputError, match=r"^an input has gone$"):
        run(job, rule="tv", out=tmp_path / "out")


def test_scores_are_kept_before_their_walk_is_removed(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(grid_walk, "remove", stop)
        run(job, rule="tv", out=tmp_path / "out")
    monkeypatch.setattr(grid_walk, "score_versions", None)
    found = resume(tmp_path / "out", progress=False)
    assert isinstance(found, Sweep) and [row.lam for row in found.rows] == [0.0, *LAMS]


def test_an_input_that_is_spoilt_is_named(job: Job, tmp_path: Path) -> None:
    """And nothing is left that could be resumed."""
    model = AutoModelForCausalLM.from_pretrained(job.tuned)
    model.model.norm.weight.data[-1] = float("nan")
    model.save_pretrained(tmp_path / "spoilt")
    with pytest.raises(InputError, match=r"tensor model\.norm\.weight has NaN or infinite values in .*spoilt"):
        sweep(
            *(*job.checkpoints[:2], tmp_path / "spoilt", job.forget, job.retain),
            rule="tv",
            lams=LAMS,
            out=tmp_path / "out",
            progress=False,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["spoilt"]


def test_a_model_that_scores_nothing_finite_is_refused_before_the_first_gradient(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "estimate_on", None)
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(job.model)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(broken)
    tokenizer().save_pretrained(broken)
    with pytest.raises(InputError, match="cannot be chosen against: what it scores is not finite"):
        sweep(
            *(broken, *job.checkpoints[1:], job.forget, job.retain),
            rule="fisher",
            lams=LAMS,
            select="closest",
            gold=job.tuned,
            out=tmp_path / "out",
            progress=False,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("place", "earlier"), [((score_walk._ScoreWalk, "_step"), 5), ((estimate, "estimate_on"), 1)])
def test_it_goes_on_in_its_type_on_a_processor_of_another_kind(
    place: tuple[Any, str], earlier: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the walk, or between the two importances."""
    job = write_job(tmp_path / "job", BF16)
    have_instructions(monkeypatch, True)
    whole = run(job, rule="fisher", out=tmp_path / "whole")
    real, calls = getattr(*place), 0

    def stopping(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > earlier:
            raise KeyboardInterrupt
        return real(*given, **named)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(*place, stopping)
        run(job, rule="fisher", out=tmp_path / "out")
    have_instructions(monkeypatch, False)
    found = resume(tmp_path / "out", progress=False)
    assert isinstance(found, Sweep)
    assert rows(found) == rows(whole) and found.settings["dtype"] == "bfloat16"
    assert {side.dtype for side in found.importance["grad"].values()} == {"bfloat16"}


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
