"""Sweeps and choices that go no further than to the forget loss of base, in memory and streamed."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from perta_fast import InputError, Interrupted, Report, RunError, Sweep, choose, cli, resume, sweep
from perta_fast.files.durable import read_record, write_record
from perta_fast.scoring.live_model import ScoredModel
from perta_fast.streaming.forward import score_walk
from perta_fast.sweeping import streamed, walk_plan
from perta_fast.sweeping.opened import OpenedSweep
from perta_fast.sweeping.walked_model import WalkedModel
from tests.support.models import Job, write_job, write_learnt_job
from tests.sweeping.test_choose import command

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = pytest.mark.parametrize("stream", [True, False])


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return write_learnt_job(tmp_path_factory.mktemp("learnt"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return write_job(tmp_path_factory.mktemp("other"))


def run(job: Job, out: Path, **chosen: Any) -> Report:
    return choose(*job.checkpoints, job.forget, job.retain, out=out, **{"rules": "tv", "progress": False} | chosen)


def measured(job: Job, out: Path, **chosen: Any) -> Sweep:
    asked = {"rule": "tv", "max_retain_rise": 0.05, "up_to_base": True, "progress": False} | chosen
    return sweep(*job.checkpoints, job.forget, job.retain, out=out, **asked)


@BOTH
def test_without_a_bound_it_ends_where_base_is(stream: bool, learnt: Job, tmp_path: Path) -> None:
    report = run(learnt, tmp_path / "out", stream=stream)
    choice = report.setting_choice
    assert choice is not None and choice.base_forget_loss is not None and choice.after.forget_loss is not None
    assert choice.after.forget_loss <= choice.base_forget_loss * 1.00001
    assert (0.93 if stream else 0.99) <= report.lam <= 1.001
    assert (choice.bound, choice.value) == ("max_retain_rise", 0.05)
    said = f"while the forget loss is at most that of base, {choice.base_forget_loss:.4g}, and the retain loss rises by"
    assert said in report.summary() and not any("base" in warning for warning in report.warnings)
    assert Report.load(tmp_path / "out").setting_choice == choice
    assert Sweep.read(tmp_path / "out.sweep" / "sweep.json").forget_limit == choice.base_forget_loss
    further = run(learnt, tmp_path / "further", stream=stream, max_retain_rise=0.05)
    assert further.setting_choice is not None and further.setting_choice.base_forget_loss is None
    assert further.lam > 1.2


def test_the_same_loss_of_base_in_memory_and_streamed(learnt: Job, tmp_path: Path) -> None:
    rows: dict[str, Any] = {"lams": [0.5, 2], "max_length": 40}
    one = measured(learnt, tmp_path / "one", **rows)
    other = measured(learnt, tmp_path / "other", **rows, stream=True)
    assert one.forget_limit == pytest.approx(other.forget_limit, rel=1e-6)
    as_base = sweep(
        *(learnt.base, learnt.base, learnt.tuned, learnt.forget, learnt.retain), rule="tv", **rows, progress=False
    )
    assert one.forget_limit == pytest.approx(as_base.original.forget_loss, rel=1e-6)
    assert one.best is not None and one.best.lam == 0.5


@BOTH
def test_larger_strengths_are_skipped(
    stream: bool, learnt: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory, and in a second walk."""
    monkeypatch.setattr(walk_plan, "pays", lambda *_: True)
    found = measured(learnt, tmp_path / "out", lams=[0.5, 0.75, 1.1, 1.2, 1.3, 1.4], max_retain_rise=5, stream=stream)
    skipped = {1.3} if stream else {1.2, 1.3, 1.4}
    assert {row.lam for row in found.rows if row.skipped} == skipped
    assert found.best is not None and found.best.lam == 0.75


@BOTH
def test_base_knows_no_less(stream: bool, other: Job, tmp_path: Path) -> None:
    found = measured(other, tmp_path / "out", lams=[1], stream=stream)
    assert found.forget_limit is None
    said = [note for note in found.notes if "the model has learnt nothing of the forget data" in note]
    assert len(said) == 1 and said[0].startswith("warning: the forget loss of model is ")


@BOTH
def test_base_is_the_model(stream: bool, other: Job, tmp_path: Path) -> None:
    """To ask for it is a mistake; without a bound, only that on the retain loss is left."""
    job = replace(other, base=other.model)
    refused = f"{other.model}: is both base and model, so its loss is no limit. Give a bound on what is retained, such"
    with pytest.raises(InputError, match=re.escape(refused)):
        measured(job, tmp_path / "out", lams=[1], stream=stream)
    with pytest.raises(InputError, match=re.escape(refused)):
        run(job, tmp_path / "out", lams=[1], stream=stream, up_to_base=True)
    assert list(tmp_path.iterdir()) == []
    link = tmp_path / "link"
    link.symlink_to(other.model)
    with pytest.raises(RunError, match="no setting is better than the model as it is"):
        run(replace(job, base=link), tmp_path / "out", lams=[2**-6], stream=stream)
    found = Sweep.read(tmp_path / "out.sweep" / "sweep.json")
    assert found.settings["up_to_base"] is False and found.settings["max_retain_rise"] == 0.05
    free = measured(other, tmp_path / "free", lams=[1], stream=stream, max_retain_rise=None, up_to_base=None)
    assert free.settings["up_to_base"] is False and free.forget_limit is None


@pytest.mark.parametrize("dry_run", [["--dry-run"], []])
def test_base_does_not_know_all_tokens(
    dry_run: list[str], other: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = write_job(tmp_path / "small", vocab_size=40)
    job = replace(other, base=small.base, tuned=small.tuned)
    how = ["--rule", "tv", "--common-rows", *dry_run, "--out", tmp_path / "out", "--choose", "up-to-base"]
    for stream in [["--stream"]] if dry_run else [["--stream"], []]:
        assert cli.main(command(job, *stream, *how)) == 2
        err = capsys.readouterr().err
        assert f"error: {small.base}: base cannot be scored on the forget data (" in err
        assert "the model knows those below 40" in err
        said = "Give a bound on what is retained, such as --choose max-retain-rise, without --choose up-to-base\n"
        assert err.endswith(f"?). {said}")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@BOTH
def test_base_has_no_configuration(stream: bool, learnt: Job, tmp_path: Path) -> None:
    """Which its files show before a model is loaded."""
    base = Path(shutil.copytree(learnt.base, tmp_path / "base"))
    (base / "config.json").unlink()
    with pytest.raises(InputError, match=r"base cannot be scored on the forget data .* has no config.json"):
        run(replace(learnt, base=base), tmp_path / "out", stream=stream, lams=[1])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@BOTH
def test_base_is_not_finite(stream: bool, learnt: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScoredModel, "loss", lambda *_: math.nan)
    monkeypatch.setattr(WalkedModel, "forget_loss", lambda *_: math.inf)
    with pytest.raises(InputError, match=r"base cannot be scored on the forget data \(its loss is not finite\)\. Give"):
        measured(learnt, tmp_path / "out", lams=[1], stream=stream)
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_a_setting_that_is_base_up_to_rounding(stream: bool, learnt: Job, tmp_path: Path) -> None:
    """The whole of its own task vector leaves theta_0, but for a rounding of each weight."""
    job = replace(learnt, tuned=learnt.model)
    found = measured(job, tmp_path / "out", lams=[0.5, 1, 1.01], max_retain_rise=5, stream=stream)
    assert found.best is not None and found.best.lam == 1
    assert found.best.forget_loss == pytest.approx(found.forget_limit, rel=1e-6)


def test_the_record_has_a_loss(learnt: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of base; another is not believed."""
    monkeypatch.setattr("perta_fast.sweeping.measuring.measure_in_a_walk", _stop)
    with pytest.raises(Interrupted):
        measured(learnt, tmp_path / "out", lams=[1])
    (record,) = tmp_path.glob("*/*/begun.json")
    content = read_record(record, "")
    assert content["base"] > 0
    write_record(record, content | {"base": math.nan})
    with pytest.raises(InputError, match="or its record is damaged"):
        measured(learnt, tmp_path / "out", lams=[1])


@pytest.mark.parametrize("again", ["the same call", "resume"])
@pytest.mark.parametrize("walk", ["base", "settings", "closer"])
def test_a_stopped_streamed_sweep_goes_on(
    walk: str, again: str, learnt: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the last step of any of its walks; none is walked twice."""
    monkeypatch.setattr(walk_plan, "pays", lambda *_: False)
    whole = measured(learnt, tmp_path / "whole", stream=True)
    steps, stop = [0], [True]
    record = score_walk._ScoreWalk.record

    def recorded(walked: Any, *given: Any) -> None:
        record(walked, *given)
        steps[0] += 1
        place = {"base": "alone/base", "settings": "walks/settings-0", "closer": "walks/closer-0"}[walk]
        if stop[0] and place in str(walked._path):
            stop[0] = False
            raise KeyboardInterrupt

    monkeypatch.setattr(score_walk._ScoreWalk, "record", recorded)
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        measured(learnt, tmp_path / "out", stream=True)
    assert not stop[0]
    if again == "resume" and walk != "base":
        found = resume(tmp_path / "out", progress=False)
    else:
        found = measured(learnt, tmp_path / "out", stream=True)
    assert isinstance(found, Sweep) and found.forget_limit == whole.forget_limit
    assert [replace(row, seconds=0.0) for row in found.rows] == [replace(row, seconds=0.0) for row in whole.rows]
    done, steps[0] = steps[0], 0
    measured(learnt, tmp_path / "count", stream=True)
    assert done == steps[0]


@BOTH
def test_the_report_of_the_result_warns_too(
    stream: bool, learnt: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a base that is no limit."""
    monkeypatch.setattr(ScoredModel, "loss", lambda *_: 0.0)
    monkeypatch.setattr(WalkedModel, "forget_loss", lambda *_: 0.0)
    report = run(learnt, tmp_path / "out", stream=stream, lams=[1])
    (said,) = (warning for warning in report.warnings if "base" in warning)
    assert said.startswith("the forget loss of model is ") and "so the bound alone has decided" in said
    assert report.setting_choice is not None and report.setting_choice.base_forget_loss is None


def test_base_is_not_scored_again(learnt: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("perta_fast.sweeping.measuring.measure_in_a_walk", _stop)
        with pytest.raises(Interrupted):
            measured(learnt, tmp_path / "out", lams=[1])
    monkeypatch.setattr(OpenedSweep, "score_base", None)
    assert measured(learnt, tmp_path / "out", lams=[1]).forget_limit is not None


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def test_the_command(learnt: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--stream", "--rule", "tv", "--choose", "up-to-base=0.2"]
    assert cli.main(command(learnt, *how, "--out", tmp_path / "out", "--dry-run")) == 0
    text = capsys.readouterr().out
    for walked in ("base, on the forget data:", "13 settings:", "at most 4 settings closer to the bound:"):
        assert f"{walked}\n" in text
    assert cli.main(command(learnt, *how, "--out", tmp_path / "out")) == 0
    err = capsys.readouterr().err
    assert "then up to 4 settings closer to the bound are scored as well" in err
    choice = Report.load(tmp_path / "out").setting_choice
    assert choice is not None and choice.value == 0.2 and choice.base_forget_loss is not None
    arguments = [*command(learnt)[1:], "--rule", "tv", "--lams", "1", "--max-retain-rise", "0.2", "--up-to-base"]
    capsys.readouterr()
    assert cli.main(["sweep", *arguments]) == 0
    said = f"Chosen by best-forget, up to the forget loss of base, {choice.base_forget_loss:.6g}: tv, "
    assert said in capsys.readouterr().out
    assert cli.main(["sweep", *arguments[:-3], "--up-to-base"]) == 2
    assert "--up-to-base goes with a bound on what is retained; give one of --target-retain-loss" in (
        capsys.readouterr().err
    )


def test_a_dry_run_says_that_a_stopped_sweep_cannot_go_on(
    learnt: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its data has changed."""
    forget = Path(shutil.copy(learnt.forget, tmp_path))
    arguments = command(replace(learnt, forget=forget), "--stream", "--rule", "tv", "--choose", "up-to-base")
    with monkeypatch.context() as patched:
        patched.setattr(streamed, "keep_vectors", _stop)
        assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 130
    assert cli.main([*arguments, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    capsys.readouterr()
    forget.write_text(forget.read_text() * 2)
    for dry_run in (["--dry-run"], []):
        assert cli.main([*arguments, "--out", str(tmp_path / "out"), *dry_run]) == 2
        assert f"{forget}: has changed since the sweep began" in capsys.readouterr().err


@BOTH
def test_a_base_that_has_changed(stream: bool, learnt: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration, where only its loss is used, since an adapter holds the task vector."""
    base = Path(shutil.copytree(learnt.base, tmp_path / "base"))
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(tmp_path / "adapter")
    job = replace(learnt, base=base, tuned=tmp_path / "adapter")
    with monkeypatch.context() as patched:
        patched.setattr(streamed, "keep_vectors", _stop)
        patched.setattr("perta_fast.sweeping.measuring.measure_in_a_walk", _stop)
        with pytest.raises(Interrupted):
            measured(job, tmp_path / "out", lams=[1], stream=stream)
    config = base / "config.json"
    content = config.read_text()
    config.write_text(content.replace("{", '{"rms_norm_eps": 0.01,', 1))
    with pytest.raises(InputError, match=r"base/config\.json: has changed since the sweep began"):
        measured(job, tmp_path / "out", lams=[1], stream=stream)
    config.unlink()
    with pytest.raises(InputError, match=r"base/config\.json: .* since the sweep began"):
        resume(tmp_path / "out", progress=False)


def test_a_bound_is_needed(learnt: Job, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="up_to_base goes with a bound on what is retained"):
        measured(learnt, tmp_path / "out", lams=[1], max_retain_rise=None)
    assert list(tmp_path.iterdir()) == []


def test_nothing_closer_where_all_keep_the_bound(learnt: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "closer", None)
    found = measured(learnt, tmp_path / "out", stream=True, max_retain_rise=1e6, up_to_base=False)
    assert [row.lam for row in found.rows if not row.keeps(found.limits)] == []
