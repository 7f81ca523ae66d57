"""The documentation's page of the command line, which is made when the site is built."""

import importlib.util
import re
from pathlib import Path

import pytest

from perta_fast import cli
from perta_fast.cli.command import Command
from perta_fast.cli.importing import INTERRUPTED
from perta_fast.cli.main import COMMANDS

pytest.importorskip("mkdocs", reason="the page is made by a hook of mkdocs")


def page() -> str:
    path = Path(__file__).parents[2] / "docs" / "command_line.py"
    spec = importlib.util.spec_from_file_location("command_line", path)
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    text: str = hook.page()
    return text


def named(command: Command, above: str = "") -> dict[str, Command]:
    name = f"{above} {command.name}".strip()
    return {name: command} | {key: value for part in command.parts for key, value in named(part, name).items()}


ALL = {name: command for each in COMMANDS for name, command in named(each).items()}


@pytest.mark.parametrize("name", ALL)
def test_every_option_of_the_parser_is_on_the_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*name.split(), "--help"])
    options = re.findall(r"^  (?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    section = re.split(r"^## ", page(), flags=re.MULTILINE)
    (own,) = (part for part in section if part.startswith(f"perta {name}\n"))
    assert {"--help"} | set(re.findall(r"^\| `(--[a-z-]+)", own, re.MULTILINE)) == set(options)
    assert ALL[name].help[1:] in own
    assert all(option.help is None or option.help in own for option in ALL[name].options)


def test_the_status_of_an_interrupt_is_named() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert all(f"{INTERRUPTED} it was interrupted" in " ".join(text.split()) for text in (page(), readme))
