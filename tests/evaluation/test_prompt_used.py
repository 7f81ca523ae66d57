"""An evaluation names how it put the rows to the model."""

import json
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from perta_fast import Evaluation, cli, evaluate
from tests.support.models import CHAT_TEMPLATE, FORGET, llama, tokenizer, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [{"text": "Rivers run to the sea."}]
DATED = "{{ 'Today is ' ~ (date_string or strftime_now('%d %b %Y')) }}" + CHAT_TEMPLATE
NOTHING = {"chat_template": None, "system_prompt": None, "date": None}


def with_bos(template: str | None = None) -> PreTrainedTokenizerFast:
    words = tokenizer(template)
    words.add_special_tokens({"bos_token": "<pad>"})
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 1)])
    return words


def used(words: PreTrainedTokenizerFast, folder: Path, rows: list[Any], **changes: Any) -> Evaluation:
    forget = write_lines(folder / "f.jsonl", rows)
    options: dict[str, Any] = {"forget": forget, "tokenizer": words, "progress": False, "max_new_tokens": 2}
    return evaluate(llama(0).eval(), **options | changes)


@pytest.mark.parametrize(
    ("words", "rows", "forms", "bos", "line"),
    [
        (tokenizer(), FORGET, ["Question: ... Answer:"], [0], "prompts: Question: ... Answer:, no BOS"),
        (with_bos(), FORGET, ["Question: ... Answer:"], [1], "prompts: Question: ... Answer:, a BOS first"),
        (tokenizer(), TEXTS, ["text as it is"], [0], "prompts: text as it is, no BOS"),
        (with_bos(), TEXTS, ["text as it is"], [1], "prompts: text as it is, a BOS first"),
        (
            tokenizer(),
            [*FORGET, *TEXTS],
            ["Question: ... Answer:", "text as it is"],
            [0],
            "prompts: Question: ... Answer:, text as it is, no BOS",
        ),
    ],
)
def test_without_a_chat_template(words: Any, rows: Any, forms: Any, bos: Any, line: str, tmp_path: Path) -> None:
    result = used(words, tmp_path, rows)
    assert result.settings["prompt"] == {"forms": forms, **NOTHING, "bos": bos}
    assert line in result.summary().splitlines()


def test_with_a_chat_template(tmp_path: Path) -> None:
    result = used(tokenizer(CHAT_TEMPLATE), tmp_path, FORGET)
    digest = blake3(CHAT_TEMPLATE.encode()).hexdigest()
    assert result.settings["prompt"] == {"forms": ["chat template"], **NOTHING, "chat_template": digest, "bos": [0]}
    said = f"prompts: chat template {digest[:8]}, no system prompt given, no date asked for, no BOS"
    assert said in result.summary().splitlines()


def test_two_bos_are_named(tmp_path: Path) -> None:
    result = used(tokenizer("<pad><pad>" + CHAT_TEMPLATE), tmp_path, FORGET)
    assert result.settings["prompt"]["bos"] == [0]  # what is no BOS is not counted
    words = tokenizer("<pad><pad>" + CHAT_TEMPLATE)
    words.add_special_tokens({"bos_token": "<pad>"})
    assert "2 BOS first" in used(words, tmp_path, FORGET).summary()


def test_date_and_system_prompt(tmp_path: Path) -> None:
    words = tokenizer(DATED)
    result = used(words, tmp_path, FORGET, system_prompt="Be brief.", date_string="10 Apr 2025")
    assert result.settings["prompt"]["system_prompt"] == "Be brief."
    assert result.settings["prompt"]["date"] == "10 Apr 2025"
    assert "system prompt 'Be brief.', date 10 Apr 2025, no BOS" in result.summary()
    today = used(words, tmp_path, FORGET).settings["prompt"]["date"]
    assert today is not None  # the template asked the clock


def test_of_all_sets_together(tmp_path: Path) -> None:
    retain = write_lines(tmp_path / "r.jsonl", TEXTS)
    result = used(tokenizer(CHAT_TEMPLATE), tmp_path, FORGET, retain=retain)
    assert result.settings["prompt"]["forms"] == ["chat template", "text as it is"]
    assert result.settings["prompt"]["chat_template"] is not None


def test_in_the_file_and_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(0).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    forget, out = write_lines(tmp_path / "f.jsonl", FORGET), tmp_path / "r.json"
    arguments = ["eval", "--model", str(tmp_path / "model"), "--forget", str(forget), "--max-new-tokens", "2"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    assert "prompts: Question: ... Answer:, no BOS" in capsys.readouterr().out
    assert json.loads(out.read_text())["settings"]["prompt"]["forms"] == ["Question: ... Answer:"]
