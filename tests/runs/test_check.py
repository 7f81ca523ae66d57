"""The check of a run: what it measures, what it says, and what happens if it cannot be done."""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from perta_fast import InputError, Report, apply, estimate_importance, evaluate, resume, unlearn, verify
from perta_fast.cli import main
from perta_fast.data.batches import Batch
from perta_fast.data.rows import evenly_spread, load_rows
from perta_fast.data.samples import encode, prompt_of
from perta_fast.errors import Interrupted
from perta_fast.models import loading
from perta_fast.models.losses import per_sample_losses
from perta_fast.records.check import Check, CheckedData, Measured
from perta_fast.runs import check_result, checked_rows
from perta_fast.runs.check_result import PHASE
from perta_fast.runs.checked_rows import ROWS
from perta_fast.subtraction import in_place, to_directory
from perta_fast.tuning.run import FILE_NAME
from tests.support.checked_runs import stop_in_the_check, watch_loads
from tests.support.checkpoints import fingerprint
from tests.support.models import FORGET, RETAIN, Job, llama, tokenizer, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")
ROLES = ("forget", "retain")


def run(job: Job, out: Path | None = None, **settings: Any) -> Report:
    data = {"forget": job.forget, "retain": job.retain, "lam": 1.0} | settings
    return unlearn(*job.checkpoints, out=out, progress=False, **{"rule": "fisher"} | data)


def losses(directory: Path, job: Job) -> dict[str, float]:
    found = evaluate(directory, forget=job.forget, retain=job.retain, metrics=["*_loss"], progress=False)
    return {role: found[f"{role}_loss"] for role in ROLES}


def checked(report: Report) -> Check:
    assert report.check is not None
    return report.check


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """theta_full knows all answers by heart, theta_f the forget rows; base knows none."""
    folder = tmp_path_factory.mktemp("learnt")
    words = tokenizer()
    lines = {"forget": FORGET, "retain": RETAIN}
    rows = {role: load_rows(write_lines(folder / f"{role}.jsonl", lines[role])) for role in ROLES}
    for name, roles in (("base", ()), ("model", ROLES), ("tuned", ("forget",))):
        module = llama(0)
        if samples := encode([row for role in roles for row in rows[role]], words, 128):
            optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
            for _ in range(200):
                optimizer.zero_grad()
                per_sample_losses(module, Batch.of(samples)).mean().backward()
                optimizer.step()
        module.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return Job(folder / "model", folder / "base", folder / "tuned", folder / "forget.jsonl", folder / "retain.jsonl")


# What it measures.


@pytest.mark.parametrize("settings", [{}, {"at": "model"}, {"rule": "tv", "lam": 0.5}, {"rule": "empirical-fisher"}])
def test_the_losses_are_those_of_an_evaluation(settings: dict[str, Any], job: Job, tmp_path: Path) -> None:
    check = checked(run(job, tmp_path / "out", **settings))
    before, after = losses(job.model, job), losses(tmp_path / "out", job)
    for role, rows in (("forget", FORGET), ("retain", RETAIN)):
        data = check.data[role]
        assert (data.rows, data.total, data.answers) == (len(rows), len(rows), len(rows))
        assert data.before.loss == pytest.approx(before[role], rel=1e-6)
        assert data.after is not None and data.after.loss == pytest.approx(after[role], rel=1e-6)
    assert check.base == pytest.approx(losses(job.base, job), rel=1e-6)
    assert check.tuned == pytest.approx(losses(job.tuned, job), rel=2e-3)  # rounded to bfloat16 on another way


def test_in_place(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    before = losses(job.model, job)
    report = run(job, in_place=True, lam=3.0)
    data, after = checked(report).data, losses(job.model, job)
    for role in ROLES:
        measured = data[role].after
        assert data[role].before.loss == pytest.approx(before[role], rel=1e-6)
        assert measured is not None and measured.loss == pytest.approx(after[role], rel=1e-6)
    assert Report.load(job.model) == report
    assert not verify(job.model, progress=False).problems


def greedy(directory: Path, data: Path) -> int:
    """How many answers greedy decoding gives, to the end."""
    model, words = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    exact = 0
    for sample in encode(load_rows(data), words, 128):
        prompt = prompt_of(sample)
        answer = sample.input_ids[len(prompt) :]
        ids = torch.tensor([prompt])
        found = model.generate(ids, do_sample=False, max_new_tokens=len(answer), attention_mask=torch.ones_like(ids))
        exact += tuple(found[0, len(prompt) :].tolist()) == answer
    return exact


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_exact_answers_are_those_that_are_generated(lam: float, learnt: Job, tmp_path: Path) -> None:
    data = checked(run(learnt, tmp_path / "out", rule="tv", lam=lam, allow_zero=True)).data
    for role in ROLES:
        after = data[role].after
        assert after is not None
        assert data[role].before.exact == greedy(learnt.model, getattr(learnt, role)) > 0
        assert after.exact == greedy(tmp_path / "out", getattr(learnt, role))


def test_rows_of_text_have_a_loss_alone(job: Job, tmp_path: Path) -> None:
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "a river by a town"}, FORGET[0], {"text": "a book"}])
    report = run(job, tmp_path / "out", forget=texts)
    assert checked(report).data["forget"].answers == 1
    only = run(job, tmp_path / "only", retain=write_lines(tmp_path / "only.jsonl", [{"text": "a river by a town"}]))
    assert checked(only).data["retain"].answers == 0
    assert "answers" not in checked(only).data["retain"].in_words("retain")


def test_a_spread_sample_of_many_rows(job: Job, tmp_path: Path) -> None:
    assert evenly_spread(5, ROWS) == [0, 1, 2, 3, 4]
    chosen = evenly_spread(400, ROWS)
    assert len(chosen) == ROWS and chosen == sorted(set(chosen)) and chosen[0] == 0 and chosen[-1] >= 399 - 400 // ROWS
    many = write_lines(tmp_path / "many.jsonl", [FORGET[k % 5] for k in range(2 * ROWS + 1)])
    report = run(job, tmp_path / "out", forget=many)
    data = checked(report).data["forget"]
    assert (data.rows, data.total) == (ROWS, 2 * ROWS + 1)
    assert f"measured on {ROWS} of {2 * ROWS + 1} forget rows and 7 of 7 retain rows" in report.summary()


def test_the_bytes_of_the_result_are_the_same(job: Job, tmp_path: Path) -> None:
    for name, check in (("with", True), ("without", False)):
        run(job, tmp_path / name, check=check)
    names = [path.name for path in (tmp_path / "with").iterdir()]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "without").iterdir())
    for name in names:
        if name not in ("perta_report.json", "perta_files.b3", "README.md"):
            assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name


# What it says.


def test_the_report_is_whole(job: Job, tmp_path: Path) -> None:
    report = run(job, tmp_path / "out")
    assert Report.load(tmp_path / "out") == report
    assert not verify(tmp_path / "out", full=True, progress=False).problems
    assert checked(report).verdict() in report.summary()
    assert checked(report).verdict() in (tmp_path / "out" / "README.md").read_text()
    assert report.phases[PHASE]["seconds"] > 0
    for row in FORGET + RETAIN:
        assert not any(text in (tmp_path / "out" / "perta_report.json").read_text() for text in row.values())


def test_forgotten_and_kept(learnt: Job, tmp_path: Path) -> None:
    report = run(learnt, tmp_path / "out", rule="tv", lam=1.0)
    data = checked(report).data
    assert data["forget"].before.exact == 5 and data["retain"].before.exact == 7
    assert checked(report).verdict().startswith("Forgotten: the loss on the forget rows rose from ")
    assert "of 5 answers are exact (5 before)" in checked(report).verdict()


def test_nothing_was_forgotten(learnt: Job, tmp_path: Path) -> None:
    report = run(learnt, tmp_path / "out", lam=1e-3)
    assert checked(report).verdict().startswith("Not forgotten: the loss on the forget rows stayed at ")
    assert [warning.split(":")[0] for warning in report.warnings] == ["nothing was forgotten"]


def test_no_larger_strength_is_advised_where_none_helps(learnt: Job, tmp_path: Path) -> None:
    base = Job(learnt.model, learnt.base, learnt.base, learnt.forget, learnt.retain)
    copied = run(base, tmp_path / "copy", rule="tv", allow_zero=True)
    assert [warning.split(":")[0] for warning in copied.warnings] == ["no value of the model has changed"]
    exchanged = run(learnt, tmp_path / "out", forget=learnt.retain, retain=learnt.forget, lam=1e-3)
    assert exchanged.warnings[1].startswith("nothing was forgotten")
    assert not any("larger lambda" in warning for warning in exchanged.warnings)


def test_much_was_lost(learnt: Job, tmp_path: Path) -> None:
    report = run(learnt, tmp_path / "out", rule="tv", lam=8.0)
    assert "Lost: the loss on the retain rows rose" in checked(report).verdict()
    assert [warning.split(":")[0] for warning in report.warnings] == ["much was lost"]


def test_base_and_tuned_exchanged(learnt: Job, tmp_path: Path) -> None:
    exchanged = Job(learnt.model, learnt.tuned, learnt.base, learnt.forget, learnt.retain)
    for name, settings in (("in memory", {}), ("tv", {"rule": "tv"}), ("model", {"at": "model"})):
        report = run(exchanged, tmp_path / name, **settings)
        assert report.warnings[0].endswith("were base and tuned exchanged?")


@pytest.mark.parametrize("settings", [{}, {"rule": "tv"}, {"at": "model"}])
def test_forget_and_retain_exchanged(settings: dict[str, Any], learnt: Job, tmp_path: Path) -> None:
    report = run(learnt, tmp_path / "out", forget=learnt.retain, retain=learnt.forget, **settings)
    assert "were forget and retain exchanged?" in report.warnings[0]


def test_importances_exchanged(tmp_path: Path) -> None:
    """What tuned has learnt is in the record of ``perta tune``."""
    job = write_job(tmp_path)
    kept = [tmp_path / "kept" / role for role in ROLES]
    for role, directory in zip(ROLES, kept, strict=True):
        estimate_importance(job.base, getattr(job, role), out=directory, progress=False)
    said = f"{job.tuned} was tuned on the data of the retain importance; were forget and retain importance exchanged?"
    digest = blake3(job.forget.read_bytes()).hexdigest()
    for number, (record, expected) in enumerate((({"data": {"blake3": digest}}, True), ({"data": 3}, False))):
        (job.tuned / FILE_NAME).write_text(json.dumps(record))
        for name, pair in (("right", kept), ("exchanged", kept[::-1])):
            out = tmp_path / f"{name} {number}"
            report = apply(*job.checkpoints, *pair, lam=1.0, out=out, progress=False)
            assert (said in report.warnings) == (expected and name == "exchanged")


def test_a_right_run_has_no_warning(learnt: Job, tmp_path: Path) -> None:
    for name, settings in (("in memory", {}), ("model", {"at": "model"}), ("tv", {"rule": "tv", "lam": 0.25})):
        warnings = run(learnt, tmp_path / name, **settings).warnings
        assert not [text for text in warnings if "exchanged" in text], name


def of(
    role: str, before: float | None, after: float | None, exact: tuple[int, int] = (0, 0), answers: int = 0
) -> CheckedData:
    return CheckedData(32, 32, answers, Measured(before, exact[0]), Measured(after, exact[1]))


def test_the_verdict() -> None:
    check = Check.begun("perta eval")
    check.data = {"forget": of("forget", 0.08, 3.1, (28, 0), 32), "retain": of("retain", 0.1, 0.134, (31, 30), 32)}
    assert check.lines() == [
        "Forgotten: the loss on the forget rows rose from 0.08 to 3.10, and 0 of 32 answers are exact (28 before). "
        "Kept: the loss on the retain rows rose from 0.10 to 0.13, and 30 of 32 answers are exact (31 before)."
    ]
    check.data["forget"] = of("forget", 0.08, 0.3, (28, 20), 32)
    assert check.verdict().startswith("Forgotten in part: ")
    check.data["retain"] = of("retain", 0.1, None)
    assert check.verdict().endswith("Lost: the loss on the retain rows is not finite (0.10 before).")
    assert "much was lost" in check.late_warnings()[0]


@pytest.mark.parametrize(("after", "now"), [(None, "not finite"), (3.1, "3.10"), (0.05, "0.05")])
def test_nothing_is_known_of_a_model_without_finite_losses(after: float | None, now: str) -> None:
    check = Check.begun("perta eval")
    check.data = {"forget": of("forget", None, after, (4, 0), 32), "retain": of("retain", None, after)}
    assert check.verdict() == (
        f"Not known if forgotten: the loss on the forget rows was not finite before, and is {now}, and 0 of 32 answers "
        f"are exact (4 before). Not known if kept: the loss on the retain rows was not finite before, and is {now}."
    )
    assert check.late_warnings() == []


def test_a_model_that_is_not_finite(tmp_path: Path) -> None:
    """In summary, card and notebook alike, nothing is said to be forgotten, or not to be."""
    job = write_job(tmp_path, torch.float32)
    shard = next(path for path in job.model.glob("*.safetensors") if "lm_head.weight" in load_file(path))
    tensors = load_file(shard)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].sign() * 3e38  # finite, but not what comes of it
    save_file(tensors, shard, {"format": "pt"})
    report = run(job, tmp_path / "out", rule="tv")
    said = "Not known if forgotten: the loss on the forget rows was not finite before, and is not finite"
    for text in (report.summary(), (tmp_path / "out" / "README.md").read_text(), report._repr_html_()):
        assert said in text and "Not known if kept: " in text
    assert not [warning for warning in report.warnings if "forgotten" in warning]


# Where nothing is measured.


def test_without_a_check(job: Job, tmp_path: Path) -> None:
    report = run(job, tmp_path / "out", check=False)
    assert report.check is None and PHASE not in report.phases
    assert "orgotten" not in report.summary() and report.recipe["check"] is False


def test_a_rule_without_data_has_none(job: Job, tmp_path: Path) -> None:
    assert run(job, tmp_path / "out", rule="tv", forget=None, retain=None).check is None


@pytest.mark.parametrize("in_place", [False, True])
def test_a_streamed_run_says_how(in_place: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path)
    report = run(job, None if in_place else tmp_path / "out", in_place=in_place, stream=True, memory=1 << 34)
    line = next(line for line in report.summary().splitlines() if "not checked" in line)
    assert "the run was streamed" in line and line.endswith(f" --stream --memory {1 << 34}")
    assert main(shlex.split(line.partition("To measure it: ")[2])[1:]) == 0
    assert "forget_loss" in capsys.readouterr().out


def test_the_command_has_what_the_run_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path)
    renamed = [{"ask": row["question"], "say": row["answer"]} for row in FORGET]
    data = write_lines(tmp_path / "a file.jsonl", renamed)
    settings: dict[str, Any] = {"fields": {"question": "ask", "answer": "say"}, "max_length": 30}
    report = run(job, tmp_path / "out", forget=data, retain=data, stream=True, **settings)
    assert main([*shlex.split(checked(report).command)[1:], "--metrics", "*_loss"]) == 0
    assert "retain_loss" in capsys.readouterr().out


def test_a_model_that_cannot_be_run_is_still_subtracted_from(tmp_path: Path) -> None:
    """Rule tv needs no tokenizer."""
    job = write_job(tmp_path)
    (job.model / "tokenizer.json").unlink()
    report = run(job, tmp_path / "out", rule="tv")
    assert "not checked what was forgotten and kept: " in report.summary()
    assert Report.load(tmp_path / "out") == report


def test_memory_that_is_too_small(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_rows, "available_bytes", lambda: 1000)
    report = run(job, tmp_path / "out", rule="tv")
    assert "only 1 kB of the memory are free" in checked(report).left_out


def test_one_model_at_a_time(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is loaded for the check, the model before it has gone."""
    alive = watch_loads(monkeypatch)
    for at, count in (("base", 3), ("model", 3)):
        alive.clear()
        run(job, tmp_path / at, at=at)
        assert len(alive) == count


def test_a_base_that_is_the_model_is_loaded_once(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = loading.load_subject
    monkeypatch.setattr(loading, "load_subject", lambda *a, **k: loads.append(a[0]) or load(*a, **k))
    run(Job(job.base, job.base, job.tuned, job.forget, job.retain), tmp_path / "out")
    assert list(map(str, loads)) == [str(job.base), str(tmp_path / "out")]


# A run that is stopped.


class Stop(Exception):
    pass


def test_interrupted_in_the_check(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_in_the_check(monkeypatch)
    with pytest.raises(Interrupted, match="is complete, and only the check") as caught:
        run(job, tmp_path / "out")
    assert "perta eval --model" in str(caught.value)
    assert not verify(tmp_path / "out", full=True, progress=False).problems
    report = Report.load(tmp_path / "out")
    assert not checked(report).is_whole
    assert "not checked what was forgotten and kept: the run was stopped before" in report.summary()


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("rule", ["tv", "fisher"])
def test_a_resumed_run_is_checked(rule: str, changed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = write_job(tmp_path)
    whole = run(job, tmp_path / "whole", rule=rule)
    with monkeypatch.context() as patched:
        patched.setattr(to_directory, "describe_output", interrupt)
        with pytest.raises(Interrupted):
            run(job, tmp_path / "out", rule=rule)
    if changed:
        job.forget.write_text(json.dumps(FORGET[0]) + "\n")
    report = resume(tmp_path / "out", progress=False)
    assert isinstance(report, Report)
    if changed:
        assert "has changed since the run began" in checked(report).left_out
    else:
        assert checked(report).data == checked(whole).data and report.warnings == whole.warnings
    assert Report.load(tmp_path / "out") == report
    assert not verify(tmp_path / "out", full=True, progress=False).problems


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_resumed_run_in_place_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = write_job(tmp_path)
    whole = run(job, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(in_place, "describe_output", interrupt)
        with pytest.raises(Interrupted):
            run(job, in_place=True)
    report = resume(job.model, progress=False)
    assert isinstance(report, Report)
    assert checked(report).data == checked(whole).data
    assert not verify(job.model, progress=False).problems


class Killed(BaseException):
    """In place of a signal that ends the process."""


@pytest.mark.parametrize("saved", [False, True])
def test_a_run_in_place_that_was_killed_in_its_check_is_not_done_twice(
    saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_job(tmp_path)

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    for _ in range(2):  # the second time while it is resumed
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(check_result, "clear_leftover" if saved else "_measure_result", kill)
            resume(job.model, progress=False) if (job.model / ".perta-journal").exists() else run(job, in_place=True)
        if saved:
            break
    before = fingerprint(job.model)
    with pytest.raises(InputError, match=rf"change it a second time. Do these steps with: perta resume {job.model}$"):
        run(job, in_place=True)
    assert fingerprint(job.model) == before
    report = resume(job.model, progress=False)
    assert isinstance(report, Report) and checked(report).is_whole
    assert not (job.model / ".perta-journal").exists()
    assert not verify(job.model, progress=False).problems


def test_a_model_that_was_renamed_after_its_check_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies under the old name now is another model."""
    job = write_job(tmp_path)
    backup = Path(shutil.copytree(job.model, tmp_path / "backup"))
    with monkeypatch.context() as patched:
        patched.setattr(check_result, "_measure_result", interrupt)
        with pytest.raises(Interrupted):
            run(job, in_place=True)
    renamed = job.model.rename(tmp_path / "unlearned")
    backup.rename(job.model)
    before = fingerprint(job.model)
    report = resume(renamed, progress=False)
    assert isinstance(report, Report) and checked(report).is_whole
    assert fingerprint(job.model) == before
    assert checked(Report.load(renamed)).is_whole and not (renamed / ".perta-journal").exists()


def test_a_run_in_place_that_was_interrupted_in_its_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = write_job(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(check_result, "_measure_result", interrupt)
        with pytest.raises(Interrupted, match=f"only the check .* is not done. Do it with: perta resume {job.model}$"):
            run(job, in_place=True)
    report = resume(job.model, progress=False)
    assert isinstance(report, Report) and checked(report).is_whole
    run(job, in_place=True)  # another run may follow


def test_a_pipe_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that came through a pipe is gone when the run is resumed."""
    job = write_job(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(to_directory, "describe_output", interrupt)
        with pytest.raises(Interrupted):
            run(job, tmp_path / "out")
    job.forget.unlink()
    os.mkfifo(job.forget)
    report = resume(tmp_path / "out", progress=False)
    assert isinstance(report, Report) and "is gone" in checked(report).left_out


def test_no_check_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path)
    names = ("model", "base", "tuned", "forget", "retain")
    arguments = [word for name in names for word in (f"--{name}", str(getattr(job, name)))]
    for name, more in (("with", []), ("without", ["--no-check"])):
        assert main(["unlearn", "--rule=fisher", *arguments, "--lam", "1", "--out", str(tmp_path / name), *more]) == 0
        assert ("orgotten: the loss" in capsys.readouterr().out) == (name == "with")
