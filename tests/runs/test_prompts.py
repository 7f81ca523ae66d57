"""System prompt and date in every command that puts rows through a chat template: the same numbers, and on record."""

import datetime
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import perta_fast as pf
from perta_fast import Importance, InputError, apply, cli, estimate_importance, resume, sweep, unlearn, verify
from perta_fast.data import chat
from perta_fast.data.rows import load_rows
from perta_fast.data.samples import Sample, encode
from perta_fast.models import greedy_answers
from perta_fast.reporting.answers import answer_prompts, read_prompts
from perta_fast.runs.inspect import inspect
from perta_fast.scoring.live_model import ScoredModel
from perta_fast.streaming.write_behind import WriteBehind
from perta_fast.subtraction import to_directory
from tests.distributed.launch import perta_on_ranks
from tests.support.checkpoints import read_checkpoint, same_bytes
from tests.support.models import FORGET, Job, llama, taken, tokenizer, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

# Asks for a date as Llama-3.2's template does, and has a system turn always.
TEMPLATE = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{ date_string + '\n' }}{% for m in messages %}{{ m.role + ': ' + m.content + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE
PROMPT = 'Be "brief",\nplease.'
TOLD = {"system_prompt": PROMPT, "date_string": "April 10, 2025"}
MONDAY, TUESDAY = datetime.date(2026, 3, 2), datetime.date(2026, 3, 3)


def write_templated(folder: Path, template: str = TEMPLATE, **changes: Any) -> Job:
    job = write_job(folder, **changes)
    for path in job.checkpoints:
        tokenizer(template).save_pretrained(path)
    return job


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return write_templated(tmp_path_factory.mktemp("templated"))


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime.date], None]:
    """Changes the date of the machine."""

    def change(day: datetime.date) -> None:
        monkeypatch.setattr(chat, "_clock", lambda: datetime.datetime.combine(day, datetime.time(9)))

    change(MONDAY)
    return change


def samples(path: Path, system: str | None, date: str) -> list[Sample]:
    """The rows as the model reads them, made with transformers alone."""
    words = tokenizer("{% set date_string = '" + date + "' %}" + TEMPLATE)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    before = [] if system is None else [{"role": "system", "content": system}]
    made = []
    for row in rows:
        messages = [*before, {"role": "user", "content": row["question"]}]
        prompt = words.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer = [*messages, {"role": "assistant", "content": row["answer"]}]
        whole = words.apply_chat_template(answer, return_dict=False)
        assert whole[: len(prompt)] == prompt
        made.append(Sample(tuple(whole), (-100,) * len(prompt) + tuple(whole[len(prompt) :])))
    return made


def same(found: Importance, expected: Importance) -> bool:
    return found.tensors.keys() == expected.tensors.keys() and all(
        same_bytes(found.tensors[name], expected.tensors[name]) for name in expected.tensors
    )


def options(told: dict[str, str]) -> list[str]:
    return [f"--{name.replace('_', '-')}={text}" for name, text in told.items()]


def test_importance(job: Job, tmp_path: Path, on: Callable[[datetime.date], None], capsys: Any) -> None:
    expected = estimate_importance(job.base, samples(job.forget, PROMPT, TOLD["date_string"]), progress=False)
    here = ["importance", "--model", str(job.base), "--data", str(job.forget), "--quiet", "--out"]
    assert cli.main([*here[:-2], "--out", str(tmp_path / "whole"), *options(TOLD)]) == 0
    assert r"""system prompt 'Be "brief",\nplease.', date April 10, 2025""" in capsys.readouterr().out
    assert cli.main([*here, str(tmp_path / "streamed"), *options(TOLD), "--stream"]) == 0
    found = [Importance.load(tmp_path / name) for name in ("whole", "streamed")]
    model = LlamaForCausalLM.from_pretrained(job.base, dtype=taken(torch.bfloat16))
    found.append(estimate_importance(model, FORGET, tokenizer=tokenizer(TEMPLATE), progress=False, **TOLD))
    for importance in found:
        assert importance.metadata.told == chat.Told(True, PROMPT, TOLD["date_string"], TOLD["date_string"])
        assert same(importance, found[0])
    assert same(found[0], expected)
    text = inspect(tmp_path / "whole").text()
    assert r"  system_prompt: Be \"brief\",\nplease.".replace(r"\"", '"') in text
    assert "  date: April 10, 2025" in text


def test_the_clock_is_that_of_the_start(job: Job, tmp_path: Path, on: Callable[[datetime.date], None]) -> None:
    first = estimate_importance(job.base, job.forget, out=tmp_path / "first", progress=False)
    assert first.metadata.told == chat.Told(True, None, None, "02 Mar 2026")
    assert same(first, estimate_importance(job.base, samples(job.forget, None, "02 Mar 2026"), progress=False))
    on(TUESDAY)
    assert not same(first, estimate_importance(job.base, job.forget, progress=False))
    again = estimate_importance(job.base, job.forget, progress=False, date_string="02 Mar 2026")
    assert same(first, again)


def test_a_template_without_a_clock_has_no_date_on_record(tmp_path: Path, on: Callable[[datetime.date], None]) -> None:
    job = write_templated(tmp_path, "{% for m in messages %}{{ m.role + m.content + '<eos>' }}{% endfor %}")
    for day, settings in ((MONDAY, {}), (TUESDAY, {}), (TUESDAY, {"date_string": "2025-04-10"})):
        on(day)
        found = estimate_importance(job.base, job.forget, progress=False, **settings)
        assert found.metadata.told == chat.Told(chat_template=True)
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "No template."}])
    assert estimate_importance(job.base, texts, progress=False).metadata.told == chat.Told()


@pytest.mark.parametrize("how", [{}, {"stream": True}, {"in_place": True}, {"stream": True, "in_place": True}], ids=str)
def test_unlearn(how: dict[str, bool], job: Job, tmp_path: Path, on: Callable[[datetime.date], None]) -> None:
    if "in_place" in how:
        job = write_templated(tmp_path)
    out = {} if "in_place" in how else {"out": tmp_path / "out"}
    report = unlearn(
        *job.checkpoints,
        job.forget,
        job.retain,
        **{"rule": "fisher"} | out,
        **how,
        lam=1.0,
        save_importance=tmp_path / "kept",
        progress=False,
        **TOLD,
    )
    for role, path in (("forget", job.forget), ("retain", job.retain)):
        expected = estimate_importance(job.base, samples(path, PROMPT, TOLD["date_string"]), progress=False)
        kept = Importance.load(tmp_path / "kept" / role)
        assert same(kept, expected)
        assert kept.metadata.told.system_prompt == report.importance[f"{role}_importance"]["system_prompt"] == PROMPT
    assert {name: report.settings[name] for name in (*TOLD, "date")} == TOLD | {"date": TOLD["date_string"]}
    assert report.recipe["system-prompt"] == PROMPT and report.recipe["date-string"] == TOLD["date_string"]
    line = r"""forget importance: system prompt 'Be "brief",\nplease.', date April 10, 2025"""
    directory = tmp_path / "out" if out else job.model
    assert (
        line in report.summary()
        and line in inspect(directory).text()
        and line in verify(directory, progress=False).summary()
    )


def test_a_recipe_repeats_the_prompts_on_another_day(
    job: Job, tmp_path: Path, on: Callable[[datetime.date], None]
) -> None:
    where = ["--model", job.model, "--base", job.base, "--tuned", job.tuned, "--forget", job.forget]
    first = [
        "unlearn",
        "--rule=fisher",
        *where,
        "--retain",
        job.retain,
        "--lam",
        1,
        "--out",
        tmp_path / "first",
        "--quiet",
    ]
    assert cli.main([*map(str, first), "--system-prompt", ""]) == 0
    on(TUESDAY)
    recipe = tmp_path / "first" / "perta_report.json"
    assert cli.main(["unlearn", "--recipe", str(recipe), "--out", str(tmp_path / "again"), "--quiet"]) == 0
    one, other = (pf.Report.load(tmp_path / name) for name in ("first", "again"))
    assert one.settings["date"] == other.settings["date"] == "02 Mar 2026"
    assert one.settings["system_prompt"] == other.settings["system_prompt"] == ""
    weights, again = (read_checkpoint(tmp_path / name) for name in ("first", "again"))
    assert all(same_bytes(weights[name], again[name]) for name in weights)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {job.model}\nbase: {job.base}\ntuned: {job.tuned}\nforget: {job.forget}\nretain: {job.retain}\n"
        "lam: 1\nsystem-prompt: ''\ndate-string: 2026-03-02\n"
    )
    by_hand = ["--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "by hand"), "--quiet"]
    assert cli.main(["unlearn", "--rule=fisher", *by_hand]) == 0
    assert pf.Report.load(tmp_path / "by hand").settings["date_string"] == "2026-03-02"


@pytest.mark.parametrize("again", ["the same command", "resume"])
def test_a_streamed_run_that_is_resumed_on_another_day(
    again: str, job: Job, tmp_path: Path, on: Callable[[datetime.date], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path) -> object:
        return unlearn(
            *job.checkpoints,
            job.forget,
            job.retain,
            out=out,
            stream=True,
            batch_size=2,
            progress=False,
            lam=1.0,
            rule="fisher",
        )

    run(tmp_path / "whole")
    end_step, steps = WriteBehind.end_step, []

    def stopping(*arguments: Any, **settings: Any) -> None:
        end_step(*arguments, **settings)
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(WriteBehind, "end_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    on(TUESDAY)
    run(tmp_path / "out") if again == "the same command" else resume(tmp_path / "out", progress=False)
    expected, found = (read_checkpoint(tmp_path / name) for name in ("whole", "out"))
    assert all(same_bytes(found[name], expected[name]) for name in expected)
    report = pf.Report.load(tmp_path / "out")
    assert (report.resumed, report.settings["date"]) == (1, "02 Mar 2026")


@pytest.mark.parametrize("how", [{"lam": None, "max_retain_rise": 1e3, "check": False}, {"lam": 1.0}], ids=str)
@pytest.mark.parametrize("rule", ["tv", "preconditioned"])
def test_rules_without_gradients(
    rule: str, how: dict[str, Any], job: Job, tmp_path: Path, on: Callable[[datetime.date], None]
) -> None:
    """What the search, or else the check, has told is on record, and the recipe repeats it on another day."""
    data = (*job.checkpoints, job.forget, job.retain)
    given = unlearn(*data, out=tmp_path / "given", rule=rule, progress=False, **how, **TOLD)
    assert {name: given.settings[name] for name in (*TOLD, "date")} == TOLD | {"date": TOLD["date_string"]}
    assert given.recipe["system-prompt"] == PROMPT and given.recipe["date-string"] == TOLD["date_string"]
    first = unlearn(*data, out=tmp_path / "first", rule=rule, progress=False, **how)
    assert {name: first.settings[name] for name in (*TOLD, "date")} == dict.fromkeys(TOLD) | {"date": "02 Mar 2026"}
    on(TUESDAY)
    recipe = ["--recipe", str(tmp_path / "first" / "perta_report.json"), "--out", str(tmp_path / "again")]
    assert cli.main(["unlearn", *recipe, "--quiet"]) == 0
    again = pf.Report.load(tmp_path / "again")
    assert again.recipe["date-string"] == "02 Mar 2026"
    assert (again.check and again.check.data) == (first.check and first.check.data)


def test_a_date_that_rows_to_forget_alone_ask_for(
    job: Job, tmp_path: Path, on: Callable[[datetime.date], None]
) -> None:
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "No template."}])
    report = unlearn(*job.checkpoints, job.forget, texts, out=tmp_path / "out", lam=1.0, progress=False)
    assert report.settings["date"] == report.recipe["date-string"] == "02 Mar 2026"


@pytest.mark.parametrize(
    ("rule", "again"),
    [("tv", "resume"), ("tv", "the same command"), ("preconditioned", "resume"), ("fisher", "resume")],
)
def test_the_check_of_a_run_that_is_resumed_on_another_day(
    rule: str, again: str, tmp_path: Path, on: Callable[[datetime.date], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_templated(tmp_path, dtype=torch.float32)

    def run(out: Path) -> pf.Report:
        data = (*job.checkpoints, job.forget, job.retain)
        return unlearn(*data, out=out, rule=rule, max_retain_rise=0.01, system_prompt=PROMPT, progress=False)

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(to_directory, "describe_output", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    on(TUESDAY)
    report = run(tmp_path / "out") if again == "the same command" else resume(tmp_path / "out", progress=False)
    assert isinstance(report, pf.Report) and report.resumed == 1
    assert report.check is not None and whole.check is not None
    assert report.check.is_whole and report.check.data == whole.check.data
    assert report.settings["date"] == "02 Mar 2026"


BOUNDED = {"max_retain_rise": 1000.0}  # settings that may be skipped are scored one by one


def swept(job: Job, out: Path | None, **settings: Any) -> pf.Sweep:
    how = {"rule": ["fisher", "tv"], "lams": [1, 4], "batch_size": 4, "progress": False}
    return sweep(*job.checkpoints, job.forget, job.retain, out=out, **how | settings)


def scores(found: pf.Sweep) -> list[tuple[float, ...]]:
    return [(row.forget_loss, row.retain_loss, row.changed) for row in found.rows]


@pytest.mark.parametrize("again", ["the same command", "resume"])
@pytest.mark.parametrize("at", ["base", "model"])
def test_a_sweep_that_is_resumed_on_another_day(
    again: str, at: str, job: Job, tmp_path: Path, on: Callable[[datetime.date], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = swept(job, tmp_path / "whole", at=at, **BOUNDED)
    score = ScoredModel.score

    def stopping(model: ScoredModel, name: str) -> Any:
        if name == "fisher, lambda 1":
            raise KeyboardInterrupt
        return score(model, name)

    with monkeypatch.context() as patched:
        patched.setattr(ScoredModel, "score", stopping)
        with pytest.raises(KeyboardInterrupt):
            swept(job, tmp_path / "out", at=at, **BOUNDED)
    on(TUESDAY)
    found = (
        resume(tmp_path / "out", progress=False)
        if again == "resume"
        else swept(job, tmp_path / "out", at=at, **BOUNDED)
    )
    assert isinstance(found, pf.Sweep)
    assert scores(found) == scores(whole)
    assert found.settings["date"] == whole.settings["date"] != "03 Mar 2026"
    assert found.importance["grad"]["forget"].date == found.settings["date"]


def test_sweep(
    job: Job, tmp_path: Path, on: Callable[[datetime.date], None], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = swept(job, None, **TOLD)
    assert {name: plain.settings[name] for name in TOLD} == TOLD
    assert plain.notes == []
    metadata = plain.importance["grad"]["retain"]
    assert metadata.told == chat.Told(True, PROMPT, TOLD["date_string"], TOLD["date_string"])
    here = ["--model", job.model, "--base", job.base, "--tuned", job.tuned, "--forget", job.forget]
    words = ["sweep", *here, "--retain", job.retain, "--lams", 1, *options(TOLD)]
    assert cli.main([str(word) for word in words]) == 0
    assert r"""$'--system-prompt=Be "brief",\012please.' '--date-string=April 10, 2025'""" in capsys.readouterr().out
    assert cli.main([str(word) for word in words[:-2]] + ["--system-prompt=-x y"]) == 0
    printed = shlex.split(capsys.readouterr().out.splitlines()[-1].replace("--lam L", "--lam 1").replace("DIR", "out"))
    on(TUESDAY)
    monkeypatch.chdir(tmp_path)
    assert cli.main([*printed[1:], "--quiet"]) == 0
    report = pf.Report.load(tmp_path / "out")
    assert (report.settings["system_prompt"], report.settings["date"]) == ("-x y", "02 Mar 2026")
    on(MONDAY)  # importances that were estimated otherwise than the scores are taken
    for role in ("forget", "retain"):
        estimate_importance(job.base, getattr(job, role), out=tmp_path / role, progress=False)
    given = {f"{role}_importance": tmp_path / role for role in ("forget", "retain")}
    assert swept(job, None, **given, rule="fisher").notes == []
    notes = swept(job, None, **given, **TOLD, rule="fisher").notes
    assert len(notes) == 2
    assert notes[0].startswith("warning: forget importance estimated with date 02 Mar 2026, scores taken with system ")
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "No prompt."}])  # which no template tells anything
    assert swept(replace(job, forget=texts, retain=texts), None, **given, **TOLD, rule="fisher").notes == []


@pytest.mark.parametrize("again", ["the same command", "resume"])
def test_an_evaluation_that_is_resumed_on_another_day(
    again: str, job: Job, tmp_path: Path, on: Callable[[datetime.date], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path) -> object:
        settings = {"forget": job.forget, "retain": job.retain, "max_new_tokens": 2, "progress": False}
        return pf.evaluate(job.model, out=out, **settings)

    run(tmp_path / "whole.json")
    with monkeypatch.context() as patched:
        patched.setattr(greedy_answers, "greedy_answers", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out.json")
    on(TUESDAY)
    run(tmp_path / "out.json") if again == "the same command" else resume(tmp_path / "out.json", progress=False)
    whole, found = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "out.json"))
    assert found["metrics"] == whole["metrics"]
    assert found["settings"] == whole["settings"] and found["settings"]["date"] == "02 Mar 2026"


def stopping(*arguments: Any, **settings: Any) -> None:
    raise KeyboardInterrupt


def test_tune(job: Job, tmp_path: Path, on: Callable[[datetime.date], None]) -> None:
    words = ["tune", "--base", job.base, "--forget", job.forget, "--out", tmp_path / "tuned", "--epochs", 1, "--quiet"]
    assert cli.main([*map(str, words), *options(TOLD)]) == 0
    record = json.loads((tmp_path / "tuned" / "perta_tune.json").read_text())
    assert {name: record["settings"][name] for name in TOLD} == TOLD
    assert record["settings"]["date"] == TOLD["date_string"]
    here = write_lines(tmp_path / "prompted.jsonl", map(as_messages, FORGET))
    other = pf.tune(job.base, here, tmp_path / "other", epochs=1, progress=False, date_string=TOLD["date_string"])
    assert record["loss_before"] == other.loss_before and record["loss_after"] == other.loss_after
    assert other.settings["system_prompt"] is None
    by_clock = pf.tune(job.base, here, tmp_path / "by clock", epochs=1, progress=False)
    assert by_clock.settings["date"] == "02 Mar 2026"
    assert by_clock.loss_before != other.loss_before


def as_messages(row: dict[str, str]) -> dict[str, Any]:
    turns = [("system", PROMPT), ("user", row["question"]), ("assistant", row["answer"])]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_the_estimate_of_a_streamed_run_counts_the_prompt(job: Job, tmp_path: Path, capsys: Any) -> None:
    here = ["importance", "--model", str(job.base), "--data", str(job.forget), "--out", str(tmp_path / "out")]
    assert cli.main([*here, "--stream", "--dry-run", *options(TOLD)]) == 0
    tokens = sum(len(sample.input_ids) for sample in samples(job.forget, PROMPT, TOLD["date_string"]))
    assert f"5 given samples of {tokens} tokens" in capsys.readouterr().out


@pytest.fixture(scope="module")
def estimated(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes an importance, once for each way."""
    folder = tmp_path_factory.mktemp("estimated")

    def make(role: str, base: Path = job.base, **settings: str) -> Path:
        out = folder / f"{len(list(folder.iterdir()))}"
        return estimate_importance(base, getattr(job, role), out=out, progress=False, **settings).directory or out

    return make


def test_importances_of_two_system_prompts_are_refused(
    job: Job, estimated: Callable[..., Path], tmp_path: Path, on: Callable[[datetime.date], None]
) -> None:
    forget, retain = estimated("forget", system_prompt=PROMPT), estimated("retain")
    said = r"system prompt of the forget importance is 'Be \"brief\",\\nplease.', that of the retain importance none"
    with pytest.raises(InputError, match=said):
        apply(*job.checkpoints, forget, retain, out=tmp_path / "out", progress=False)
    with pytest.raises(InputError, match=said):
        swept(job, tmp_path / "out", forget_importance=forget, retain_importance=retain, rule="fisher")
    with pytest.raises(InputError, match=said):
        pf.apply_to_module_(llama(), job.base, job.tuned, forget, retain)
    with pytest.raises(InputError, match="is 'A', that of the retain importance 'B'"):
        apply(
            *job.checkpoints,
            estimated("forget", system_prompt="A"),
            estimated("retain", system_prompt="B"),
            out=tmp_path / "out",
            progress=False,
        )
    assert list(tmp_path.iterdir()) == []
    # What is not known, or has no prompt, fits every other.
    assert apply(
        *job.checkpoints, forget, estimated("retain", system_prompt=PROMPT), out=tmp_path / "a", progress=False
    )
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "No prompt."}])
    plain = estimate_importance(job.base, texts, out=tmp_path / "texts", progress=False).directory
    assert apply(*job.checkpoints, forget, plain, out=tmp_path / "b", progress=False).warnings == []


def test_importances_of_builds_that_kept_no_prompt_are_taken(
    job: Job, estimated: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    forget, retain = estimated("forget", system_prompt=PROMPT), estimated("retain")
    path = retain / "importance.safetensors"
    with safe_open(path, "pt") as opened:
        metadata = {key: text for key, text in opened.metadata().items() if key not in ("chat_template", "date")}
    (tmp_path / "old").mkdir()
    save_file(load_file(path), tmp_path / "old" / path.name, metadata)
    report = apply(*job.checkpoints, forget, tmp_path / "old", out=tmp_path / "out", progress=False)
    assert report.importance["retain_importance"]["chat_template"] is False
    assert report.warnings == []


def test_importances_of_two_dates_are_warned_of(
    job: Job,
    estimated: Callable[..., Path],
    tmp_path: Path,
    on: Callable[[datetime.date], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monday = estimated("forget")
    on(TUESDAY)
    tuesday = estimated("retain")
    report = apply(*job.checkpoints, monday, tuesday, out=tmp_path / "out", progress=False)
    (warning,) = report.warnings
    assert "different dates: 02 Mar 2026 for the forget importance, 03 Mar 2026 for the retain importance" in warning
    assert "estimate the retain importance again with --date-string '02 Mar 2026'" in warning
    again = estimated("retain", date_string="02 Mar 2026")  # as advised
    assert apply(*job.checkpoints, monday, again, out=tmp_path / "again", progress=False).warnings == []
    other_form = estimated("retain", date_string="2026-03-02")
    assert apply(*job.checkpoints, monday, other_form, out=tmp_path / "form", progress=False).warnings == []
    given = {"forget_importance": monday, "retain_importance": tuesday, "rule": "fisher"}
    assert any("different dates" in note for note in swept(job, None, **given).notes)
    caplog.clear()
    pf.apply_to_module_(llama(), job.base, job.tuned, monday, tuesday)
    assert "different dates" in caplog.text


@pytest.mark.parametrize("command", ["importance", "unlearn", "tune", "sweep"])
@pytest.mark.parametrize(
    ("template", "option", "said"),
    [
        (None, "--system-prompt=x", "--system-prompt: the tokenizer has no chat template to put it in; leave it out"),
        (None, "--date-string=2025-04-10", "--date-string: the tokenizer has no chat template"),
        (REFUSING, "--system-prompt=x", "the chat template takes none (no system turn); leave it out, or begin"),
        (TEMPLATE, "--date-string=soon", "--date-string is 'soon'; write a date in one of the forms 2025-04-10, "),
    ],
)
def test_bad_input(
    command: str, template: str | None, option: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write_templated(tmp_path, template)  # type: ignore[arg-type]
    before = set(tmp_path.iterdir())
    three = ["--model", job.model, "--base", job.base, "--tuned", job.tuned, "--forget", job.forget]
    words = {
        "importance": ["--model", job.base, "--data", job.forget],
        "unlearn": [*three, "--retain", job.retain, "--lam", 1],
        "tune": ["--base", job.base, "--forget", job.forget],
        "sweep": [*three, "--retain", job.retain, "--lams", 1],
    }[command]
    assert cli.main([command, *map(str, words), "--out", str(tmp_path / "out"), "--quiet", option]) == 2
    assert said in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_a_recipe_with_what_is_no_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\nbase: b\ntuned: t\nretain: r\nlam: 1\nout: o\ndate-string: soon\n")
    assert cli.main(["recipe", "check", str(recipe)]) == 2
    assert f"{recipe}: date-string is 'soon'; write a date in one of the forms" in capsys.readouterr().err


@pytest.mark.parametrize("rule", ["fisher", "tv", "preconditioned"])
def test_a_report_asks_both_models_as_the_run_did(
    rule: str, job: Job, tmp_path: Path, on: Callable[[datetime.date], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = unlearn(
        *job.checkpoints,
        job.forget,
        job.retain,
        out=tmp_path,
        progress=False,
        system_prompt=PROMPT,
        lam=1.0,
        rule=rule,  # type: ignore[arg-type]
    )
    on(TUESDAY)
    asked = []

    def answer(module: Any, words: Any, prompts: Any, **settings: Any) -> list[str]:
        asked.append([words.decode(prompt) for prompt in prompts])
        return [""] * len(prompts)

    monkeypatch.setattr("perta_fast.models.greedy_answers.greedy_answers", answer)
    answer_prompts(report, tmp_path, read_prompts(job.forget), False)
    begin = f"02 Mar 2026\nsystem: {PROMPT}<eos>user: Who wrote book 0?<eos>assistant: "
    assert [texts[0] for texts in asked] == [begin, begin]


def test_settings_for_data_that_is_tokenised_already(job: Job) -> None:
    made = encode(load_rows(job.forget), tokenizer(TEMPLATE), 512)
    with pytest.raises(InputError, match="system_prompt and date_string: the data is tokenised already; leave it out"):
        estimate_importance(job.base, made, progress=False, **TOLD)


def _on_its_own_day(rank: int) -> None:
    chat._clock = lambda: datetime.datetime(2026, 3, 2 + rank)


def test_all_ranks_have_the_date_of_the_first(job: Job, tmp_path: Path, on: Callable[[datetime.date], None]) -> None:
    three = ["--model", job.model, "--base", job.base, "--tuned", job.tuned, "--forget", job.forget]
    words = [
        "unlearn",
        "--rule=fisher",
        *three,
        "--retain",
        job.retain,
        "--lam",
        1,
        "--batch-size",
        1,
        "--save-importance",
    ]
    ended = perta_on_ranks(2, *words, tmp_path / "kept", "--out", tmp_path / "out", "--stream", setup=_on_its_own_day)
    assert [rank.status for rank in ended] == [0, 0], ended
    expected = estimate_importance(job.base, samples(job.forget, None, "02 Mar 2026"), batch_size=1, progress=False)
    found = Importance.load(tmp_path / "kept" / "forget")
    assert found.metadata.date == "02 Mar 2026"
    for name, tensor in expected.tensors.items():
        assert (found.tensors[name] - tensor).norm() <= 1e-5 * tensor.norm()
