"""What is shown on a terminal cannot move its cursor or reorder text, and commands can be copied as they are."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perta_fast.errors import InputError, Interrupted, PertaError, RunError, printable, printable_lines, shell_command

HARM = [
    "\x1b[31m",
    "\r",
    "\b",
    "\x07",
    "\x00",
    "\x7f",
    "\x85",
    "\x9b2J",
    "\u202e",
    "\u2066",
    "\u200b",
    "\u2028",
    "\ud800",
    "\n",
]


@pytest.mark.parametrize("harm", HARM)
def test_harmful_characters_are_escaped(harm: str) -> None:
    shown = printable(f"a{harm}b")
    assert shown.isprintable()
    assert shown == f"a{harm[0].encode('unicode_escape').decode()}{harm[1:]}b"
    assert printable(shown) == shown
    assert printable_lines([f"a{harm}", "b"]).split("\n") == [printable(f"a{harm}"), "b"]


@pytest.mark.parametrize("text", ["", "λ · w ⊙ (θ_f − θ_0)", "日本語　名前", "naïve\xa0é", "😀", "a\\nb", "e\u0301"])
def test_what_people_write_is_left(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize("kind", [PertaError, InputError, RunError, Interrupted])
def test_errors_are_one_printable_line(kind: type[BaseException]) -> None:
    error = kind(f"tensor a{''.join(HARM)}")
    assert str(error).isprintable()
    assert str(error) == printable(str(error.args[0]))


@pytest.mark.parametrize("kind", [InputError, Interrupted])
def test_marked_arguments_are_spelled_at_the_end(kind: type[InputError | Interrupted]) -> None:
    """A message within another keeps its marks."""
    error = kind(f"it failed: {kind('leave ‹overwrite› out')}")
    assert str(error) == "it failed: leave overwrite out"
    assert error.spelled(lambda name: f"--{name}") == "it failed: leave --overwrite out"


NAMES = [
    *(
        "plain",
        "with space",
        "it's",
        'say "x"',
        "$HOME `id` $(id)",
        "semi;colon & * ? [a] {b} !x #y ~",
        "-rf",
        "é 日本",
    ),
    *(
        "tab\there",
        "line\nend",
        "\x1b[31mred",
        "bell\x07",
        "\u202eright",
        "back\\slash",
        "quote'and\x01\\'",
        "\udcff\udcfe",
    ),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_shell_takes_the_words_as_they_were(name: str, tmp_path: Path) -> None:
    command = shell_command("printf", "%s", tmp_path / name, "end")
    assert command.isprintable()
    shown = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, check=True).stdout
    assert shown == os.fsencode(tmp_path / name) + b"end"


def test_a_path_is_not_taken_for_an_option() -> None:
    assert shell_command("perta", "resume", Path("-out")) == "perta resume ./-out"


@given(st.text(st.characters(exclude_characters="\0")))
def test_any_word_becomes_a_printable_command(word: str) -> None:
    command = shell_command("perta", word, Path(word))
    assert printable(command) == command
