"""``perta importance`` with ``--merge``, and with ``--whole`` and ``--remove``: importances that exist, combined."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from perta_fast import Importance, cli, estimate_importance
from tests.support.checkpoints import fingerprint
from tests.support.children import perta
from tests.support.models import FORGET, RETAIN, Job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

_NO_TORCH = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None"


@pytest.fixture(scope="module")
def folder(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The importances of both data sets, and of all rows."""
    made = tmp_path_factory.mktemp("importances")
    data = {"forget": job.forget, "retain": job.retain, "whole": write_lines(made / "all.jsonl", FORGET + RETAIN)}
    for name, path in data.items():
        estimate_importance(job.base, path, out=made / name, dtype=None, progress=False)
    return made


@pytest.fixture
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in folder.iterdir())
    yield folder
    assert sorted(path.name for path in folder.iterdir()) == before


def test_merging_and_removing_without_torch(there: Path, tmp_path: Path) -> None:
    merged = perta("importance", "--merge", "forget", "retain", "--out", tmp_path / "merged", setup=_NO_TORCH)
    assert (merged.returncode, merged.stderr) == (0, "")
    assert merged.stdout == f"grad over 12 samples, 183 labels\nwritten to {tmp_path / 'merged'}\n"
    arguments = ["--whole", tmp_path / "merged", "--remove", "retain", "--out", tmp_path / "rest", "--quiet"]
    removed = perta("importance", *arguments, setup=_NO_TORCH)
    assert (removed.returncode, removed.stdout, removed.stderr) == (0, "", "")
    for found, expected in (("merged", "whole"), ("rest", "forget")):
        one, other = Importance.load(tmp_path / found).metadata, Importance.load(there / expected).metadata
        assert (one.rows_hash, one.label_count) == (other.rows_hash, other.label_count)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["--merge", "forget", "retain", "--remove", "retain"],
            "--merge adds importances up, and --remove does not go",
        ),
        (["--merge", "forget", "retain", "--whole", "whole"], "--merge adds importances up, and --whole does not go"),
        (["--merge", "forget"], "merge takes two importances or more"),
        (["--whole", "whole"], "--whole A --remove B go together"),
        (["--remove", "forget"], "--whole A --remove B go together"),
        (["--merge", "forget", "retain", "--model", "base"], "--model is for estimating; --merge reads importances"),
        (["--whole", "whole", "--remove", "forget", "--data", "x"], "--data is for estimating; --whole reads"),
        (["--merge", "forget", "retain", "--stream"], "--stream is for estimating"),
        (["--merge", "forget", "retain", "--batch-size", "2"], "--batch-size is for estimating"),
        (["--merge", "forget", "retain", "--batch-size", "8"], "--batch-size is for estimating"),
        (
            ["--whole", "whole", "--remove", "forget", "--estimator=grad"],
            "--estimator is for estimating; --whole reads",
        ),
        (["--merge", "forget", "retain", "--show-labels", "2"], "--show-labels needs data"),
        (["--data", "all.jsonl", "--show-labels", "2"], "--show-labels needs the model whose tokenizer"),
        (["--merge", "forget", "forget"], "5 of its 5 rows are among those of forget and would count twice"),
        (["--merge", "forget", "absent"], "absent: no such directory"),
        (["--whole", "retain", "--remove", "forget"], "5 of its 5 rows are not among those of retain"),
        (["--model", "base"], "an importance is estimated at a model on data: give --data"),
        ([], "an importance is estimated at a model on data: give --model and --data"),
    ],
)
def test_refusals(arguments: list[str], reason: str, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["importance", *arguments, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("perta: error: ")
    assert reason in error


@pytest.mark.parametrize("arguments", [["--merge", "forget", "retain"], ["--whole", "whole", "--remove", "forget"]])
@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("forget", "forget: is or contains the input forget"),
        ("forget/below", "forget/below: lies in the input forget"),
        ("new/../forget/x/y", "forget/x/y: lies in the input forget"),
    ],
)
def test_no_output_in_an_input(
    out: str, said: str, arguments: list[str], there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = fingerprint(there / "forget")
    assert cli.main(["importance", *arguments, "--out", out, "--overwrite"]) == 2
    assert f"{said}; choose another output directory" in capsys.readouterr().err
    assert fingerprint(there / "forget") == before


def test_what_does_not_go_together_is_told_without_torch(there: Path) -> None:
    for arguments in (["--merge", "a", "b", "--data", "x"], ["--whole", "a"], ["--model", "a"]):
        found = perta("importance", *arguments, "--out", "out", setup=_NO_TORCH)
        assert found.returncode == 2
        assert found.stderr.startswith("perta: error: ")
