"""What a report says, each figure found again by other means, and what is not taken for a report."""

import copy
import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perta_fast import compiled
from perta_fast.errors import InputError
from perta_fast.records.report import Report
from perta_fast.runs.apply import apply
from tests.support.checkpoints import write_importance
from tests.support.inputs import COUNTER, FROZEN, SHAPES, Inputs, weights, write_inputs
from tests.support.json_mutation import damaged


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"), shards=3)


@pytest.fixture(scope="module")
def out(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported") / "out"
    apply(*inputs.all, rule="grad", lam=0.5, alpha=2.0, threshold=0.3, out=folder, threads=2)
    return folder


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "perta_report.json").read_text())
    return content


def test_settings(report: dict[str, Any]) -> None:
    found = [report[key] for key in ("rule", "lam", "p", "alpha", "threshold", "threads")]
    assert found == ["grad", 0.5, 1.0, 2.0, 0.3, 2]
    assert report["instruction_set"] in compiled.kernels().build_info()["instruction_sets"]
    assert report["versions"]["torch"] == metadata.version("torch")
    assert report["versions"]["python"] == sys.version.split()[0]
    assert datetime.fromisoformat(report["started"]) <= datetime.fromisoformat(report["finished"])


def test_tensors(report: dict[str, Any], inputs: Inputs) -> None:
    weigh = weights(1, 2.0, 0.3)
    expected = inputs.expected(weigh, 0.5)
    rows = {row["name"]: row for row in report["tensors"]}
    assert rows.keys() == expected.keys()
    assert rows[FROZEN]["action"] == "copied: not covered by the importance"
    assert rows[COUNTER]["action"] == "copied: not floating point"
    assert (rows[COUNTER]["dtype"], rows[COUNTER]["shape"]) == ("I64", [11])
    assert rows["model.layers.0.none"]["mean_weight"] is None
    for name, shape in SHAPES.items():
        row, theta, result = rows[name], inputs.tensors["model"][name], expected[name]
        assert (row["dtype"], row["shape"]) == ("F32", list(shape))
        if theta.numel() == 0:
            continue
        w = weigh(inputs.tensors["forget"][name], inputs.tensors["retain"][name])
        assert row["action"] == "subtracted"
        assert row["changed"] == int((result != theta).sum())
        assert row["mean_weight"] == pytest.approx(float(w.double().mean()), rel=1e-6)
        change = float((result.double() - theta).norm() / theta.double().norm())
        assert row["relative_change"] == pytest.approx(change, rel=1e-4)


def test_counts(report: dict[str, Any]) -> None:
    assert report["counts"] == {
        "subtracted": len(SHAPES) - 1,
        "copied: task vector is zero": 1,  # the empty tensor
        "copied: not covered by the importance": 1,
        "copied: not floating point": 1,
    }


def test_bytes(report: dict[str, Any], inputs: Inputs) -> None:
    covered = inputs.tensors["forget"].keys()
    moved = sum(tensor.nbytes for tensor in inputs.tensors["model"].values()) * 2
    moved += sum(all_[name].nbytes for r, all_ in inputs.tensors.items() if r != "model" for name in covered)
    phase = report["phases"]["apply"]
    assert phase["bytes"] == moved
    assert phase["gb_per_s"] == pytest.approx(moved / phase["seconds"] / 1e9)


def test_hashes(report: dict[str, Any], inputs: Inputs, out: Path) -> None:
    roles = {"forget": "forget_importance", "retain": "retain_importance"}
    assert len(report["inputs"]) == 5
    for path in inputs.all:
        record = report["inputs"][roles.get(path.name, path.name)]
        assert record["path"] == str(path)
        assert record["files"] == described(sorted(path.iterdir()))
    assert report["output"] == {"path": str(out), "files": described(sorted(out.glob("*.safetensors")))}


def described(paths: list[Path]) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"bytes": path.stat().st_size, "blake3": blake3(path.read_bytes()).hexdigest()} for path in paths
    }


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="told apart on Linux only")
def test_memory(report: dict[str, Any]) -> None:
    memory = report["memory"]
    assert 0 < memory["anonymous_bytes_at_start"] <= memory["peak_anonymous_bytes"]
    assert memory["peak_anonymous_bytes"] <= memory["peak_resident_bytes"]
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert memory["peak_resident_bytes"] <= largest + (1 << 20)  # the system counts both to within some pages


def test_origin_of_the_importances(report: dict[str, Any]) -> None:
    for role in ("forget", "retain"):
        assert report["importance"][f"{role}_importance"]["data_hash"] == role
    assert report["warnings"] == []


def test_what_is_returned_is_what_is_written(inputs: Inputs, tmp_path: Path) -> None:
    assert apply(*inputs.all, lam=1.0, out=tmp_path / "out") == Report.load(tmp_path / "out")


def test_a_warning_comes_once(inputs: Inputs, tmp_path: Path) -> None:
    report = apply(*inputs.all, lam=1.0, out=tmp_path / "out")
    for text in ("first", "second", "first"):
        report.warn(text)
    assert report.warnings == ["first", "second"]


def test_importances_of_the_same_data_are_warned_about(inputs: Inputs, tmp_path: Path) -> None:
    retain = write_importance(tmp_path / "retain", inputs.tensors["retain"], data_hash="forget")
    report = apply(*inputs.all[:4], retain, lam=1.0, out=tmp_path / "out")
    assert report.warnings == ["forget and retain importance were estimated on the same data"]
    assert report.warnings[0] in report.summary()


def test_importances_taken_at_different_places_are_warned_about(inputs: Inputs, tmp_path: Path) -> None:
    retain = write_importance(tmp_path / "retain", inputs.tensors["retain"], evaluated_at="elsewhere")
    report = apply(*inputs.all[:4], retain, lam=1.0, out=tmp_path / "out")
    assert len(report.warnings) == 1
    assert "somewhere" in report.warnings[0]
    assert "elsewhere" in report.warnings[0]


def test_a_path_that_is_not_unicode_comes_back_from_the_report(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"out \xff \xc3\xbc")
    apply(*inputs.checkpoints, rule="tv", lam=1.0, out=out)
    assert Report.load(out).output["path"] == str(out)
    assert "ü" in (out / "perta_report.json").read_text(encoding="utf-8")


def test_a_missing_report_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"perta_report.json: cannot be read: .*is this the output of a run"):
        Report.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 99999])
def test_a_report_that_is_not_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "perta_report.json").write_bytes(content)
    with pytest.raises(InputError, match=r"perta_report.json: is not JSON"):
        Report.load(tmp_path)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a later version": lambda content: content.update(format_version=3),
    "a key too many": lambda content: content.update(more=1),
    "a key too few": lambda content: content.pop("rule"),
    "a number as text": lambda content: content.update(lam="1"),
    "true for a number": lambda content: content.update(lam=True),
    "a number beyond all": lambda content: content.update(lam=10**400),
    "an input without files": lambda content: content["inputs"]["model"].pop("files"),
    "a file without a hash": lambda content: content["output"]["files"].update(x={"bytes": 1}),
    "a tensor without a name": lambda content: content["tensors"][0].pop("name"),
    "a shape that is no list": lambda content: content["tensors"][0].update(shape=3),
    "a phase without seconds": lambda content: content["phases"]["apply"].pop("seconds"),
    "a warning that is no text": lambda content: content["warnings"].append(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_malformed_report_is_refused(change: str, report: dict[str, Any], tmp_path: Path) -> None:
    content = copy.deepcopy(report)
    CHANGES[change](content)
    (tmp_path / "perta_report.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"perta_report.json: is not a report that this version understands"):
        Report.load(tmp_path)


@given(data=st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_report_is_refused_or_can_be_shown(
    data: st.DataObject, report: dict[str, Any], tmp_path: Path
) -> None:
    content = data.draw(damaged(report))
    (tmp_path / "perta_report.json").write_text(json.dumps(content))
    try:
        found = Report.load(tmp_path)
    except InputError:
        return
    assert found.summary()
    kept = {key: json.dumps(value) for key, value in content.items() if key != "tensors"}
    assert {key: json.dumps(value) for key, value in asdict(found).items() if key in kept} == kept


def test_a_report_from_before_in_place_runs_is_read(report: dict[str, Any], tmp_path: Path) -> None:
    older = {key: value for key, value in report.items() if key not in ("in_place", "resumed", "settings")}
    (tmp_path / "perta_report.json").write_text(json.dumps(older))
    found = Report.load(tmp_path)
    assert (found.in_place, found.resumed, found.settings) == (False, 0, {})
