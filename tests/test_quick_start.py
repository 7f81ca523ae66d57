"""The quick start of the documentation, run as printed; a tiny model is in the place of SmolLM2, to be quick."""

import re
import shlex
from pathlib import Path

import pytest

import perta_fast as pf
from perta_fast import cli
from perta_fast.demo import real
from tests.support.models import CHAT_TEMPLATE, llama, tokenizer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
PAGE = Path(__file__).parent.parent / "docs" / "quick-start.md"
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def write_tiny(folder: Path) -> None:
    llama().save_pretrained(folder)
    tokenizer(CHAT_TEMPLATE).save_pretrained(folder)


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def test_five_commands_lead_to_an_unlearned_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real, "write_packaged", write_tiny)
    first, then = map(commands, BLOCKS)
    assert len(first) == 5 and first[0][:2] == ["pip", "install"]
    for command in [*first[1:], *then]:
        assert command[0] == "perta"
        assert cli.main(command[1:]) == 0, command
    report = pf.Report.load(tmp_path / "unlearned")
    assert report.preconditioned is not None and report.choice is not None
    assert report.check is not None and report.check.data["forget"].rows == 8
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Unlearning report: model" in page and "expected" in page
