"""What the parser says of words that it does not know, and where it takes ``--verbose`` and ``help``."""

import logging
import re
from pathlib import Path

import pytest

from perta_fast import cli
from perta_fast.cli.command import Command
from perta_fast.cli.main import COMMANDS
from perta_fast.cli.option_groups import GROUP_OF, LONG, TITLES
from perta_fast.runs import inspect


def named(command: Command, above: str = "") -> dict[str, Command]:
    """A command and those below it, by what is typed."""
    name = f"{above} {command.name}".strip()
    return {name: command} | {key: value for part in command.parts for key, value in named(part, name).items()}


ALL = {name: command for each in COMMANDS for name, command in named(each).items()}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("unlern", "perta: error: there is no command 'unlern'; did you mean unlearn? (perta --help)\n"),
        ("recipe innit", "perta recipe: error: there is no command 'innit'; did you mean init? (perta recipe "),
        ("help unlern", "perta: error: there is no command 'unlern'; did you mean unlearn? (perta --help)\n"),
        ("xyzzy", "perta: error: there is no command 'xyzzy'; there are demo, tune, "),
        ("--verson", "perta: error: there is no option --verson; did you mean --version? (perta --help)\n"),
        ("apply --modle m", "perta apply: error: there is no option --modle; did you mean --model? (perta apply "),
        ("tune --model m", "perta tune: error: there is no option --model; did you mean --base? (perta tune "),
        ("tune --learning_rate=1", "perta tune: error: there is no option --learning_rate; did you mean --lr? (p"),
        ("unlearn --dataset d", "perta unlearn: error: there is no option --dataset; did you mean --forget? (p"),
        ("sweep --lambda 1", "perta sweep: error: there is no option --lambda; did you mean --lams? (perta sweep "),
        ("apply --xyzzy", "perta apply: error: there is no option --xyzzy (perta apply --help)\n"),
        ("verify a b", "perta verify: error: there is no place for b (perta verify --help)\n"),
        ("verify", "perta verify: error: the following arguments are required: DIR (perta verify --help)\n"),
        ("tune --base b", "perta tune: error: the following arguments are required: --out, --forget or --data (p"),
        ("tune --base b --out=o", "perta tune: error: the following arguments are required: --forget or --data (p"),
        ("tune --base b --data=d", "perta tune: error: the following arguments are required: --out (perta tune "),
        ("tune --rank x", "perta tune: error: argument --rank: invalid int value: 'x' (perta tune --help)\n"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_that_says_what_was_meant(
    typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(typed.split(), capsys).startswith(said)


@pytest.mark.parametrize(("name", "command"), ALL.items())
def test_no_option_is_taken_for_another_that_begins_like_it(
    name: str, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {spelling for option in command.options for spelling in option.spellings}
    for spelling in whole:
        short = spelling[:-1]
        if short not in whole and len(short) > 2:
            error = refused([*name.split(), f"{short}=x"], capsys)
            assert f"there is no option {short}; options are written in full: " in error
            assert spelling in error


def test_the_recipe_is_an_option_like_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert "options are written in full: --recipe" in refused(["unlearn", "--rec", "x"], capsys)


def test_a_text_that_begins_with_two_dashes_is_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--base=b", "--forget=f", "--out=o", "--system-prompt", "--a b", "--rank=0"]) == 2
    assert "rank" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["-v", "inspect", "."], ["inspect", "-v", "."], ["inspect", ".", "--verbose"]])
def test_verbose_stands_before_or_after_the_command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def log(path: Path, **_: object) -> inspect.Inspection:
        logging.getLogger("perta_fast").info("looked at %s", path)
        return inspect.Inspection({})

    monkeypatch.setattr(inspect, "inspect", log)
    monkeypatch.setattr(inspect.Inspection, "text", lambda _: "described")
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == "described\n"
    assert captured.err.endswith("INFO looked at .\n")
    assert cli.main(["inspect", "."]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["", *ALL])
def test_help_is_another_word_for_the_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for arguments in (["help", *name.split()], [*name.split(), "--help"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert shown[0].startswith(f"usage: perta {name}")
    if name:
        described = f"{ALL[name].help[0].upper()}{ALL[name].help[1:]}."
        assert described in " ".join(shown[0].split())


@pytest.mark.parametrize("name", ALL)
def test_every_option_says_what_it_does(name: str) -> None:
    assert [option.typed for option in ALL[name].options if not option.help] == []


@pytest.mark.parametrize("name", [name for name, command in ALL.items() if len(command.options) >= LONG])
def test_a_long_help_has_each_option_in_a_group(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*name.split(), "--help"])
    _, *groups = re.split(r"^(?=[a-z ]+:$)", capsys.readouterr().out, flags=re.MULTILINE)
    shown = {group.partition(":")[0]: re.findall(r"^  (--[a-z-]+)", group, re.MULTILINE) for group in groups}
    assert shown.pop("options") == []  # --help and --verbose begin with their letters
    assert list(shown) == [title for title in TITLES if title in shown]
    listed = [option for of_group in shown.values() for option in of_group]
    assert sorted(listed) == sorted(f"--{option.key}" for option in ALL[name].options)
    assert shown["output"][-2:] == ["--quiet", "--json"] and "--out" in shown["output"]


def test_every_group_is_of_options_that_there_are() -> None:
    assert GROUP_OF.keys() <= {option.name for command in ALL.values() for option in command.options}
