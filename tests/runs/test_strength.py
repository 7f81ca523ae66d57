"""``unlearn`` without a strength: which one it finds, what it says of it, and what it refuses."""

import json
import math
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from perta_fast import Importance, InputError, Interrupted, Report, RunError, apply, cli, resume, sweep, unlearn, verify
from perta_fast.data.rows import evenly_spread
from perta_fast.models import loading
from perta_fast.records.strength_choice import StrengthChoice
from perta_fast.rules import DEFAULT_RETAIN_RISE
from perta_fast.runs import estimate, strength
from perta_fast.scoring.live_model import LiveModel, ScoredModel
from perta_fast.scoring.setting import ScoredSetting
from tests.checkpoints.test_adapters import make_adapter
from tests.distributed.launch import perta_on_ranks
from tests.support.checkpoints import fingerprint
from tests.support.children import perta, signal_at
from tests.support.models import (
    CHAT_TEMPLATE,
    FORGET,
    RETAIN,
    Job,
    llama,
    tokenizer,
    write_job,
    write_learnt_job,
    write_lines,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TALKS = [
    {
        "messages": [
            {"role": role, "content": row[field]} for role, field in (("user", "question"), ("assistant", "answer"))
        ]
    }
    for row in FORGET
]


def run(job: Job, out: Path, **settings: Any) -> Report:
    given = {"forget": job.forget, "retain": job.retain, "rule": "fisher", "check": False} | settings
    return unlearn(*job.checkpoints, out=out, progress=False, **given)


def chosen(report: Report) -> StrengthChoice:
    assert report.choice is not None
    assert report.choice.after.lam == report.lam
    return report.choice


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def with_talks(folder: Path) -> Job:
    """Checkpoints with a chat template, and conversations to forget."""
    job = write_job(folder)
    for path in job.checkpoints:
        tokenizer(CHAT_TEMPLATE).save_pretrained(path)
    write_lines(job.forget, TALKS)
    return job


class Measured:
    """What stands in for the measuring of strengths, so that a test can draw the curves of both losses.

    At strength 0 they are 1 (forget) and 2. base: the forget loss of the base.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        retain_loss: Callable[[float], float],
        forget_loss: Callable[[float], float] = lambda lam: 5.0,
        base: float = 6.0,
    ) -> None:
        self.lams: list[float] = []
        self.names: list[str] = []

        def measure(_: LiveModel, rule: Any, importances: Any) -> ScoredSetting:
            lam = rule.rescaling.lam
            self.lams.append(lam)
            losses = forget_loss(lam), retain_loss(lam)
            return ScoredSetting(rule.name, 1.0, 1.0, lam, *losses, *losses, 0.5, 0.0)

        def original(*_: Any) -> ScoredSetting:
            return ScoredSetting("", 1.0, 1.0, 0.0, 1.0, 2.0, 1.0, 2.0, 0.0, 0.0)

        def of_base(_: ScoredModel, role: str, name: str) -> float:
            self.names.append(f"{name}, {role}")
            return base

        monkeypatch.setattr(LiveModel, "measure", measure)
        monkeypatch.setattr(LiveModel, "measure_original", original)
        monkeypatch.setattr(ScoredModel, "loss", of_base)


# What comes out.

WAYS: dict[str, dict[str, Any]] = {
    "tv": {"rule": "tv"},
    "preconditioned": {"rule": "preconditioned", "mu": 2.0},
    "fisher": {"rule": "fisher", "max_retain_rise": 0.02},
    "at model": {"rule": "empirical-fisher", "at": "model", "alpha": 4.0},
    "embeddings left": {"rule": "grad", "leave": "embeddings"},
    "hard mask": {"rule": "grad", "p": 0.5, "threshold": 0.3, "dtype": torch.float32},
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_strength_that_a_sweep_finds_and_the_run_that_it_gives(way: str, job: Job, tmp_path: Path) -> None:
    settings = WAYS[way]
    report = run(job, tmp_path / "found", **settings)
    choice = chosen(report)
    assert choice.max_retain_rise == settings.get("max_retain_rise", DEFAULT_RETAIN_RISE) and choice.metric == "loss"
    searching = {"max_retain_rise": choice.max_retain_rise} | settings
    swept = sweep(*job.checkpoints, job.forget, job.retain, progress=False, **searching)
    assert swept.best is not None and report.lam == swept.best.lam
    for tried, row in ((choice.before, swept.original), (choice.after, swept.best)):
        assert (tried.forget_loss, tried.retain_loss) == (row.forget_loss, row.retain_loss)
    assert sorted(tried.lam for tried in choice.tried) == [row.lam for row in swept.rows[1:]]
    rows = {"forget": len(FORGET), "retain": len(RETAIN)}
    assert (choice.rows, choice.totals) == (rows, rows)
    given = run(job, tmp_path / "given", lam=float(f"{report.lam!r}"), **settings | {"max_retain_rise": None})
    assert given.choice is None and "choice of lambda" not in given.phases
    assert len(shards(tmp_path / "found")) > 1
    assert shards(tmp_path / "found") == shards(tmp_path / "given")
    assert report.chosen_rule() == given.chosen_rule() and report.data == given.data
    assert {path.name for path in tmp_path.iterdir()} == {"found", "given"}
    assert verify(tmp_path / "found", progress=False).problems == []
    assert Report.load(tmp_path / "found").choice == choice


def test_what_is_said(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [f"--{role}={getattr(job, role)}" for role in ("model", "base", "tuned", "forget", "retain")]
    arguments = ["unlearn", *places, "--rule", "tv", "--max-retain-rise", "0.03"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    report = Report.load(tmp_path / "out")
    choice = chosen(report)
    said = capsys.readouterr().out
    assert (
        f"lambda {report.lam!r} was chosen of {len(choice.tried)} tried, as the largest at which the retain loss rises "
        "by at most 0.03 nats\non 5 of 5 forget rows and 7 of 7 retain rows: retain loss "
        f"{choice.before.retain_loss:.4g} before, {choice.after.retain_loss:.4g} after; forget loss "
    ) in said
    assert "choice of lambda: " in said
    # The report is a recipe with the strength that was found: nothing is searched for again.
    recipe = ["unlearn", "--recipe", str(tmp_path / "out" / "perta_report.json"), "--out", str(tmp_path / "again")]
    assert cli.main(recipe) == 0
    assert "was chosen" not in capsys.readouterr().out
    assert shards(tmp_path / "again") == shards(tmp_path / "out")
    assert cli.main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"lambda {report.lam!r} was chosen of" in page.replace("<wbr>", "")


def test_a_recipe_may_have_the_bound(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the strength of the command line takes its place."""
    settings = {role: getattr(job, role) for role in ("model", "base", "tuned", "forget", "retain")}
    path = tmp_path / "run.yaml"
    lines = settings | {"rule": "tv", "max-retain-rise": 0.04, "out": tmp_path / "out"}
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    assert cli.main(["recipe", "check", str(path)]) == 0
    assert cli.main(["unlearn", "--recipe", str(path), "--quiet"]) == 0
    assert chosen(Report.load(tmp_path / "out")).max_retain_rise == 0.04
    assert cli.main(["unlearn", "--recipe", str(path), "--lam", "2", "--out", str(tmp_path / "given"), "--quiet"]) == 0
    assert (Report.load(tmp_path / "given").lam, Report.load(tmp_path / "given").choice) == (2, None)
    path.write_text(f"{path.read_text()}stream: true\n")
    capsys.readouterr()
    assert cli.main(["recipe", "check", str(path)]) == 2
    assert "a streamed run cannot choose lam" in capsys.readouterr().err


def test_in_place_and_with_kept_importances(job: Job, tmp_path: Path) -> None:
    expected = run(job, tmp_path / "out", save_importance=tmp_path / "kept")
    assert Importance.load(tmp_path / "kept" / "forget").metadata.sample_count == len(FORGET)
    model = Path(shutil.copytree(job.model, tmp_path / "model"))
    report = unlearn(model, job.base, job.tuned, job.forget, job.retain, in_place=True, progress=False, rule="fisher")
    assert chosen(report) == chosen(expected)
    assert shards(model) == shards(tmp_path / "out")


@pytest.mark.parametrize("rule", ["tv", "fisher"])
def test_an_adapter_as_tuned(rule: str, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, llama, {"target_modules": ["q_proj", "down_proj"]})
    for name in ("base", "model"):
        tokenizer().save_pretrained(tmp_path / name)
    data = [write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in (("f", FORGET), ("r", RETAIN))]
    job = Job(tmp_path / "model", tmp_path / "base", adapter, *data)
    report = run(job, tmp_path / "found", rule=rule, max_retain_rise=0.01)
    assert chosen(report).after.retain_loss <= chosen(report).before.retain_loss + 0.01
    run(job, tmp_path / "given", rule=rule, lam=report.lam)
    assert shards(tmp_path / "found") == shards(tmp_path / "given")


def test_conversations(tmp_path: Path) -> None:
    job = with_talks(tmp_path)
    told = {"system_prompt": "Be brief."}
    found, given = tmp_path / "found", tmp_path / "given"
    report = run(job, found, **told)
    run(job, given, lam=report.lam, **told)
    assert shards(found) == shards(given)
    other = run(job, tmp_path / "other")
    assert chosen(other).before != chosen(report).before  # it was scored with the prompt


def test_a_model_without_tokenizer_is_scored_with_the_tokens_of_the_gradients(job: Job, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(job.model, tmp_path / "model"))
    for path in bare.glob("*token*"):
        path.unlink()
    report = run(replace(job, model=bare), tmp_path / "out", rule="grad")
    assert chosen(report) == chosen(run(job, tmp_path / "whole", rule="grad"))


# Which rows.


def test_rows_that_are_evenly_spread() -> None:
    assert evenly_spread(3, 200) == [0, 1, 2]
    assert evenly_spread(0, 200) == []
    spread = evenly_spread(1003, 200)
    assert len(spread) == 200 and spread[0] == 0 and set(map(int.__sub__, spread[1:], spread)) == {5, 6}


def test_of_many_rows_some_are_scored(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strength, "ROWS", 3)
    choice = chosen(run(job, tmp_path / "out", rule="tv"))
    assert (choice.rows, choice.totals) == ({"forget": 3, "retain": 3}, {"forget": 5, "retain": 7})
    few = {
        "forget": write_lines(tmp_path / "f.jsonl", [FORGET[k] for k in (0, 1, 3)]),
        "retain": write_lines(tmp_path / "r.jsonl", [RETAIN[k] for k in (0, 2, 4)]),
    }
    assert chosen(run(job, tmp_path / "few", rule="tv", **few)).tried == choice.tried
    assert "on 3 of 5 forget rows and 3 of 7 retain rows: " in "\n".join(choice.lines())


# Where the search ends.


def test_even_the_largest_keeps_the_bound(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(monkeypatch, lambda lam: 2.01)
    report = run(job, tmp_path / "out", rule="tv")
    assert measured.lams == [2.0**k for k in range(11)] and report.lam == 1024
    assert report.warnings[0].startswith("even lambda 1024, the largest that is tried, keeps the retain loss within")


def test_a_strength_is_written_so_that_it_can_be_given_again(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Measured(monkeypatch, lambda lam: 2.0 if lam <= 2**-9 else 3.0)
    report = run(job, tmp_path / "out", rule="tv")
    assert report.lam == 0.001953125
    summary = report.summary()
    assert summary.splitlines()[0] == "rule tv, lambda 0.001953125" and "lambda 0.001953125 was chosen" in summary
    assert report.recipe["lam"] == 0.001953125 and "max-retain-rise" not in report.recipe


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        (
            lambda lam: 2 + math.sqrt(lam),
            "nearest to it is 0.0009765625, where it rises by 0.03125, from 2. Allow more",
        ),
        (lambda lam: math.nan, "at each the losses are not finite, down to 0.0009765625"),
    ],
    ids=["all above", "not finite"],
)
@pytest.mark.parametrize("rule", ["tv", "grad"])
def test_no_strength_keeps_the_bound(
    rule: str, curve: Callable[[float], float], said: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written then."""
    Measured(monkeypatch, curve)
    with pytest.raises(RunError, match=f"keeps the rise of the retain loss within 0.01 nats.*{said}"):
        run(job, tmp_path / "out", rule=rule, max_retain_rise=0.01)
    assert list(tmp_path.iterdir()) == []


def test_importances_that_were_to_be_kept_are_there_nevertheless(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Measured(monkeypatch, lambda lam: 3.0)
    kept = tmp_path / "kept"
    with pytest.raises(RunError, match=rf"The importances are kept in {kept}; perta apply and perta sweep take them"):
        run(job, tmp_path / "out", rule="grad", save_importance=kept)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    apply(*job.checkpoints, kept / "forget", kept / "retain", rule="grad", out=tmp_path / "out", progress=False)


# No further than to what the base knows, unless a bound is given.


@pytest.mark.parametrize("rule", ["tv", "preconditioned", "grad"])
def test_it_ends_at_the_forget_loss_of_the_base(
    rule: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch, lambda lam: 2 + lam / 1000, lambda lam: 1 + lam, base=4.0)
    report = run(job, tmp_path / "out", rule=rule)
    choice = chosen(report)
    assert measured.names == ["base, forget"] and (choice.base_forget_loss, choice.max_retain_rise) == (4.0, 0.05)
    assert 3 / 1.01 <= report.lam <= 3 and choice.after.forget_loss == 1 + report.lam
    assert min(each.lam for each in choice.tried if each.lam > report.lam) <= 1.01 * report.lam
    said = "as the largest at which the forget loss is at most that of base, 4, and the retain loss rises by at most"
    assert said in report.summary() and report.warnings == []
    assert Report.load(tmp_path / "out").choice == choice
    assert cli.main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8").replace("<wbr>", "")
    assert page.count("the forget loss is at most that of base, 4, and the retain loss rises by at most 0.05 nats") > 1


def test_the_bound_may_end_it_before(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Measured(monkeypatch, lambda lam: 2 + lam / 100, lambda lam: 1 + lam / 1000, base=4.0)
    report = run(job, tmp_path / "out", rule="tv")
    assert 5 / 1.01 <= report.lam <= 5 and chosen(report).base_forget_loss == 4.0


def test_with_a_bound_the_base_is_not_asked(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(monkeypatch, lambda lam: 2 + lam / 100, lambda lam: 1 + lam, base=4.0)
    report = run(job, tmp_path / "out", rule="tv", max_retain_rise=DEFAULT_RETAIN_RISE)
    assert 5 / 1.01 <= report.lam <= 5
    assert measured.names == [] and chosen(report).base_forget_loss is None and report.warnings == []


def test_a_base_that_is_the_model_is_not_asked(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(monkeypatch, lambda lam: 2 + lam / 100)
    report = run(replace(job, base=job.model), tmp_path / "out", rule="tv")
    assert measured.names == [] and chosen(report).base_forget_loss is None and report.warnings == []


@pytest.mark.parametrize(
    ("base", "warning"),
    [
        (
            1.09,
            "the forget loss of model is 1, and that of base 1.09: the model has learnt nothing .* so the bound alone",
        ),
        (0.5, "the forget loss of model is 1, and that of base 0.5: the model has learnt nothing of the forget data"),
    ],
)
def test_a_base_that_sets_no_end(
    base: float, warning: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Measured(monkeypatch, lambda lam: 2 + lam / 100, lambda lam: 1 + lam, base=base)
    report = run(job, tmp_path / "out", rule="grad")
    assert 5 / 1.01 <= report.lam <= 5 and chosen(report).base_forget_loss is None
    assert len(report.warnings) == 1 and re.match(warning, report.warnings[0])


def test_a_base_that_does_not_know_all_tokens(job: Job, tmp_path: Path) -> None:
    small = write_job(tmp_path / "small", vocab_size=40)
    grown = replace(job, base=small.base, tuned=small.tuned)
    with pytest.raises(
        InputError, match=r"base cannot be scored .* knows those below 40.*\. Give max_retain_rise, up to which"
    ):
        run(grown, tmp_path / "out", rule="tv", common_rows=True)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("base", [math.inf, math.nan])
def test_a_base_that_is_not_finite(base: float, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Measured(monkeypatch, lambda lam: 2 + lam / 100, lambda lam: 1 + lam, base=base)
    with pytest.raises(InputError, match=r"base cannot be scored on the forget data \(its loss is not finite\)"):
        run(job, tmp_path / "out", rule="tv")


def test_no_strength_forgets_less_than_the_base(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Measured(monkeypatch, lambda lam: 2.0, lambda lam: 5.0, base=4.0)
    with pytest.raises(RunError, match=r"keeps the forget loss below that of base, 4: at 0\.0009765625 it is 5"):
        run(job, tmp_path / "out", rule="tv")
    assert list(tmp_path.iterdir()) == []


def test_what_was_learnt_is_subtracted_and_no_more(tmp_path: Path) -> None:
    """Where θ_f is θ_full, strength 1 gives θ_0."""
    job = write_learnt_job(tmp_path)
    report = run(job, tmp_path / "out", rule="tv")
    assert report.lam == pytest.approx(1, rel=0.02) and report.warnings == []
    choice = chosen(report)
    assert choice.base_forget_loss is not None and choice.after.forget_loss is not None
    assert choice.after.forget_loss / 1.00001 <= choice.base_forget_loss <= choice.after.forget_loss * 1.1
    assert run(job, tmp_path / "given", rule="tv", max_retain_rise=DEFAULT_RETAIN_RISE).lam > 1.2


# What is refused, before the first gradient.


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"stream": True}, "a streamed run cannot choose lam, .*; give lam, or score several with choose"),
        ({"stream": True, "rule": "tv"}, "a streamed run cannot choose lam"),
        (
            {"max_retain_rise": 0.1, "lam": 1.0},
            "give lam, or max_retain_rise, up to which it is searched for; not both",
        ),
        ({"max_retain_rise": -0.1}, "max_retain_rise is -0.1; it must be at least 0 nats"),
        ({"max_retain_rise": math.inf}, "max_retain_rise is inf"),
        ({"max_retain_rise": math.nan}, "max_retain_rise is nan"),
        ({"rule": "tv", "retain": None}, "choosing lam needs retain data; give a file of it as retain, or give lam"),
        ({"rule": "tv", "forget": None, "retain": None}, "choosing lam needs forget data"),
        ({"retain": None}, "rule fisher needs retain data"),
        ({"allow_zero": True}, "allow_zero is for a given strength"),
        ({"rule": "tv", "batch_size": 0}, "batch_size is 0"),
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_what_cannot_be_chosen(
    in_place: bool, settings: dict[str, Any], reason: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "accumulate", None)
    before = fingerprint(job.model.parent)
    place = {"in_place": True, "out": None} if in_place else {}
    with pytest.raises(InputError, match=reason):
        run(job, **{"out": tmp_path / "out"} | place | settings)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == [] and fingerprint(job.model.parent) == before


def test_commands_that_cannot_choose(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [f"--{role}={getattr(job, role)}" for role in ("model", "base", "tuned", "forget", "retain")]
    for more in (["--stream"], ["--stream", "--dry-run"]):
        assert cli.main(["unlearn", "--rule=fisher", *places, "--out", str(tmp_path / "out"), *more]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.splitlines()[-1].endswith(
            "or score several with --choose (up-to-base ends where the search would)"
        )
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        cli.main(
            [
                "unlearn",
                "--rule=fisher",
                *places,
                "--out",
                str(tmp_path / "out"),
                "--lam",
                "1",
                "--max-retain-rise",
                "0.1",
            ]
        )
    assert "argument --max-retain-rise: not allowed with argument --lam" in capsys.readouterr().err


@pytest.mark.parametrize("rule", ["tv", "fisher"])
@pytest.mark.parametrize("fault", ["not finite", "NaN", "shorter", "fewer tokens", "no config"])
def test_a_model_that_cannot_be_scored(
    fault: str, rule: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "accumulate", None)
    path = Path(shutil.copytree(job.model, tmp_path / "model"))
    reason = "its losses on the data are not finite, so no strength can be chosen"
    if fault == "not finite":
        model = AutoModelForCausalLM.from_pretrained(path)
        model.lm_head.weight.data.fill_(1e38)
        path = tmp_path / "broken"
        model.save_pretrained(path)
    elif fault == "NaN":  # no type and no given strength would help
        model = AutoModelForCausalLM.from_pretrained(path)
        model.model.embed_tokens.weight.data.fill_(float("nan"))
        path = tmp_path / "broken"
        model.save_pretrained(path)
        reason = "broken: tensor model.embed_tokens.weight has NaN or infinite values, .*; give a sound copy$"
    elif fault == "no config":
        (path / "config.json").unlink()
        reason = "has no config.json, without which transformers cannot load this model"
    elif fault == "shorter":
        config = AutoConfig.from_pretrained(path)
        config.max_position_embeddings = 8
        config.save_pretrained(path)
        reason = "cannot be scored on the forget data: sample 0: has .* tokens, the model takes 8"
    else:
        small = write_job(tmp_path / "small", vocab_size=40)
        job, path = replace(small, base=job.base), small.model
        reason = "model|vocabulary|shape"
    with pytest.raises(InputError, match=reason):
        run(replace(job, model=path), tmp_path / "out", rule=rule)
    assert not (tmp_path / "out").exists()


# Stopped and run again.


@pytest.mark.parametrize("rule", ["tv", "fisher"])
def test_stopped_in_the_search_it_begins_anew(
    rule: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = chosen(run(job, tmp_path / "whole", rule=rule))
    score, scored = ScoredModel.score, []

    def stopping(model: ScoredModel, name: str) -> Any:
        scored.append(name)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return score(model, name)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ScoredModel, "score", stopping)
        run(job, tmp_path / "out", rule=rule)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert chosen(run(job, tmp_path / "out", rule=rule)) == expected
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_killed_in_the_search(job: Job, tmp_path: Path) -> None:
    setup = signal_at("SIGKILL", "scoring.live_model.apply_to_module_", earlier=2)  # at the second setting
    places = [f"--{role}={getattr(job, role)}" for role in ("model", "base", "tuned", "forget", "retain")]
    command = ["unlearn", *places, "--rule", "grad", "--out", tmp_path / "out", "--quiet"]
    done = perta(*command, setup=setup)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out").exists()
    assert cli.main(list(map(str, command))) == 0
    report = Report.load(tmp_path / "out")
    run(job, tmp_path / "given", rule="grad", lam=report.lam)
    assert shards(tmp_path / "out") == shards(tmp_path / "given")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "given"}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("rule", ["tv", "grad"])
def test_stopped_later_it_is_resumed_with_the_strength_that_was_chosen(
    rule: str, in_place: bool, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(job, tmp_path / "whole", rule=rule)
    model = Path(shutil.copytree(job.model, tmp_path / "model"))
    out = model if in_place else tmp_path / "out"
    room = "in_place" if in_place else "to_directory"

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(f"perta_fast.subtraction.{room}.describe_output", stop)
        place = {"in_place": True, "out": None} if in_place else {"out": out}
        run(replace(job, model=model), rule=rule, **place)  # type: ignore[arg-type]
    report = resume(out, progress=False)
    assert isinstance(report, Report) and report.resumed == 1
    assert chosen(report) == chosen(expected) and report.recipe["lam"] == expected.lam
    assert shards(out) == shards(tmp_path / "whole")


def test_the_same_command_resumes_the_task_vector_alone(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr("perta_fast.subtraction.to_directory.describe_output", stop)
        run(job, tmp_path / "out", rule="tv")
    report = run(job, tmp_path / "out", rule="tv")
    assert report.resumed == 1 and chosen(report).tried


# How it works.


@pytest.mark.parametrize("at", ["base", "model"])
def test_one_model_at_a_time(at: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.nn.Module]] = []
    load = loading.load_subject

    def watched(*arguments: Any, **settings: Any) -> Any:
        assert [ref for ref in alive if ref() is not None] == []
        subject = load(*arguments, **settings)
        alive.append(weakref.ref(subject.module))
        return subject

    monkeypatch.setattr(loading, "load_subject", watched)
    run(job, tmp_path / "out", rule="grad", at=at)
    assert len(alive) == 4  # to score the base, to score it as it is, for the gradients, to score the rest


def test_the_progress_names_each_strength(job: Job, tmp_path: Path) -> None:
    phases: list[str] = []
    data = {"forget": job.forget, "retain": job.retain}
    report = unlearn(
        *job.checkpoints, **data, rule="tv", out=tmp_path / "out", progress=lambda event: phases.append(event.phase)
    )
    tried = [f"tv, lambda {tried.lam:g}, {role}" for tried in chosen(report).tried for role in data]
    scored = [phase for phase in dict.fromkeys(phases) if phase.endswith(tuple(data))]
    assert scored == ["base, forget", *(f"the model as it is, {role}" for role in data), *tried]


@pytest.mark.parametrize("rule", ["tv", "grad"])
def test_several_processes(rule: str, job: Job, tmp_path: Path) -> None:
    """The first one scores; all have its choice, and the strength given to as many makes the same bytes."""
    places = [f"--{role}={getattr(job, role)}" for role in ("model", "base", "tuned", "forget", "retain")]
    command = ["unlearn", *places, "--rule", rule]
    first, second = perta_on_ranks(2, *command, "--out", tmp_path / "out")
    assert (first.status, second.status, second.output) == (0, 0, ""), first.errors
    report = Report.load(tmp_path / "out")
    assert f"lambda {report.lam!r} was chosen" in first.output
    again = perta_on_ranks(2, *command, "--lam", repr(report.lam), "--out", tmp_path / "given")
    assert [each.status for each in again] == [0, 0]
    assert shards(tmp_path / "out") == shards(tmp_path / "given")
    if rule == "tv":
        assert chosen(run(job, tmp_path / "alone", rule=rule)) == chosen(report)


def test_several_processes_say_once_that_none_keeps_the_bound(job: Job, tmp_path: Path) -> None:
    places = [f"--{role}={getattr(job, role)}" for role in ("model", "base", "tuned", "forget", "retain")]
    ended = perta_on_ranks(2, "unlearn", *places, "--rule", "tv", "--out", tmp_path / "out", setup=_nothing_keeps)
    assert [each.status for each in ended] == [1, 1]
    assert "".join(each.errors for each in ended).count("no lambda that was tried keeps") == 1
    assert list(tmp_path.iterdir()) == []


def _nothing_keeps(rank: int) -> None:
    def measure(live: LiveModel, rule: Any, importances: Any) -> ScoredSetting:
        return ScoredSetting(rule.name, 1.0, 1.0, rule.rescaling.lam, 99.0, 99.0, 99.0, 99.0, 0.5, 0.0)

    LiveModel.measure = measure  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change", [{"tried": None}, {"rows": {}}, {"after": {"lam": 1.0}}, {"before": "x"}, {"more": 1}]
)
def test_a_damaged_record_of_a_choice(change: dict[str, Any], job: Job, tmp_path: Path) -> None:
    """It is refused in a sentence, or read."""
    run(job, tmp_path / "out", rule="tv", max_retain_rise=1.0)
    path = tmp_path / "out" / "perta_report.json"
    content = json.loads(path.read_text())
    content["choice"] |= change
    path.write_text(json.dumps(content))
    if change == {"rows": {}}:
        assert "was chosen" in Report.read(path).summary()
        return
    with pytest.raises(InputError, match="is not a report that this version understands: choice"):
        Report.read(path)
