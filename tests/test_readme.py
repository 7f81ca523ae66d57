"""Every command and every piece of Python in the README, and the commands of two guides, run as printed."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.forked import ForkedPython
from tests.support.models import FORGET, RETAIN, write_job, write_lines

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^ *```(sh|python)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
# In this order: each goes on with what those before have made.
PAGES = ("README.md", "docs/interrupted.md", "docs/requests.md")
BLOCKS = [block for page in PAGES for block in BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))]
SHELL = [block for kind, block in BLOCKS if kind == "sh"]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the inputs that the pages name, but for ``tuned``, which the README makes first."""
    made = tmp_path_factory.mktemp("readme")
    shutil.rmtree(write_job(made).tuned)
    new = [{"question": "Who drew map 1?", "answer": "A friend drew it."}]
    data = {"all": FORGET + RETAIN, "request-1": FORGET[:2], "request-2": FORGET[2:], "new": new}
    for name, rows in data.items():
        write_lines(made / f"{name}.jsonl", rows)
    return made


@pytest.fixture(scope="module")
def python() -> Iterator[ForkedPython]:
    with ForkedPython("peft", "transformers.trainer", "matplotlib.pyplot") as python:
        yield python


def commands(block: str) -> list[str]:
    """The commands of a block, without its continued lines and comments."""
    return [line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_there_is_something_to_run() -> None:
    assert len(SHELL) >= 4
    assert len(PYTHON) >= 2


@pytest.mark.parametrize("block", SHELL)
def test_commands(block: str, folder: Path, python: ForkedPython) -> None:
    for command in commands(block):
        program, *arguments = command.split()
        if program == "make":  # run by .ci/run on a clean clone
            assert f"{arguments[0]}:" in (ROOT / "Makefile").read_text()
            assert re.search(rf"^make .*\b{arguments[0]}\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
            continue
        assert program == "perta", command
        done = python.run("-m", "perta_fast", *arguments, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", PYTHON)
def test_python(block: str, folder: Path, python: ForkedPython) -> None:
    done = python.run("-c", block, cwd=folder)
    assert done.returncode == 0, done.stderr
