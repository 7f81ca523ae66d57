"""What ``perta inspect`` says of a checkpoint, an importance and a run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perta_fast import cli
from perta_fast.errors import InputError
from perta_fast.progress import Event
from perta_fast.runs.apply import apply
from perta_fast.runs.inspect import inspect
from tests.checkpoints.test_adapters import make_adapter, rename
from tests.support.checkpoints import draw, read_checkpoint, write_checkpoint
from tests.support.inputs import BF16, F32, Inputs, write_inputs
from tests.support.models import Job, llama


def describe(path: Path, **how: Any) -> str:
    return inspect(path, **how).text()


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


def test_what_transformers_wrote(job: Job, tmp_path: Path) -> None:
    assert "21 tensors in 2 shards" in describe(job.model)
    assert "1 tensor in 1 shard, " in describe(write_checkpoint(tmp_path / "one", {"a.weight": torch.zeros(2)}))


def test_an_importance_with_its_origin(inputs: Inputs) -> None:
    text = describe(inputs["forget"])
    assert text.startswith(f"{inputs['forget']}: importance\n")
    assert f"elements: {elements(inputs, 'forget'):,} F32" in text
    for line in ("estimator: grad", "sample_count: 3", "evaluated_at: somewhere", "data_hash: forget"):
        assert f"\n  {line}" in text


def test_a_ratio_with_both_origins(inputs: Inputs, tmp_path: Path) -> None:
    roles = ("forget", "retain")
    made = [f"--{role}-importance={inputs[role]}" for role in roles]
    assert cli.main(["ratio", *made, f"--out={tmp_path / 'ratio'}", "--quiet"]) == 0
    found = inspect(tmp_path / "ratio")
    assert (found.record["kind"], list(found.record["metadata"])) == ("ratio", list(roles))
    assert found.text().startswith(f"{tmp_path / 'ratio'}: ratio of importances\n")
    for role in roles:
        assert found.record["metadata"][role]["data_hash"] == role and f"\n  {role} data_hash: {role}" in found.text()


def test_the_record_of_an_importance_and_of_each_tensor(inputs: Inputs) -> None:
    record = inspect(inputs["forget"], every_tensor=True).record
    assert record["kind"] == "importance" and record["path"] == str(inputs["forget"])
    assert record["metadata"]["estimator"] == "grad" and record["metadata"]["sample_count"] == "3"
    assert record["elements"] == {"F32": elements(inputs, "forget")}
    assert {row["name"] for row in record["tensors"]} == inputs.tensors["forget"].keys()
    assert "report" not in record and "task_vector" not in record and "quantised" not in record


def test_a_quantised_model(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", {"inner": draw((2, 3))})
    (path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    found = inspect(path)
    assert (found.record["kind"], found.record["quantised"]) == ("checkpoint", "gptq")
    assert f"\n  quantised: gptq (quantization_config in {path / 'config.json'})\n  " in found.text()


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


Tensors = dict[str, Tensor]
ROWS = {"model.embed_tokens.weight": draw((7, 3)), "inner": draw((5, 3), seed=1), "steps": torch.arange(4)}
MOVED = {"inner": ROWS["inner"] + 1}
RESIZED = {"model.embed_tokens.weight": draw((9, 3))}
EMPTY = {"inner": torch.empty(0)}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "zero in all 2 tensors: it has the same values as .*base\n  1 tensors left aside: not floating point$"),
        (MOVED, "not zero: 1 tensors differ, 1 are the same\n  1 tensors left aside: not floating point$"),
        (RESIZED, "not zero: 1 tensors differ, 1 are the same\n.*\n  model.embed_tokens.weight: rows in common only"),
        (EMPTY, r"none, .*tensor inner has shape \[0\]: .*gather"),
        ({"inner": draw((2, 3))}, "none, tensor inner: shape .* these are not of one model"),
    ],
)
def test_the_task_vector_of_a_checkpoint(changes: Tensors, text: str, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", ROWS)
    tuned = write_checkpoint(tmp_path / "tuned", ROWS | changes)
    found = describe(tuned, base=base)
    assert found.startswith(describe(tuned) + "\n")
    assert re.search(rf"\ntask vector from {base}: {text}", found, re.IGNORECASE), found
    assert "task vector" not in describe(tuned)


def test_the_base_itself_and_one_without_common_tensors(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", ROWS)
    assert "zero in all 2 tensors: it is the same checkpoint as base" in describe(base, base=base)
    other = write_checkpoint(tmp_path / "other", {"elsewhere": draw((2, 3))})
    assert f"task vector from {base}: none, no tensor has the same name; {other}: lacks" in describe(other, base=base)


@pytest.mark.filterwarnings("ignore")
def test_the_task_vector_of_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(tmp_path, llama, {"target_modules": ["q_proj"]})
    base = tmp_path / "base"
    assert cli.main(["inspect", str(adapter), "--base", str(base)]) == 0
    assert f"task vector from {base}: not zero: 2 tensors differ, 19 are the same" in capsys.readouterr().out
    other = write_checkpoint(tmp_path / "other", {"elsewhere": draw((2, 3))})
    assert f"task vector from {other}: none, {adapter}: adapts model.layers" in describe(adapter, base=other)
    record = inspect(adapter).record
    (factors,) = record["matrices"]
    assert (record["kind"], record["peft_type"], record["adds_nothing"]) == ("adapter", "LORA", False)
    assert (record["tensor_count"], factors["count"], record["whole_tensors"], record["merged_by_peft"]) == (4, 2, 0, 0)
    assert f"\n  2 matrices of rank {factors['rank']}, scale {factors['scale']:g}" in describe(adapter)
    rename(adapter, lambda tensors: {n: t * 0 if "lora_B" in n else t for n, t in tensors.items()})
    assert inspect(adapter).record["adds_nothing"] is True
    assert "\n  these add nothing: factors A or B are zero, as before training" in describe(adapter)
    assert "zero in all 21 tensors: factors A or B are all zero, as before training" in describe(adapter, base=base)
    rename(adapter, lambda tensors: {})
    assert cli.main(["inspect", str(adapter), "--base", str(base)]) == 2
    assert "the adapter has no tensors, so it changes nothing" in capsys.readouterr().err


def test_an_importance_has_no_task_vector(inputs: Inputs) -> None:
    with pytest.raises(InputError, match="an importance is not tuned from a base"):
        describe(inputs["forget"], base=inputs["base"])


def test_progress_and_damaged_bases(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", ROWS)
    events: list[Event] = []
    describe(base, base=write_checkpoint(tmp_path / "copy", read_checkpoint(base)), progress=events.append)
    assert events[-1].phase == "comparing" and events[-1].done == events[-1].total > 0
    with pytest.raises(InputError, match="nowhere"):
        describe(base, base=tmp_path / "nowhere")
