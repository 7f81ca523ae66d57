"""``unlearn`` by its default rule: what ``precondition`` and rule tv give, bit for bit, and nothing left behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import perta_fast as pf
from perta_fast import cli
from perta_fast.records.report import Report
from perta_fast.reporting import figures
from tests.distributed.launch import perta_on_ranks
from tests.support.checkpoints import fingerprint
from tests.support.models import CHAT_TEMPLATE, Job, tokenizer, write_job

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return write_job(tmp_path / "job", torch.float32)


def run(job: Job, out: Path | None, **settings: Any) -> Report:
    data = {"forget": job.forget, "retain": job.retain, "out": out, "progress": False}
    return pf.unlearn(*job.checkpoints, **data | settings)


def in_two_steps(job: Job, folder: Path, seen_at: Path, **settings: Any) -> dict[str, bytes]:
    """The shards that the two commands write."""
    pf.precondition(job.base, job.tuned, job.retain, folder / "vector", model=seen_at, progress=False, **settings)
    pf.apply(job.model, job.base, folder / "vector", rule="tv", lam=3.0, out=folder / "two", progress=False)
    return shards(folder / "two")


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("at", [None, "base"])
def test_it_is_what_the_two_commands_give(at: Any, job: Job, tmp_path: Path) -> None:
    before = fingerprint(*job.checkpoints)
    report = run(job, tmp_path / "out", lam=3.0, at=at, mu=4.0, check=False)
    seen_at = job.base if at else job.model
    assert shards(tmp_path / "out") == in_two_steps(job, tmp_path, seen_at, mu=4.0)
    assert fingerprint(*job.checkpoints) == before
    assert names(tmp_path) == ["job", "out", "two", "vector"]
    made = report.preconditioned
    assert made is not None
    assert (made.tuned, made.seen_at) == (str(job.tuned), str(seen_at))
    assert (made.samples, made.mu, made.linear_maps) == (7, 4.0, 14)
    assert 0 < made.kept < 1
    assert (report.rule, report.recipe["rule"]) == ("tv", "preconditioned")
    assert report.recipe["tuned"] == str(job.tuned)
    assert report.inputs["tuned"]["kept"] is False
    assert report.inputs["tuned_given"]["files"].keys() == {path.name for path in job.tuned.glob("*.safetensors*")}
    assert f"preconditioned: {made.kept:.1%} of the norm" in report.summary()
    card = (tmp_path / "out/README.md").read_text()
    assert "a preconditioned task vector was subtracted from this model's weights (SAGE, arXiv 2606.18309)" in card
    verified = pf.verify(tmp_path / "out", progress=False)
    assert not verified.problems
    assert "tensors, because the run did not keep the preconditioned θ_f" in verified.unchecked


def test_a_changed_theta_f_is_seen(job: Job, tmp_path: Path) -> None:
    run(job, tmp_path / "out", lam=3.0, check=False)
    shard = next(job.tuned.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4] + b"\1\2\3\4")
    assert any(str(shard) in problem for problem in pf.verify(tmp_path / "out", progress=False).problems)


def test_what_is_saved_can_be_verified(job: Job, tmp_path: Path) -> None:
    report = run(job, tmp_path / "out", lam=3.0, save_tuned=tmp_path / "kept", check=False)
    assert shards(tmp_path / "out") == in_two_steps(job, tmp_path, job.model)
    assert shards(tmp_path / "kept") == shards(tmp_path / "vector")
    assert report.inputs["tuned"]["path"] == str(tmp_path / "kept")
    verified = pf.verify(tmp_path / "out", full=True, progress=False)
    assert not verified.problems
    assert verified.recomputed == len(report.tensors)
    assert verified.unchecked == [f"how θ_f was preconditioned; it was taken as it lies in {tmp_path / 'kept'}"]


def test_all_call_the_rule_what_it_was_asked_for_as(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(job, tmp_path / "out", lam=3.0, mu=4.0, check=False)
    assert report.rule_words() == "preconditioned, mu 4" and "rule preconditioned, mu 4, lambda 3" in report.summary()
    assert "rule preconditioned, mu 4, λ = 3; " in (tmp_path / "out/README.md").read_text()
    monkeypatch.setattr(figures, "_png", lambda figure: b"")
    pf.write_report(tmp_path / "out", tmp_path / "page.html", verify=False, progress=False)
    page = (tmp_path / "page.html").read_text()
    assert "(rule preconditioned, mu 4)" in page and "<tr><td>rule</td><td>preconditioned, mu 4</td></tr>" in page
    claim = pf.verify(tmp_path / "out", progress=False).claim
    assert claim.endswith("holds what rule preconditioned, mu 4 and lambda 3 give on the inputs named")


def test_an_adapter(job: Job, tmp_path: Path) -> None:
    pf.tune(job.base, job.forget, tmp_path / "job/adapter", rank=3, epochs=2, lr=1e-2, progress=False)
    adapted = Job(job.model, job.base, tmp_path / "job/adapter", job.forget, job.retain)
    report = run(adapted, tmp_path / "out", lam=3.0)
    assert shards(tmp_path / "out") == in_two_steps(adapted, tmp_path, job.model)
    assert report.check is not None
    assert report.check.is_whole
    given = report.inputs["tuned_given"]["files"]
    assert given.keys() == {"adapter_model.safetensors", "adapter_config.json"}


def test_the_search_finds_what_can_be_given(job: Job, tmp_path: Path) -> None:
    found = run(job, tmp_path / "found", max_retain_rise=0.02)
    assert found.choice is not None
    given = run(job, tmp_path / "given", lam=found.lam)
    assert shards(tmp_path / "found") == shards(tmp_path / "given")
    assert found.recipe.get("lam") == found.lam
    assert found.phases["choice of lambda"]["seconds"] > 0
    assert found.choice.after.retain_loss <= found.choice.before.retain_loss + 0.02
    assert given.preconditioned == found.preconditioned


def test_in_place(job: Job, tmp_path: Path) -> None:
    run(job, tmp_path / "out", lam=3.0)
    expected = shards(tmp_path / "out")
    run(job, None, in_place=True, lam=3.0)
    assert shards(job.model) == expected
    assert not [name for name in names(job.model.parent) if name.startswith(".")]
    assert not pf.verify(job.model, progress=False).problems


@pytest.mark.parametrize("in_place", [False, True])
def test_a_run_that_is_stopped_goes_on(
    in_place: bool, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(job, tmp_path / "expected", lam=3.0)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = job.model if in_place else tmp_path / "out"
    room = "in_place" if in_place else "to_directory"
    with monkeypatch.context() as patched, pytest.raises(pf.Interrupted, match="perta resume"):
        patched.setattr(f"perta_fast.subtraction.{room}.describe_output", stop)
        run(job, None if in_place else out, in_place=in_place, lam=3.0)
    if not in_place:
        with pytest.raises(pf.InputError, match="perta resume"):
            run(job, out, lam=3.0)
    report = pf.resume(out, progress=False)
    assert isinstance(report, Report)
    assert report.preconditioned is not None
    assert shards(out) == shards(tmp_path / "expected")
    assert not [name for folder in (tmp_path, job.model.parent) for name in names(folder) if name.startswith(".")]


@pytest.mark.parametrize("in_place", [False, True])
def test_streamed_it_gives_the_same_bytes(in_place: bool, job: Job, tmp_path: Path) -> None:
    whole = run(job, tmp_path / "whole", lam=3.0)
    place = None if in_place else tmp_path / "out"
    report = run(job, place, in_place=in_place, lam=3.0, stream=True)
    assert shards(place or job.model) == shards(tmp_path / "whole")
    assert report.settings["stream"] is True
    assert (whole.preconditioned is not None and report.preconditioned is not None) and (
        report.preconditioned.kept == pytest.approx(whole.preconditioned.kept)
    )
    assert report.check is not None
    assert report.check.left_out
    assert not [name for folder in (tmp_path, job.model.parent) for name in names(folder) if name.startswith(".")]


def test_an_interrupt_before_the_subtraction_leaves_nothing(job: Job, tmp_path: Path) -> None:
    def stop(event: pf.Event) -> None:
        if event.phase == "inputs of linear maps" and event.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "out", lam=3.0, progress=stop)
    assert names(tmp_path) == ["job"]


def test_many_processes(job: Job, tmp_path: Path) -> None:
    run(job, tmp_path / "alone", lam=3.0)
    arguments = [f"--{name}={getattr(job, name)}" for name in ("model", "base", "tuned", "forget", "retain")]
    perta_on_ranks(2, "unlearn", *arguments, "--lam=3", f"--out={tmp_path / 'two'}")
    assert shards(tmp_path / "two") == shards(tmp_path / "alone")
    assert names(tmp_path) == ["alone", "job", "two"]


def test_a_recipe_repeats_it(job: Job, tmp_path: Path) -> None:
    run(job, tmp_path / "out", lam=3.0, mu=5.0, at="base", save_tuned=tmp_path / "kept")
    assert cli.main(["unlearn", f"--recipe={tmp_path / 'out/perta_report.json'}", f"--out={tmp_path / 'again'}"]) == 0
    assert shards(tmp_path / "out") == shards(tmp_path / "again")
    report = json.loads((tmp_path / "again/perta_report.json").read_text())
    assert (report["preconditioned"]["mu"], report["settings"]["at"]) == (5.0, "base")


def test_zero_is_allowed_when_asked(job: Job, tmp_path: Path) -> None:
    with pytest.raises(pf.InputError, match="allow_zero"):
        run(Job(job.model, job.base, job.base, job.forget, job.retain), tmp_path / "out", lam=1.0)
    same = Job(job.model, job.base, job.base, job.forget, job.retain)
    assert run(same, tmp_path / "out", lam=1.0, allow_zero=True).counts == {"copied: task vector is zero": 21}
    assert shards(tmp_path / "out") == shards(job.model)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "alpha": ({"alpha": 16.0}, "rule preconditioned, which is the default, has no weights: p, alpha and threshold"),
    "p": ({"p": 2.0}, "rule preconditioned, which is the default, has no weights"),
    "importance": ({"save_importance": "kept"}, "takes no importance to save; save_tuned keeps what it makes"),
    "mu": ({"mu": -1.0}, "mu is -1.0; it must be a number from 0 to 10000"),
    "a huge mu": ({"mu": 1e5}, "mu is 100000.0; it must be a number from 0 to 10000"),
    "a text for mu": ({"mu": "much"}, "mu is 'much', not a number"),
    "batch": ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
    "length": ({"max_length": -5}, "max_length is -5; it must be at least 1"),
    "no linear map": ({"only": "*norm*"}, "let the run change no linear map, and rule preconditioned changes nothing"),
    "mu of another rule": ({"rule": "tv", "mu": 1.0}, "mu is for rule preconditioned"),
    "save of another rule": ({"rule": "fisher", "save_tuned": "kept"}, "save_tuned is for rule preconditioned"),
    "no such rule": ({"rule": "sage"}, "rule is 'sage'; it must be one of preconditioned, tv, grad, fisher"),
    "no retain": (
        {"retain": None},
        "rule preconditioned, which is the default, needs retain data; give a file of it as retain",
    ),
    "at": ({"at": "tuned"}, "at is 'tuned'; it must be base or model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments(case: str, job: Job, tmp_path: Path) -> None:
    changed, message = REFUSED[case]
    with pytest.raises(pf.InputError, match=message):
        run(job, tmp_path / "out", **{"lam": 1.0} | changed)
    assert names(tmp_path) == ["job"]


def test_what_is_preconditioned_is_not_preconditioned_again(job: Job, tmp_path: Path) -> None:
    pf.precondition(job.base, job.tuned, job.retain, tmp_path / "made", progress=False)
    twice = Job(job.model, job.base, tmp_path / "made", job.forget, job.retain)
    with pytest.raises(pf.InputError, match=r"is preconditioned already.*subtract it by rule tv"):
        run(twice, tmp_path / "out", lam=1.0)
    with pytest.raises(pf.InputError, match="is preconditioned already"):
        pf.precondition(job.base, tmp_path / "made", job.retain, tmp_path / "again", progress=False)
    assert names(tmp_path) == ["job", "made"]
    assert run(twice, tmp_path / "out", lam=1.0, rule="tv").lam == 1.0


def test_a_chat_template_that_asks_for_the_date_is_told_it_again(job: Job, tmp_path: Path) -> None:
    template = "{{ strftime_now('%Y-%m-%d') }}" + CHAT_TEMPLATE
    for path in job.checkpoints:
        tokenizer(template).save_pretrained(path)
    report = run(job, tmp_path / "out", lam=1.0)
    assert report.settings["date"] is not None
    assert report.recipe["date-string"] == report.settings["date"]
    assert run(job, tmp_path / "plain", lam=1.0, date_string="2024-02-03").settings["date"] == "2024-02-03"


def test_what_is_saved_must_not_replace(job: Job, tmp_path: Path) -> None:
    for place in (job.tuned, job.model / "x", tmp_path / "out", tmp_path / "out/x"):
        with pytest.raises(pf.InputError, match="save_tuned is"):
            run(job, tmp_path / "out", lam=1.0, save_tuned=place)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(pf.InputError, match="pass overwrite"):
        run(job, tmp_path / "out", lam=1.0, save_tuned=tmp_path / "full")
    assert names(tmp_path) == ["full", "job"]
