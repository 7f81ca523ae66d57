"""Thousands of damaged files: each is refused by name or read correctly.

For every file of ``TARGETS`` hypothesis draws damage to its bytes and to their meaning. The package, and the commands
that read the file, must then refuse it with an error of the package or give a correct result. In both cases they must
change nothing on the disk. An ordinary run has about 1,700 inputs; more than 100,000 has

    PERTA_SOAK=1 python -m pytest tests/fuzz
"""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perta_fast import cli
from perta_fast.errors import PertaError
from tests.fuzz.targets import COMMANDS, TARGETS, write_run
from tests.support.patience import patience

pytestmark = pytest.mark.usefixtures("one_thread")

SOAK = os.environ.get("PERTA_SOAK") == "1"
PAIRS = [(name, command) for name, target in TARGETS.items() for command in target.commands]


def examples(ordinary: int, soak: int) -> settings:
    """Set how many inputs a test draws."""
    return settings(max_examples=soak if SOAK else ordinary, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; every test restores what it damages."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    write_run(folder)
    return folder


@contextlib.contextmanager
def damaged_file(data: st.DataObject, target: str, run: Path) -> Iterator[bool]:
    """Damage the file of ``target`` during the body; yields whether its content differs.

    The body must end, and change nothing in or beside ``run``.
    """
    path = run / TARGETS[target].file
    original = path.read_bytes()
    content = data.draw(TARGETS[target].damage(original))
    path.write_bytes(content)
    before = contents(run.parent)
    try:
        with patience():
            yield content != original
        assert contents(run.parent) == before
    finally:
        path.write_bytes(original)


def contents(folder: Path) -> dict[Path, tuple[int, bytes | None]]:
    """Time of the last change and content of everything below ``folder``."""
    return {
        path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in folder.rglob("*")
    }


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.data())
@examples(ordinary=120, soak=12_000)
def test_reading(target: str, run: Path, data: st.DataObject) -> None:
    with damaged_file(data, target, run):
        try:
            TARGETS[target].read(run / TARGETS[target].file)
        except PertaError as error:
            assert str(run) in str(error)


@pytest.mark.parametrize(("target", "command"), PAIRS)
@given(data=st.data())
@examples(ordinary=25, soak=500)
def test_commands(target: str, command: str, run: Path, data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    with damaged_file(data, target, run) as changed:
        status, out, err = perta(COMMANDS[command])
        if err:
            assert (status in (1, 2), out, err[:14]) == (True, "", "perta: error: ")
        elif command.startswith("apply"):
            assert (status, perta("verify --quiet --full ../new")[0]) == (0, 0)
            shutil.rmtree("../new")
        elif command == "verify":
            # Some damage to a report does not matter; any to a file whose hash it has does.
            assert status == (1 if "WRONG: " in out else 0)
            assert status == 1 or target == "report" or not changed
        else:
            assert status == 0


def perta(line: str) -> tuple[int, str, str]:
    """Exit status, output and errors of one command; the output is encoded as that of a process is."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(line.split())
    return status, out.buffer.getvalue().decode(), err.getvalue()
