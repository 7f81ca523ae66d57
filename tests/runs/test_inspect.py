"""What ``perta inspect`` says of a checkpoint, an importance and a run."""

from pathlib import Path

import pytest

from perta_fast.errors import InputError
from perta_fast.runs.apply import apply
from perta_fast.runs.inspect import describe
from tests.support.inputs import BF16, F32, Inputs, write_inputs
from tests.support.models import Job


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"), (BF16, BF16, BF16, F32, F32), shards=3)


def elements(inputs: Inputs, role: str) -> int:
    return sum(tensor.numel() for tensor in inputs.tensors[role].values() if tensor.is_floating_point())


def test_a_checkpoint(inputs: Inputs) -> None:
    text = describe(inputs["model"])
    assert text.startswith(f"{inputs['model']}: checkpoint\n")
    assert f"{len(inputs.tensors['model'])} tensors in 3 shards" in text
    assert f"elements: {elements(inputs, 'model'):,} BF16, 11 I64" in text


def test_what_transformers_wrote(job: Job) -> None:
    assert "21 tensors in 2 shards" in describe(job.model)


def test_an_importance_with_its_origin(inputs: Inputs) -> None:
    text = describe(inputs["forget"])
    assert text.startswith(f"{inputs['forget']}: importance\n")
    assert f"elements: {elements(inputs, 'forget'):,} F32" in text
    for line in ("estimator: grad", "sample_count: 3", "evaluated_at: somewhere", "data_hash: forget"):
        assert f"\n  {line}" in text


def test_every_tensor_on_request(inputs: Inputs) -> None:
    text = describe(inputs["model"], every_tensor=True)
    for name, tensor in inputs.tensors["model"].items():
        dtype = "BF16" if tensor.is_floating_point() else "I64"
        assert f"  {name}  {dtype}  {list(tensor.shape)}  model-" in text
        assert name not in describe(inputs["model"])


def test_a_run_with_its_settings_and_inputs(inputs: Inputs, tmp_path: Path) -> None:
    report = apply(*inputs.all, rule="grad", lam=0.25, out=tmp_path / "out")
    text = describe(tmp_path / "out")
    assert text.startswith(f"{tmp_path / 'out'}: checkpoint\n")
    assert "rule grad, lambda 0.25, p 1, alpha 1" in text
    for role, record in report.inputs.items():
        assert f"  {role}: {record['path']}" in text


def test_a_damaged_report_is_named(inputs: Inputs, tmp_path: Path) -> None:
    apply(*inputs.checkpoints, rule="tv", out=tmp_path / "out")
    (tmp_path / "out" / "perta_report.json").write_text("{}")
    with pytest.raises(InputError, match=r"out/perta_report\.json: is not a report"):
        describe(tmp_path / "out")


@pytest.mark.parametrize("name", ["nowhere", "x" * 300])
def test_what_is_not_there_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=name):
        describe(tmp_path / name)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds neither model"):
        describe(tmp_path)
