"""``--show-labels``: what every command that takes data prints of it, and that it stops there."""

import sys
from pathlib import Path

import pytest

from perta_fast import cli
from tests.support.checkpoints import fingerprint
from tests.support.models import CHAT_TEMPLATE, Job, tokenizer, write_job, write_lines

COMMANDS: dict[str, list[str]] = {
    "importance": ["--model=base", "--data=forget.jsonl", "--out=out"],
    "unlearn": ["--model=model", "--base=base", "--tuned=tuned", "--forget=forget.jsonl", "--lam=1", "--out=out"],
    "tune": ["--base=base", "--forget=forget.jsonl", "--out=out"],
    "sweep": [
        *("--model=model", "--base=base", "--tuned=tuned", "--forget=forget.jsonl", "--retain=retain.jsonl"),
        *("--lams=1", "--out=out"),
    ],
    "eval": ["--model=model", "--forget=forget.jsonl", "--out=out.json"],
}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job in the working directory, whose base has a chat template."""
    made = write_job(tmp_path)
    for checkpoint in (made.model, made.base):
        tokenizer(CHAT_TEMPLATE).save_pretrained(checkpoint)
    monkeypatch.chdir(tmp_path)
    return made


@pytest.mark.parametrize("command", COMMANDS)
def test_rows_are_shown_and_nothing_is_made(
    command: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = fingerprint(tmp_path)
    assert cli.main([command, *COMMANDS[command], "--show-labels=2"]) == 0
    said = capsys.readouterr()
    assert "<|user|>Who wrote book 0?<eos><|assistant|>⟦The author number 0 wrote it.<eos>⟧\n" in said.out
    assert "forget.jsonl, line 2: " in said.out
    assert "line 3" not in said.out
    assert ("<|assistant|>⟦It lies by river 1.<eos>⟧" in said.out) == (command == "sweep")
    assert fingerprint(tmp_path) == before


def test_colour_on_a_terminal(job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["importance", *COMMANDS["importance"], "--show-labels=1"]) == 0
    assert "<|assistant|>\x1b[7mThe author number 0 wrote it.<eos>\x1b[27m\n" in capsys.readouterr().out


def test_what_a_terminal_would_obey_is_escaped(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(job.forget, [{"question": "Who\x1b[31m?", "answer": "a\x1b[7m\x1b]0;title\x07"}])
    assert cli.main(["importance", *COMMANDS["importance"], "--show-labels=1"]) == 0
    said = capsys.readouterr().out
    assert "\\x1b[31m" in said
    assert "\x1b" not in said


def test_with_prompt_date_and_length(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--show-labels=1", "--system-prompt=Be brief.", "--max-length=70"]
    assert cli.main(["importance", *COMMANDS["importance"], *options]) == 0
    said = capsys.readouterr().out
    assert "<|system|>Be brief.<eos><|user|>Who" in said
    assert "of 70 tokens carry loss, cut to the length limit" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["eval", "--model=model", "--suite=tofu", "--data=TOFU"], "--show-labels is for data of your own"),
        (["eval", "--model=model"], "--show-labels needs data"),
        (["importance", "--model=none", "--data=forget.jsonl", "--out=out"], "none"),
        (["importance", "--model=base", "--data=none.jsonl", "--out=out"], "none.jsonl"),
    ],
)
def test_bad_input(options: list[str], said: str, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*options, "--show-labels=1"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", '"text"', "{"])
def test_damaged_generation_settings_are_named(content: str, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    Path("base", "generation_config.json").write_text(content, encoding="utf-8")
    assert cli.main(["tune", *COMMANDS["tune"], "--show-labels=1"]) == 2
    assert "generation_config.json: is not" in capsys.readouterr().err


def test_none_are_refused(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *COMMANDS["tune"], "--show-labels=0"]) == 2
    assert "it must be at least 1" in capsys.readouterr().err
