"""Reports that version 0.1.0 wrote, on tiny checkpoints, are read by everything that reads reports."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from perta_fast import InputError, Report, verify
from perta_fast.records.recipe import read_recipe
from perta_fast.records.report_version_1 import from_version_1
from perta_fast.runs.inspect import inspect

WRITTEN = Path(__file__).with_name("written_by_0_1_0")
PLACE = "/written/"  # where the files say that they lie
RUNS = ["applied", "in_place", "unlearned", "streamed", "streamed_in_place"]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The files, and reports that name them where they are."""
    shutil.copytree(WRITTEN, tmp_path / "written")
    for path in (tmp_path / "written").glob("*/perta_report.json"):
        path.write_text(path.read_text().replace(PLACE, f"{tmp_path}/written/"))
    return tmp_path / "written"


@pytest.mark.parametrize("run", RUNS)
def test_reports_are_read(run: str) -> None:
    report = Report.load(WRITTEN / run)
    assert report.format_version == 2
    assert report.lam == 0.5 and report.tensors and report.summary()
    assert {record["one_by_one"] == [] for record in report.importance.values()} <= {True, False}


SETTINGS: dict[str, Any] = {
    "unlearned": {"at": "base", "max_length": None, "dtype": None, "stream": False, "schedule": None},
    "streamed": {
        "at": "model",
        "max_length": 100,
        "dtype": "float32",
        "stream": True,
        "schedule": {"batch_size": 8, "every": 1, "groups": 1, "overlap": True},
    },
    "streamed_in_place": {
        "at": "base",
        "estimator": "empirical-fisher",
        "max_length": None,
        "dtype": None,
        "stream": True,
        "schedule": None,
    },
}


@pytest.mark.parametrize("run", SETTINGS)
def test_texts_become_data(run: str) -> None:
    report = Report.load(WRITTEN / run)
    expected = {"estimator": "grad", "batch_size": 8, "device": "cpu", "processes": 1} | SETTINGS[run]
    assert report.settings == expected
    for role, count in (("forget", 5), ("retain", 7)):
        record = report.importance[f"{role}_importance"]
        assert (record["sample_count"], record["truncated_count"], record["one_by_one"]) == (count, 0, [])


def test_names_become_a_list() -> None:
    importance = Report.load(WRITTEN / "in_place").importance
    assert importance["forget_importance"]["one_by_one"] == ["a.weight", "b.weight"]
    assert importance["retain_importance"]["one_by_one"] == []


@pytest.mark.parametrize("run", ["unlearned", "streamed", "streamed_in_place"])
def test_recipes_are_read(run: str) -> None:
    recipe = {key: setting.value for key, setting in read_recipe(WRITTEN / run / "perta_report.json").settings.items()}
    assert recipe["base"] == f"{PLACE}job/base" and recipe["lam"] == "0.5" and "out" not in recipe


def test_an_output_is_verified(written: Path) -> None:
    found = verify(written / "applied", full=True, progress=False)
    assert not found.problems and not found.unchecked
    assert (found.files, found.recomputed) == (4, 2)
    damaged = written / "applied" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    assert verify(written / "applied", full=True, progress=False).problems


def test_an_output_is_inspected(written: Path) -> None:
    assert "unlearned with perta_fast:" in inspect(written / "applied").text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stream": "no", "batch_size": "many"}, "settings.batch_size is 'many', not a whole number"),
        ({"stream": "batches of some"}, "settings.stream is 'batches of some', not a schedule"),
        ({"stream": True}, "settings.stream is True, not text"),
    ],
)
def test_what_version_1_did_not_write_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_version_1({"settings": settings})
