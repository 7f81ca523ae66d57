"""The command line lets OpenMP's threads sleep while they wait, unless the user has said how they wait."""

import os
import sys

import pytest

from perta_fast.cli.waiting_threads import VARIABLES, sleep_while_waiting
from tests.support.children import run_child

POLICY = """
import os
from perta_fast.cli import main
try:
    main(["--version"])
finally:
    print(os.environ.get("OMP_WAIT_POLICY"))
    import torch
"""


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_the_runtime_of_torch_reads_that_threads_sleep() -> None:
    done = run_child([sys.executable, "-c", POLICY], env=os.environ | {"OMP_DISPLAY_ENV": "true"})
    assert done.stdout.splitlines()[-1] == "passive"
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr, done.stderr


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv(name, "active")
    sleep_while_waiting()
    assert {each: os.environ[each] for each in VARIABLES if each in os.environ} == {name: "active"}


def test_nothing_is_set_where_it_comes_too_late() -> None:
    assert "torch" in sys.modules
    sleep_while_waiting()
    assert "OMP_WAIT_POLICY" not in os.environ
