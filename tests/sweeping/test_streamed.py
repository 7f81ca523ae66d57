"""Streamed sweeps: the numbers of the live one, bit for bit in float32 on the CPU, and how they walk."""

import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import InputError, Sweep, cli, estimate_importance, evaluate, sweep
from perta_fast.models import loading
from perta_fast.models.loading import Subject
from perta_fast.reporting.evidence import data_hashes
from perta_fast.rules import ESTIMATORS
from perta_fast.runs import estimate
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.streaming.forecast import choice
from perta_fast.streaming.forward import score_walk
from perta_fast.streaming.schedule import Schedule
from perta_fast.sweeping import walk_plan
from perta_fast.sweeping.coarse import coarse, pays
from perta_fast.sweeping.grid import DEFAULT_STRENGTHS
from tests.checkpoints.test_adapters import make_adapter
from tests.families.configs import FAMILIES
from tests.families.matrix import build, write
from tests.support.checkpoints import fingerprint, read_checkpoint, same_bytes
from tests.support.models import FORGET, RETAIN, Job, llama, tokenizer, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
AUTHORS = [
    {
        "question": f"Who painted picture {k}?",
        "answer": f"It was painter {k}.",
        "paraphrased_answer": f"Painter {k} made it.",
        "perturbed_answer": [f"It was poet {k}.", f"It was singer {k}."],
    }
    for k in range(3)
]
Jobs = Callable[..., Job]


def run(job: Job, **chosen: Any) -> Sweep:
    return sweep(*job.checkpoints, job.forget, job.retain, **{"batch_size": 3, "progress": False} | chosen)


def both(job: Job, folder: Path, **chosen: Any) -> tuple[Sweep, Sweep]:
    """The live sweep, and the streamed one. The bound has the live one score its settings one after another."""
    chosen = {"target_retain_loss": 1000.0} | chosen
    return run(job, **chosen, out=folder / "live"), run(job, **chosen, stream=True, out=folder / "streamed")


def plain(row: ScoredSetting) -> ScoredSetting:
    """What both sweeps must agree on."""
    return replace(row, seconds=0.0, scores={})


def assert_same(found: Sweep, expected: Sweep) -> None:
    assert list(map(plain, found.rows)) == list(map(plain, expected.rows))
    assert len({row.retain_loss for row in found.rows}) == len(found.rows)


@pytest.fixture(autouse=True)
def aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """``from_pretrained`` leaves parameters at any address, on which last bits depend."""
    load = loading.load_subject

    def loaded(*arguments: Any, **settings: Any) -> Subject:
        subject = load(*arguments, **settings)
        for parameter in subject.module.parameters():
            if not parameter.is_meta:
                parameter.data = parameter.data.clone()
        return subject

    monkeypatch.setattr(loading, "load_subject", loaded)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """By type and changes of the model; shared, so never written to."""
    made: dict[str, Job] = {}

    def job_of(dtype: torch.dtype, **changes: Any) -> Job:
        key = f"{dtype}{changes}"
        if key not in made:
            made[key] = write_job(tmp_path_factory.mktemp("job"), dtype, **changes)
        return made[key]

    return job_of


def importances(job: Job, folder: Path) -> dict[str, list[Path]]:
    """Of both estimators."""
    made: dict[str, list[Path]] = {"forget_importance": [], "retain_importance": []}
    for estimator in ESTIMATORS:
        for name, data in zip(made, (job.forget, job.retain), strict=True):
            out = folder / f"{name} {estimator}"
            estimate_importance(job.base, data, estimator, out=out, progress=False)
            made[name].append(out)
    return made


# The numbers.

CASES: dict[str, dict[str, Any]] = {
    "tv": {"rule": "tv"},
    "rules": {"rule": ["tv", "fisher", "empirical-fisher"], "alpha": [1, 4]},
    "at model": {"rule": ["grad"], "p": [0.5, 2], "threshold": 0.2, "at": "model"},
    "preconditioned": {"mu": [1, 10]},
    "left": {"rule": ["tv", "fisher"], "leave": "embeddings,norms"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_numbers_of_the_live_sweep(case: str, tied: bool, jobs: Jobs, tmp_path: Path) -> None:
    job, chosen = jobs(F32, tie_word_embeddings=tied), CASES[case]
    if tied and case == "rules":  # gradients of a tied head are added up in another order
        chosen = chosen | importances(job, tmp_path)
    live, streamed = both(job, tmp_path, lams=[2, -1, 0.5], **chosen)
    assert_same(streamed, live)
    for name in ("inputs", "data", "metric", "importance", "notes"):
        assert getattr(streamed, name) == getattr(live, name), name
    different = {"stream", "checkpoint"}
    assert {key: value for key, value in streamed.settings.items() if key not in different} == {
        key: value for key, value in live.settings.items() if key not in different
    }


@pytest.mark.parametrize("metric", ["Q_A_Prob", "extraction_strength", "exact_memorization"])
def test_every_metric(metric: str, jobs: Jobs, tmp_path: Path) -> None:
    job = jobs(F32)
    assert_same(*reversed(both(job, tmp_path, rule="tv", lams=[2, 30], metric=metric, dtype=F32)))


def test_a_bfloat16_checkpoint_in_float32(jobs: Jobs, tmp_path: Path) -> None:
    assert_same(*reversed(both(jobs(BF16), tmp_path, rule=["tv", "fisher"], lams=[3], dtype=F32)))


def test_an_adapter_as_tuned(jobs: Jobs, tmp_path: Path) -> None:
    data = jobs(F32)
    adapter = make_adapter(tmp_path, llama, {"target_modules": ["q_proj", "up_proj"]})
    for name in ("model", "base"):
        tokenizer().save_pretrained(tmp_path / name)
    job = Job(tmp_path / "model", tmp_path / "base", adapter, data.forget, data.retain)
    assert_same(*reversed(both(job, tmp_path, rule=["grad", "preconditioned"], lams=[9])))


def test_experts_that_transformers_joins(jobs: Jobs, tmp_path: Path) -> None:
    data = jobs(F32)
    family = next(each for each in FAMILIES if each.name == "Mixtral")
    paths = [write(build(family, seed), tmp_path / str(seed)) for seed in (1, 2, 3)]
    job = Job(*paths, data.forget, data.retain)
    assert_same(
        *reversed(both(job, tmp_path, rule=["fisher", "empirical-fisher"], lams=[3, 2], **importances(job, tmp_path)))
    )


def test_a_gold_model_and_the_choice(jobs: Jobs, tmp_path: Path) -> None:
    """The checkpoint of what is chosen is that of the live sweep, byte for byte."""
    job = jobs(F32)
    how: dict[str, Any] = {"rule": ["tv", "fisher"], "lams": [1, 4], "select": "closest", "gold": job.tuned}
    live = run(job, **how, out=tmp_path / "live", checkpoint=tmp_path / "chosen live")
    streamed = run(job, **how, out=tmp_path / "streamed", checkpoint=tmp_path / "chosen", stream=True)
    assert_same(streamed, live)
    assert live.gold is not None and streamed.gold is not None
    assert plain(streamed.gold) == plain(live.gold)
    one, other = read_checkpoint(tmp_path / "chosen"), read_checkpoint(tmp_path / "chosen live")
    assert one.keys() == other.keys() and all(same_bytes(one[name], other[name]) for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chosen", "chosen live", "live", "streamed"]
    assert Sweep.read(tmp_path / "streamed" / "sweep.json").rows == streamed.rows


# Scores.


def test_scores_are_those_of_an_evaluation(jobs: Jobs, tmp_path: Path) -> None:
    job, authors = jobs(F32), write_lines(tmp_path / "authors.jsonl", AUTHORS)
    how: dict[str, Any] = {"rule": "tv", "lams": [40], "target_retain_loss": 100.0, "metric": "Q_A_Prob"}
    found = run(job, **how, also=authors, stream=True, out=tmp_path / "out", checkpoint=tmp_path / "chosen")
    metrics = ["loss", "Q_A_Prob", "extraction_strength", "exact_memorization"]
    names = {f"{role}_{metric}" for role in ("forget", "retain", "authors") for metric in metrics}
    for row, model in zip(found.rows, (job.model, tmp_path / "chosen"), strict=True):
        result = evaluate(model, forget=job.forget, retain=job.retain, stream=True, batch_size=3, progress=False)
        other = evaluate(model, forget=authors, stream=True, batch_size=3, progress=False)
        expected = {name: metric.value for name, metric in result.metrics.items()}
        expected |= {
            name.replace("forget_", "authors_"): metric.value
            for name, metric in other.metrics.items()
            if name != "forget_truth_ratio"
        }
        assert {name: value for name, value in row.scores.items() if name != "authors_Truth_Ratio"} == expected
        assert row.scores.keys() == names | {"authors_Truth_Ratio"}
        assert (row.forget_loss, row.retain) == (expected["forget_loss"], expected["retain_Q_A_Prob"])
        ratios = [sample["score"] for sample in other.metrics["forget_truth_ratio"].samples]
        assert row.scores["authors_Truth_Ratio"] == pytest.approx(sum(max(0, 1 - each) for each in ratios) / 3)
    assert found.data["authors"]["samples"] == 3
    assert Sweep.read(tmp_path / "out" / "sweep.json").rows == found.rows


def test_membership_scores(jobs: Jobs, tmp_path: Path) -> None:
    """Those of an evaluation with the same holdout set."""
    job, holdout = jobs(F32), write_lines(tmp_path / "never seen.jsonl", AUTHORS)
    found = run(job, rule="tv", lams=[1], holdout=holdout, stream=True, out=tmp_path / "out")
    result = evaluate(job.model, forget=job.forget, holdout=holdout, stream=True, batch_size=3, progress=False)
    names = [name for name in result.metrics if name.startswith(("mia_", "holdout_"))]
    assert len([name for name in names if name.startswith("mia_")]) == 4
    assert {name: found.rows[0].scores[name] for name in names} == {name: result.metrics[name].value for name in names}
    assert found.data["holdout"]["samples"] == 3


@pytest.mark.parametrize("metric", ["loss", "Q_A_Prob"])
def test_further_data_in_both_sweeps(metric: str, jobs: Jobs, tmp_path: Path) -> None:
    """It is scored with the same numbers, shown, and chooses nothing."""
    job = jobs(F32)
    also = [
        write_lines(tmp_path / "authors.jsonl", AUTHORS),
        write_lines(tmp_path / "texts.jsonl", [{"text": "Rain."}]),
    ]
    how: dict[str, Any] = {"rule": "tv", "lams": [2], "metric": metric}
    live, streamed = both(job, tmp_path, **how, also=also)
    names = {f"{role}_{name}" for role in ("authors", "texts") for name in ("loss", metric)}
    for one, other in zip(live.rows, streamed.rows, strict=True):
        assert one.scores.keys() == names
        assert one.scores == {name: other.scores[name] for name in names}
    assert list(map(plain, run(job, **how).rows)) == list(map(plain, live.rows))
    for found in (live, streamed):
        heads, first = found.summary().splitlines()[:2]
        assert f"authors {metric}" in heads and "texts loss" in heads
        assert f"{found.rows[0].scores[f'texts_{metric}']:.4f}" in first
        assert list(found.data) == ["forget", "retain", "authors", "texts"]
        assert list(data_hashes(found)) == ["forget", "retain"]  # by which a page finds sweeps that can be compared


# Walks.


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of what each walk scores."""
    seen: list[list[str]] = []
    init = score_walk._ScoreWalk.__init__

    def noted(walk: Any, skeleton: Any, versions: Any, *more: Any) -> None:
        seen.append([version.name for version in versions])
        init(walk, skeleton, versions, *more)

    monkeypatch.setattr(score_walk._ScoreWalk, "__init__", noted)
    return seen


def test_one_walk_and_no_loaded_model(
    jobs: Jobs, walks: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_from_pretrained", lambda *_: pytest.fail("loads the model"))
    monkeypatch.setattr(walk_plan, "pays", lambda *_: False)  # it depends on how fast the machine is now
    how: dict[str, Any] = {"rule": ["fisher", "preconditioned"], "max_retain_rise": 0.001}
    found = run(jobs(F32), **how, lams=[300], stream=True, out=tmp_path / "out")
    assert walks == [["the model as it is", "fisher, lambda 300", "preconditioned, mu 10, lambda 300"]]
    assert not any(row.skipped for row in found.rows)


def test_without_strengths(jobs: Jobs, tmp_path: Path) -> None:
    """A search would need a walk for each trial: the usual strengths are tried, then some closer to the bound."""
    found = run(jobs(F32), rule="tv", max_retain_rise=0.01, stream=True, out=tmp_path / "out")
    lams = [row.lam for row in found.rows[1:]]
    assert lams == sorted(lams) and {*DEFAULT_STRENGTHS} < {*lams}
    kept = max(row.lam for row in found.rows[1:] if row.lam in DEFAULT_STRENGTHS and row.keeps(found.limits))
    broken = min(row.lam for row in found.rows[1:] if row.lam > kept and row.lam in DEFAULT_STRENGTHS)
    assert all(kept < lam < broken for lam in {*lams} - {*DEFAULT_STRENGTHS})
    assert found.select == "best-forget" and found.best.lam > kept
    assert found.notes[0].startswith("first these strengths were tried, in one walk or two: 0.25, 0.5")


@pytest.mark.parametrize("second", [True, False])
def test_two_walks(
    second: bool, jobs: Jobs, walks: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second leaves out what lies beyond a strength that broke the bound in the first."""
    monkeypatch.setattr(walk_plan, "pays", lambda *_: second)
    job, lams = jobs(F32), [-1, 1, 30, 200, 300, 400]
    whole = {(row.rule, row.lam): row for row in run(job, rule=["tv", "fisher"], lams=lams).rows}
    walks.clear()
    found = run(job, rule=["tv", "fisher"], lams=lams, max_retain_increase=20, stream=True, out=tmp_path / "out")
    skipped = {(row.rule, row.lam) for row in found.rows if row.skipped}
    if not second:
        assert len(walks) == 1 and not skipped
    else:
        first = ["the model as it is", *(f"{rule}, lambda {lam}" for rule in ("tv", "fisher") for lam in (-1, 30, 300))]
        assert walks[0] == first
        broken = {
            rule: min(lam for lam in (30, 300) if not whole[rule, lam].keeps(found.limits)) for rule in ("tv", "fisher")
        }
        assert skipped == {(rule, lam) for rule in broken for lam in (1, 200, 400) if lam > broken[rule]} != set()
        assert len(walks) == 2
    for row in found.rows:
        assert row.skipped or plain(row) == plain(whole[row.rule, row.lam])


def test_as_many_settings_at_once_as_the_disk_has_room_for(
    jobs: Jobs, walks: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk_plan.ForwardEstimate, "most_versions", lambda *_: 2)
    how: dict[str, Any] = {"rule": "tv", "lams": [1, 2, 3, 4]}
    live = run(jobs(F32), **how)
    walks.clear()  # a model in memory is scored in a walk too
    assert_same(run(jobs(F32), **how, stream=True, out=tmp_path / "out"), live)
    assert list(map(len, walks)) == [2, 2, 1]


def test_a_disk_without_room_for_all_samples_of_one_setting(
    jobs: Jobs, walks: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These are dealt into groups, with a walk each."""
    how: dict[str, Any] = {"rule": "tv", "lams": [1, 2, 3], "batch_size": 2}
    live = run(jobs(F32), **how)
    walks.clear()
    monkeypatch.setattr(choice.Budget, "at", lambda *_: choice.Budget(6))
    monkeypatch.setattr(walk_plan.ForwardEstimate, "scratch", lambda _, schedule: 12 // schedule.groups)
    monkeypatch.setattr(walk_plan.ForwardEstimate, "most_versions", lambda _, schedule, __: schedule.groups)
    groups: list[int] = []
    init = score_walk._ScoreWalk.__init__
    monkeypatch.setattr(
        score_walk._ScoreWalk, "__init__", lambda walk, *given: (groups.append(given[4]), init(walk, *given))[1]
    )
    assert_same(run(jobs(F32), **how, stream=True, out=tmp_path / "out"), live)
    assert list(map(len, walks)) == [2, 2, 2, 2]
    assert groups == [0, 1, 0, 1]


def test_limits_of_memory_choose_the_batch(
    jobs: Jobs, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    schedules: list[Schedule] = []
    init = score_walk._ScoreWalk.__init__
    monkeypatch.setattr(
        score_walk._ScoreWalk, "__init__", lambda walk, *given: (schedules.append(given[3]), init(walk, *given))[1]
    )
    monkeypatch.setattr(
        walk_plan.ForwardEstimate, "memory", lambda _, schedule: ({"all": schedule.batch_size << 50}, None)
    )
    job = jobs(F32)
    how: dict[str, Any] = {"rule": "tv", "lams": [1], "stream": True}
    found = run(job, **how, out=tmp_path / "out", batch_size=4, memory=5 << 49, progress=True)
    assert schedules == [Schedule(2)] and found.settings["batch_size"] == 2
    assert "schedule: batches of 2, one walk forward for 2 versions of the weights" in capfd.readouterr().err
    with pytest.raises(InputError, match=r"memory of 1 MB cannot hold one part of the model"):
        run(job, **how, out=tmp_path / "small", memory=1_000_000)
    assert not (tmp_path / "small").exists()


def test_what_a_first_walk_tries() -> None:
    assert coarse([4, -1, 0.5, 1, 2]) == [-1, 1, 4]
    assert coarse([3]) == []
    assert coarse([3, 1, 2]) == [2]


@pytest.mark.parametrize(
    ("curves", "reading", "forward", "most", "expected"),
    [
        (1, 10.0, 10.0, 100, False),  # saves one pass of four, for one more reading
        (1, 9.0, 10.0, 100, True),
        (2, 19.0, 10.0, 100, True),
        (2, 21.0, 10.0, 100, False),
        (2, 1000.0, 1.0, 5, True),  # two walks at least anyway
        (1, math.nan, math.nan, 100, False),
    ],
)
def test_whether_a_first_walk_pays(curves: int, reading: float, forward: float, most: int, expected: bool) -> None:
    assert pays(curves, [1, 2, 3, 4], reading, forward, most) == expected


# What is not finite, and what is refused.


def test_a_setting_that_is_not_finite(jobs: Jobs, tmp_path: Path) -> None:
    """It is named, and the others go on."""
    job = jobs(F16)
    how: dict[str, Any] = {"rule": "tv", "stream": True, "dtype": F32, "max_retain_increase": 50}
    expected = run(job, **how, lams=[1, 2], out=tmp_path / "expected")
    found = run(job, **how, lams=[1, 2, 1e9], out=tmp_path / "out")
    assert list(map(plain, found.rows[:3])) == list(map(plain, expected.rows))
    lost = found.rows[3]
    numbers = (lost.forget_loss, lost.retain_loss, lost.forget, lost.retain, *lost.scores.values())
    assert all(map(math.isnan, numbers)) and not lost.skipped
    (note,) = (note for note in found.notes if "1e+09" in note)
    assert re.match(
        r"warning: tv, lambda 1e\+09: tensor model\.\S+: the result would hold NaN or infinite values", note
    )
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert content["rows"][3]["forget_loss"] is None and content["rows"][3]["scores"]["forget_loss"] is None
    assert math.isnan(Sweep.read(tmp_path / "out" / "sweep.json").rows[3].scores["forget_loss"])


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ({"out": None}, "stream needs out: importances"),
        ({"metric": "Q_A_ROUGE"}, "metric Q_A_ROUGE needs answers that the model generates.*take another metric"),
        ({"threads": 0}, "threads is 0; it must be at least 1"),
        ({"also": "retain.jsonl"}, r"also has .*retain\.jsonl: its name, retain, is that of the retain data"),
        ({"also": ["a.jsonl", "b/a.csv"]}, r"also has .*a\.csv: its name, a, two files have"),
        ({"also": "gone.jsonl"}, r"gone\.jsonl: cannot be read"),
        ({"lams": None}, "give lams, or a bound up to which to search"),
        ({"lams": "1,2"}, r"lams\[0\] is '1,2', not a number"),
        ({"lams": [None]}, r"lams\[0\] is None, not a number"),
        ({"in_place": True}, "in_place needs select, which chooses what is written"),
        ({"in_place": True, "checkpoint": "made"}, "give either checkpoint, a directory to make, or in_place"),
        ({"target_retain_loss": 0.1}, "the model as it is, at lambda 0, cannot be chosen against"),
        ({"stream": False, "memory": 1 << 30}, "memory is for streamed runs; give stream too"),
        ({"stream": False, "device_memory": 1 << 30}, "device_memory is for streamed runs"),
    ],
)
def test_refusals(
    chosen: dict[str, Any], reason: str, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "estimate_on", None)  # before the first gradient
    for name, rows in (("retain.jsonl", RETAIN), ("a.jsonl", FORGET)):
        write_lines(tmp_path / name, rows)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.csv").write_text("question,answer\na,b\n")
    before = fingerprint(tmp_path)
    settings: dict[str, Any] = {"rule": "fisher", "lams": [1], "stream": True, "out": "out"}
    with pytest.raises(InputError, match=reason):
        run(jobs(F32), **settings | chosen)
    assert fingerprint(tmp_path) == before


# The command.


def test_the_command_that_is_printed(jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is for the same memory, and makes what was scored."""
    job = jobs(F32)
    more = ["--mus", "1,10", "--lams", "4,30", "--target-retain-loss", 1000, "--batch-size", 3]
    assert cli.main(arguments_of(job, "--stream", *more, "--out", tmp_path / "out")) == 0
    lines = capsys.readouterr().out.splitlines()
    command = shlex.split(lines[lines.index("Write it with:") + 1])
    assert command[:2] == ["perta", "unlearn"] and "--stream" in command
    command[command.index("DIR")] = str(tmp_path / "made")
    assert cli.main(command[1:]) == 0
    best = Sweep.read(tmp_path / "out" / "sweep.json").best
    assert best is not None
    result = evaluate(tmp_path / "made", forget=job.forget, stream=True, batch_size=3, progress=False)
    assert result["forget_loss"] == best.forget_loss


def test_the_command_that_is_printed_for_a_negative_strength_with_an_exponent(
    jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """-1e+30 as a word of its own would be taken for an option."""
    job = jobs(F32)
    more = ["--rule", "tv", "--lams=-1e+30", "--max-retain-rise", 5, "--stream", "--out", tmp_path / "out"]
    assert cli.main(arguments_of(job, *more)) == 0
    lines = capsys.readouterr().out.splitlines()
    command = shlex.split(lines[lines.index("Write it with:") + 1])
    command[command.index("DIR")] = str(tmp_path / "made")
    assert cli.main(command[1:]) == 0


def arguments_of(job: Job, *more: object) -> list[str]:
    model, base, tuned = job.checkpoints
    paths = ["--model", model, "--base", base, "--tuned", tuned, "--forget", job.forget, "--retain", job.retain]
    return [str(each) for each in ["sweep", *paths, *more]]


def test_the_command(jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = jobs(F32)
    also = [write_lines(tmp_path / f"{name}.jsonl", AUTHORS) for name in ("one", "two")]
    more = ["--rule", "tv", "--lams", "1,2", "--also", *also, "--out", tmp_path / "out", "--threads", 2]
    assert cli.main(arguments_of(job, "--stream", *more)) == 0
    assert "one loss" in capsys.readouterr().out
    assert Sweep.read(tmp_path / "out" / "sweep.json").settings["stream"] is True
    assert cli.main(arguments_of(job, *more, "--overwrite", "--memory", "1GiB")) == 2
    assert "--memory is for streamed runs; add --stream" in capsys.readouterr().err


def test_what_it_would_take(jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = jobs(F32)
    before = fingerprint(tmp_path)
    rules = ["--rules", "fisher,preconditioned", "--mus", "1,10", "--lams", "1,2,4", "--gold", job.tuned]
    bound = ["--max-retain-increase", "5", "--out", tmp_path / "out"]
    assert cli.main(arguments_of(job, "--stream", "--dry-run", *rules, *bound)) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line.endswith(":")]
    assert heads == [
        "the gold model:",
        "forget importance, grad:",
        "retain importance, grad:",
        "rule preconditioned, for each of 2 mu:",
        "10 settings:",
    ]
    assert fingerprint(tmp_path) == before
    bound = ["--target-retain-loss", "90", "--out", tmp_path / "out"]
    assert cli.main(arguments_of(job, "--stream", "--dry-run", "--rule", "tv", "--lams", "1", *bound)) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line.endswith(":")]
    assert heads == ["the model as it is, which may break the bound:", "2 settings:"]
    assert cli.main(arguments_of(job, "--dry-run", *rules, *bound)) == 2


def test_a_dry_run_looks_whether_the_results_have_a_place(
    jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, taken = jobs(F32), tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    bound = ["--rule", "tv", "--lams", "1", "--max-retain-rise", "5"]
    for places in (["--out", taken], ["--out", tmp_path / "out", "--checkpoint", taken]):
        assert cli.main(arguments_of(job, "--stream", "--dry-run", *bound, *places)) == 2
        assert f"perta: error: {taken}: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
