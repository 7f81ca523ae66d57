"""The numbers behind the plots, each found again by other means."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from perta_fast import apply
from perta_fast.errors import InputError
from perta_fast.records.report import Report, TensorReport
from perta_fast.reporting import weight_distribution as weights
from perta_fast.reporting.page import Evidence, compose
from perta_fast.reporting.tensor_positions import Position, position_of, weight_grids
from perta_fast.reporting.verified import verify_for_page
from tests.support.inputs import Inputs, write_inputs
from tests.support.json_mutation import damaged

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"grad": (1.0, 2.0, None), "fisher": (2.0, 1.0, None), "empirical-fisher": (1.0, 0.5, 0.3)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"), shards=2)


@pytest.fixture(scope="module")
def report(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Report:
    out = tmp_path_factory.mktemp("run") / "out"
    return apply(*inputs.all, rule="grad", lam=0.5, out=out, progress=False)


@pytest.mark.parametrize("rule", SETTINGS)
def test_histogram(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy on the full arrays, read by the safetensors library; several chunks a tensor."""
    monkeypatch.setattr(weights, "_CHUNK", 100)
    inputs = write_inputs(tmp_path, shards=2, estimator="grad" if rule == "fisher" else rule)
    p, alpha, threshold = SETTINGS[rule]
    made = apply(*inputs.all, rule=rule, lam=1.0, alpha=alpha, threshold=threshold, out=tmp_path / "out")
    found = weights.distribution(made, progress=False)
    assert isinstance(found, weights.Distribution)
    w = weights_by_numpy(inputs, p, alpha, threshold)
    assert found.total == w.size
    assert found.above_half == np.count_nonzero(w > 0.5)
    assert found.counts.tolist() == np.histogram(w, weights.BINS, (0, 1))[0].tolist()


def weights_by_numpy(inputs: Inputs, p: float, alpha: float, threshold: float | None) -> "np.ndarray[Any, Any]":
    arrays = []
    for role in ("forget", "retain"):
        tensors = {
            name: array for path in inputs[role].glob("*.safetensors") for name, array in load_file(path).items()
        }
        arrays.append(np.concatenate([abs(tensors[name].ravel()) for name in sorted(tensors)]))
    forget, retain = (array if p == 1 else array * array for array in arrays)
    total = forget + np.float32(alpha) * retain
    w = np.divide(forget, total, out=np.zeros_like(forget), where=total != 0)
    return w if threshold is None else (w > np.float32(threshold)).astype(np.float32)


def test_importances_of_another_model_are_refused(report: Report) -> None:
    other = replace(report, tensors=[replace(row, shape=[3, 1]) for row in report.tensors])
    with pytest.raises(InputError, match=r"has no importance of tensor .* of shape"):
        weights.distribution(other, progress=False)


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("model.layers.3.mlp.up_proj.weight", Position("model.layers", 3, "mlp.up_proj")),
        ("transformer.h.11.attn.c_attn.bias", Position("transformer.h", 11, "attn.c_attn.bias")),
        ("model.layers.0.mlp.experts.7.w1.weight", Position("model.layers", 0, "mlp.experts.*.w1")),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("0.weight", None),
        ("model.layers.9999999.weight", None),
        ("model.layers.٣.weight", None),
        ("", None),
    ],
)
def test_positions(name: str, position: Position | None) -> None:
    assert position_of(name) == position


def test_mean_weights_by_layer() -> None:
    """Two experts share a cell, by their elements; a cell without a tensor is not a number."""
    rows = [
        TensorReport("a.0.x.1.up", "F32", [2, 3], "subtracted", 0.5),
        TensorReport("a.0.x.2.up", "F32", [2], "subtracted", 0.1),
        TensorReport("a.1.down", "F32", [4], "subtracted", 0.25),
        TensorReport("b.2.up", "F32", [1], "subtracted", 1.0),
        TensorReport("a.1.frozen", "F32", [4], "copied: not covered by the importance"),
        TensorReport("head", "F32", [4], "subtracted", 0.75),
    ]
    first, second = weight_grids(rows)
    assert (first.stack, first.layers, first.kinds) == ("a", [0, 1], ["x.*.up", "down"])
    np.testing.assert_allclose(first.rows, [[(6 * 0.5 + 2 * 0.1) / 8, np.nan], [np.nan, 0.25]])
    assert (second.stack, second.layers, second.kinds, second.rows) == ("b", [2], ["up"], [[1.0]])


@given(data=st.data())
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_report_is_refused_or_can_be_drawn(data: st.DataObject, report: Report, tmp_path: Path) -> None:
    report.save(tmp_path)
    content = data.draw(damaged(json.loads((tmp_path / "perta_report.json").read_text())))
    (tmp_path / "perta_report.json").write_text(json.dumps(content))
    try:
        loaded = Report.load(tmp_path)
        page, _ = compose(
            Evidence(
                loaded, tmp_path, verify_for_page(tmp_path, False), [], [], weights.distribution(loaded, False), None
            )
        )
    except InputError:
        return
    assert page.endswith(b"</html>\n")
