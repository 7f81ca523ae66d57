"""Every example, and what it shows."""

import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.forked import ForkedPython

FOLDER = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "tiny")
LOSSES = re.compile(r"^(\w[\w ]*\w) +forget loss +([\d.]+), retain loss +([\d.]+)$", re.MULTILINE)


TRAIN = """
import sys
from pathlib import Path
from perta_fast.demo.checkpoints import train_models
from perta_fast.demo.clock import Clock
from perta_fast.demo.files import Files
sys.path[0] = sys.argv[1]
import tiny
train_models(Files(Path(sys.argv[2])), tiny._SMALL, 0, Clock())
"""
TRAINED = """
import runpy, shutil, sys
from perta_fast.demo import checkpoints
sys.path[0], example, trained = sys.argv[1:]
checkpoints.train_models = lambda files, *_: shutil.copytree(trained, files.directory, dirs_exist_ok=True)
runpy.run_path(example, run_name="__main__")
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CompletedProcess[str]]:
    """The quick start as it is; the others take the same models, which are trained once."""
    trained = tmp_path_factory.mktemp("trained")
    with ForkedPython("peft", "transformers.trainer") as python:
        done = python.run("-c", TRAIN, FOLDER, trained, cwd=FOLDER.parent)
        assert done.returncode == 0, done.stderr
        runs = {"quickstart": python.run(FOLDER / "quickstart.py", cwd=FOLDER.parent)}
        for name in set(NAMES) - runs.keys():
            example = FOLDER / f"{name}.py"
            runs[name] = python.run("-c", TRAINED, FOLDER, example, trained, cwd=FOLDER.parent)
        return runs


def assert_forgotten(losses: dict[str, tuple[float, float]]) -> None:
    """Every result has forgotten much more than it has lost."""
    forget, retain = losses.pop("model")
    assert losses
    for after_forget, after_retain in losses.values():
        assert after_forget > 2 * forget
        assert after_forget - forget > 4 * (after_retain - retain)


@pytest.mark.parametrize("name", NAMES)
def test_runs(name: str, finished: dict[str, CompletedProcess[str]]) -> None:
    done = finished[name]
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    found = {label: (float(forget), float(retain)) for label, forget, retain in LOSSES.findall(done.stdout)}
    if found:
        assert_forgotten(found)
    assert found or name in ("streaming", "sweep", "custom_operation")


def test_streaming_gives_the_same_bytes(finished: dict[str, CompletedProcess[str]]) -> None:
    assert "the same bytes" in finished["streaming"].stdout


def test_the_sweep_finds_a_strength(finished: dict[str, CompletedProcess[str]]) -> None:
    found = re.search(r"lambda ([\d.]+) raises the forget loss", finished["sweep"].stdout)
    assert found is not None
    assert float(found[1]) > 0.5


def test_an_operation_of_ones_own_gives_the_bits_of_its_reference(finished: dict[str, CompletedProcess[str]]) -> None:
    assert finished["custom_operation"].stdout.count("the kernel gives the bits of the reference") == 3


def test_a_family_of_ones_own_gives_the_same_streamed(finished: dict[str, CompletedProcess[str]]) -> None:
    found = re.search(r"largest difference between the two ways: (\S+)", finished["custom_family"].stdout)
    assert found is not None
    assert float(found[1]) <= 1e-5
