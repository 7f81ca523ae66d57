"""The model card: metadata that the hub's own library reads, what it said before, numbers, and nothing private."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from perta_fast.records.card_metadata import with_metadata
from perta_fast.records.check import Check, CheckedData, Measured
from perta_fast.records.model_card import add_verdict, write_model_card
from perta_fast.records.report import Report

CACHE = "/home/someone/.cache/huggingface/hub/models--org--a-model.v2/snapshots/0123abc"
PRIVATE = ("someone", "/home", "secret")


def report(model: str = CACHE, **changes: Any) -> Report:
    made = Report("tv", 0.5, 1.0, 1.0, None, {"model": {"path": model, "files": {}}}, **changes)
    made.started = "2026-05-01T10:00:00+00:00"
    made.data = {"forget": {"path": "/home/someone/secret.jsonl", "blake3": "0", "samples": 3, "truncated": 0}}
    return made


def write(folder: Path, card: str | None, made: Report, config: dict[str, Any] | None = None) -> ModelCard:
    (folder / "config.json").write_text(json.dumps(config or {}))
    if card is not None:
        (folder / "README.md").write_text(card)
    write_model_card(folder, made)
    written = ModelCard.load(folder / "README.md")
    assert not any(word in written.content for word in PRIVATE)
    return written


def test_a_new_card_has_what_is_known(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "license": "MIT"}
    card = write(tmp_path, None, report(), config)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "base_model": "org/a-model.v2",
        "base_model_relation": "finetune",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["unlearning", "perta_fast"],
    }
    assert card.text.startswith("\n## Unlearned with perta_fast\n\nOn 2026-05-01 ")


def test_a_model_of_one_s_own_names_no_path(tmp_path: Path) -> None:
    config = {"_name_or_path": "/home/someone/models", "license": "see /home/someone"}
    assert write(tmp_path, None, report("/home/someone/model"), config).data.to_dict() == {
        "library_name": "transformers",
        "tags": ["unlearning", "perta_fast"],
    }


FIELDS = """---
# what this is
license: apache-2.0
language:
  - en
tags:
  - chat
  - "unlearning"
datasets: [org/data]
base_model: other/base
---
# A model

Text --- and more.
"""


def test_what_a_card_says_stays(tmp_path: Path) -> None:
    card = write(tmp_path, FIELDS, report())
    expected = FIELDS.replace("  - chat", "  - perta_fast\n  - chat")
    expected = expected.replace("other/base\n", "other/base\nlibrary_name: transformers\n")
    assert (tmp_path / "README.md").read_text().startswith(expected + "\n## Unlearned")
    data = card.data.to_dict()
    assert (data["base_model"], data["license"], data["language"]) == ("other/base", "apache-2.0", ["en"])
    assert (data["tags"], "base_model_relation" in data) == (["perta_fast", "chat", "unlearning"], False)
    write_model_card(tmp_path, report())
    again = ModelCard.load(tmp_path / "README.md")
    assert again.data.to_dict() == data
    assert again.content.count("## Unlearned with perta_fast") == 2


@pytest.mark.parametrize(
    "card",
    [
        "# A model\n",
        "---\n{license: mit}\n---\n# A model\n",
        "---\nno end\n",
        "----\na: b\n---\n",
        "---\nnot a key\n---\ntext\n",
        '{"name": "README.md"}\n',
    ],
)
def test_a_card_whose_fields_are_not_line_by_line_is_only_added_to(card: str, tmp_path: Path) -> None:
    assert with_metadata(card, tmp_path, report()) == card
    (tmp_path / "README.md").write_text(card)
    write_model_card(tmp_path, report())
    assert (tmp_path / "README.md").read_text().startswith(f"{card.rstrip()}\n\n## Unlearned with perta_fast\n")


@pytest.mark.parametrize("tags", ["tags: [a, b]", "tags: a", "tags:", "tags: &x\n- a"])
def test_tags_in_another_form_stay(tags: str, tmp_path: Path) -> None:
    card = f"---\n{tags}\n---\ntext\n"
    written = with_metadata(card, tmp_path, report("here"))
    assert written == f"---\n{tags}\nlibrary_name: transformers\n---\ntext\n"
    ModelCard(written)


def test_bytes_that_are_not_utf_8_stay(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xfc\n")
    write_model_card(tmp_path, report())
    written = (tmp_path / "README.md").read_bytes()
    assert written.startswith(b"---\nlicense: mit\nlibrary_name: transformers\nbase_model: org/a-model.v2\n")
    assert b"---\n\xfc\n\n## Unlearned" in written


def test_the_verdict_comes_with_its_numbers(tmp_path: Path) -> None:
    check = Check.begun("perta verify x")
    before, after = Measured(0.5, 3), Measured(2.5, 0)
    check.data = {
        "forget": CheckedData(3, 9, 3, before, after),
        "retain": CheckedData(4, 4, 4, Measured(0.25, 4), Measured(0.3, 4)),
    }
    write_model_card(tmp_path, report())
    add_verdict(tmp_path / "README.md", tmp_path / "new.md", check)
    text = ModelCard.load(tmp_path / "new.md").text
    assert check.verdict() in text
    assert text.endswith(
        "\n\n| rows | loss before | loss after | exact before | exact after | answers |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| forget, 3 of 9 | 0.50 | 2.50 | 3 | 0 | 3 |\n"
        "| retain, 4 of 4 | 0.25 | 0.30 | 4 | 4 | 4 |\n"
    )


def test_a_verdict_that_is_added_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    """A check may be killed when the card has it and the report does not. A verdict of an earlier run stays."""
    check = Check.begun("perta verify x")
    check.data = dict.fromkeys(("forget", "retain"), CheckedData(3, 3, 3, Measured(0.1, 3), Measured(2.0, 0)))
    card = tmp_path / "README.md"
    for runs in (1, 2):
        write_model_card(tmp_path, report())
        for _ in range(2):
            add_verdict(card, card, check)
            assert card.read_text().count("Measured on rows") == card.read_text().count(check.verdict()) == runs


def test_a_card_whose_lines_end_in_crlf(tmp_path: Path) -> None:
    """It gets the same, and all lines end alike; the hub's own library reads both."""
    write(tmp_path, FIELDS, report())
    expected = (tmp_path / "README.md").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "README.md").write_bytes(FIELDS.replace("\n", "\r\n").encode())
    write_model_card(tmp_path, report())
    assert (tmp_path / "README.md").read_bytes() == expected
    check = Check.begun("perta verify x")
    check.data = dict.fromkeys(("forget", "retain"), CheckedData(3, 3, 3, Measured(0.1, 3), Measured(2.0, 0)))
    add_verdict(tmp_path / "README.md", tmp_path / "measured.md", check)
    written = (tmp_path / "measured.md").read_bytes()
    assert written.startswith(expected.rstrip()) and written.count(b"\n") == written.count(b"\r\n")
    mixed = FIELDS.replace("\n", "\r\n", 1).encode() + b"\r\xff"
    (tmp_path / "README.md").write_bytes(mixed)
    write_model_card(tmp_path, report())
    assert (tmp_path / "README.md").read_bytes().startswith(mixed + b"\n\n## Unlearned")
