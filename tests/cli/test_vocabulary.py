"""A message names arguments as its reader does: in Python by their names, on the command line as options."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import perta_fast
from perta_fast import cli
from perta_fast.cli.command import Command
from perta_fast.cli.main import _explain, _spellings
from perta_fast.cli.recipe_options import options_of
from perta_fast.cli.recipe_sections import COMMANDS
from perta_fast.errors import InputError
from tests.cli.test_parser import ALL

# What is no argument where a message begins with it.
OTHERS = {"eval", "model", "path", "recipe", "run", "shell", "topic"}
NAMES = {option.name for command in ALL.values() for option in command.options} - OTHERS
_ANY = "|".join(sorted(NAMES, key=len, reverse=True))
UNMARKED = re.compile(rf"({_ANY}) (is|are|has|needs|takes|must)\b")
GIVEN = re.compile(rf"\b[Gg]ive (either )?(?!at least|only one)({_ANY})\b")
OPTION = re.compile(r"--[a-z-]+")
ERRORS = ("InputError", "RunError", "NotFiniteError", "NotStreamable")


@pytest.mark.parametrize("command", ALL.values(), ids=ALL.keys())
def test_a_message_names_each_option_as_it_is_typed(command: Command) -> None:
    for option in command.options:
        error = InputError(f"‹{option.name}› is 0; see ‹{option.name}›, and ‹neither›")
        text, status = _explain(error, command.spellings())
        typed = option.metavar or option.name if option.positional else f"--{option.key}"
        assert (text, status) == (f"error: {typed} is 0; see {typed}, and neither", 2)
        assert str(error) == f"{option.name} is 0; see {option.name}, and neither"


def test_a_message_within_another_keeps_its_marks() -> None:
    outer = InputError(f"recipe.yaml: {InputError('‹batch_size› is 0')}")
    assert str(outer) == "recipe.yaml: batch_size is 0"
    assert outer.spelled(lambda name: f"--{name.replace('_', '-')}") == "recipe.yaml: --batch-size is 0"


def test_a_path_with_signs_comes_out_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("/tmp/`model`/{lam}", "a `lam` b", "/tmp/‹model›", "‹lam›/x", "‹lam›.jsonl", "a-‹lam›"):
        assert cli.main(["inspect", path]) == 2
        assert path in capsys.readouterr().err
        assert str(InputError(f"{path}: {{}}")) == f"{path}: {{}}"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("importance --model=m --data=d --out=o --batch-size=0", "--batch-size is 0; it must be at least 1"),
        ("importance --model=m --data=d --out=o --max-length=0", "--max-length is 0; it must be at least 1"),
        ("apply --model=m --base=b --tuned=t --out=o --rule=tv --lam=nan", "--lam is nan; it must be a finite number"),
        (
            "unlearn --model=m --base=b --tuned=t --out=o --max-retain-rise=-1",
            "--max-retain-rise is -1.0; it must be at least 0 nats, and finite",
        ),
        ("precondition --base=b --tuned=t --retain=r --out=o --mu=-1", "--mu is -1.0; it must be a number from 0 to"),
    ],
)
def test_on_the_command_line(typed: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(typed.split()) == 2
    assert capsys.readouterr().err.startswith(f"perta: error: {said}")


def test_the_same_error_in_python() -> None:
    with pytest.raises(InputError, match=r"^batch_size is 0; it must be at least 1$"):
        perta_fast.estimate_importance("m", "d", batch_size=0)


@cache
def errors() -> list[tuple[Path, ast.Call]]:
    """Where the package makes an error: its file in the package, and the call."""
    package = Path(perta_fast.__file__).parent
    return [
        (path.relative_to(package), call)
        for path in package.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ERRORS
    ]


def parts(node: ast.AST) -> Iterator[str]:
    """The texts in an error's arguments, but for those of commands to be copied into a shell."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "shell_command"):
        for child in ast.iter_child_nodes(node):
            yield from parts(child)


def test_no_message_of_python_names_an_option_or_an_argument_without_its_marks() -> None:
    found = [
        f"{path}:{call.lineno}: {text}"
        for path, call in errors()
        if path.parts[0] != "cli"
        for text in parts(call)
        if OPTION.search(text) or GIVEN.search(text)
    ]
    assert found == []


def test_a_message_of_another_command_s_run_names_its_options() -> None:
    error = InputError("give ‹lams›, or see ‹neither›")
    assert _explain(error, _spellings(ALL["resume"]))[0] == "error: give --lams, or see neither"
    assert _explain(error, _spellings(ALL["recipe run"]))[0] == "error: give lams, or see neither"


@pytest.mark.parametrize("part", ["recipe run", "recipe check"])
def test_a_message_of_a_recipe_names_its_keys(part: str) -> None:
    """``batch-size`` and ``as``; but what the command itself has, such as --overwrite, as its option."""
    own = {option.name for option in ALL[part].options}
    keys = {option.name: key for command in COMMANDS.values() for key, option in options_of(command).items()}
    assert (keys["batch_size"], keys["save_as"]) == ("batch-size", "as")
    for name, key in keys.items():
        text, _ = _explain(InputError(f"pass ‹{name}›"), _spellings(ALL[part]))
        assert text == f"error: pass {f'--{key}' if name in own else key}"


def test_no_message_has_marks_of_another_kind() -> None:
    backticks = [
        f"{path}:{call.lineno}"
        for path, call in errors()
        if any("`" in str(part.value) for part in ast.walk(call) if isinstance(part, ast.Constant))
    ]
    assert backticks == []


def test_no_message_begins_with_a_name_that_is_not_marked() -> None:
    found = []
    for path, call in errors():
        first = call.args[0] if call.args else None
        first = first.values[0] if isinstance(first, ast.JoinedStr) else first
        if isinstance(first, ast.Constant) and UNMARKED.match(str(first.value)):
            found.append(f"{path}:{call.lineno}: {first.value}")
    assert found == []
