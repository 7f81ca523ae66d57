"""Verification passes on what a run wrote and finds every kind of damage and of forgery."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import perta_fast as pf
from perta_fast.errors import InputError, PertaError
from perta_fast.records.file_hashes import HASHES, write_hashes
from perta_fast.records.report import Report
from perta_fast.runs import recomputed_tensors
from perta_fast.runs.apply import apply
from perta_fast.runs.verify import verify
from tests.support.checkpoints import fingerprint, write_checkpoint
from tests.support.inputs import BF16, COUNTER, F16, F32, FROZEN, HEAD, SHAPES, Inputs, write_inputs
from tests.support.json_mutation import damaged
from tests.support.models import write_job

TENSOR_COUNT = len(SHAPES) + 2
FILE_COUNT = 3 * 3 + 2 * 3 + 2  # two shards and an index for each of five inputs, two shards of output


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputed_tensors, "_CHUNK", 100)


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return write_inputs(tmp_path / "inputs", shards=2)


@pytest.fixture
def out(inputs: Inputs, tmp_path: Path) -> Path:
    """The output of rule grad, lambda 0.5."""
    apply(*inputs.all, rule="grad", lam=0.5, out=tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def bounded(inputs: Inputs, out: Path) -> Path:
    """The same as ``unlearn`` leaves it without --save-importance."""

    def forget_them(report: dict[str, Any]) -> None:
        for role in ("forget", "retain"):
            shutil.rmtree(inputs[role])
            report["inputs"][f"{role}_importance"]["kept"] = False

    change_report(out, forget_them)
    return out


def change_report(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = out / "perta_report.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    fix_list(out)


def fix_list(out: Path) -> None:
    """Make the list of the output's files agree with what is there."""
    report, path = Report.load(out), out / HASHES
    path.unlink()
    write_hashes(out, report)


def flip_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def forge(out: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one tensor of the output, in its place, and make the report agree with it."""
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            old = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            new = change(tensors[name].clone()).reshape(-1).view(torch.uint8).numpy().tobytes()
            content = path.read_bytes()
            assert content.count(old) == 1
            assert len(new) == len(old)
            assert new != old
            path.write_bytes(content.replace(old, new))
    fix_hashes(out)


def fix_hashes(out: Path) -> None:
    described = {
        path.name: {"bytes": path.stat().st_size, "blake3": blake3(path.read_bytes()).hexdigest()}
        for path in out.glob("*.safetensors")
    }
    change_report(out, lambda report: report["output"].update(files=described))


def next_value(tensor: torch.Tensor) -> torch.Tensor:
    """The last element moved to the neighbouring value."""
    flat = tensor.view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(99.0)) if tensor.is_floating_point() else flat[-1] + 1
    return tensor


def test_a_fresh_run_is_right(out: Path) -> None:
    before = fingerprint(out.parent)
    result = verify(out, full=True)
    assert (result.problems, result.unchecked) == ([], [])
    assert (result.files, result.recomputed, result.bounded) == (FILE_COUNT, TENSOR_COUNT, 0)
    assert f"{TENSOR_COUNT} tensors equal the reference's result bit for bit." in result.summary()
    assert result.summary().endswith("Nothing wrong was found.")
    assert fingerprint(out.parent) == before


def test_a_sample_is_checked_unless_all_are_asked_for(out: Path) -> None:
    result = verify(out)
    assert result.problems == []
    assert result.recomputed == recomputed_tensors.SAMPLED < TENSOR_COUNT


def test_a_sample_finds_what_is_in_it(out: Path) -> None:
    forge(out, "model.layers.0.up", next_value)
    found = [verify(out, seed=seed).problems for seed in range(12)]
    assert [] in found
    assert ["tensor model.layers.0.up is not what the inputs give"] in found


@pytest.mark.parametrize("types", [(BF16,) * 3 + (F32,) * 2, (F16, F32, BF16, BF16, F16)])
@pytest.mark.parametrize(
    "how",
    [
        {"rule": "fisher", "alpha": 0.3},
        {"rule": "grad", "p": 0.5, "threshold": 0.5},
        {"rule": "grad", "p": 1.7},
        {"rule": "fisher", "lam": 0.0},
    ],
)
def test_runs_of_every_kind_are_right(how: dict[str, Any], types: tuple[torch.dtype, ...], tmp_path: Path) -> None:
    apply(*write_inputs(tmp_path, types).all, **{"lam": 0.9} | how, out=tmp_path / "out")
    result = verify(tmp_path / "out", full=True)
    assert (result.problems, result.unchecked, result.recomputed) == ([], [], TENSOR_COUNT)


def test_the_plain_task_vector_is_recomputed(inputs: Inputs, tmp_path: Path) -> None:
    apply(*inputs.checkpoints, rule="tv", lam=2.0, out=tmp_path / "out")
    result = verify(tmp_path / "out", full=True)
    assert (result.problems, result.unchecked, result.recomputed) == ([], [], TENSOR_COUNT)
    forge(tmp_path / "out", FROZEN, next_value)
    assert verify(tmp_path / "out", full=True).problems == [f"tensor {FROZEN} is not what the inputs give"]


def test_an_output_may_be_moved(out: Path) -> None:
    result = verify(out.rename(out.with_name("moved")), full=True)
    assert (result.problems, result.recomputed) == ([], TENSOR_COUNT)


@pytest.mark.parametrize("place", [0, 9, 200, -1])
@pytest.mark.parametrize("shard", [0, 1])
def test_a_flipped_bit_in_the_output_is_found(shard: int, place: int, out: Path) -> None:
    path = sorted(out.glob("*.safetensors"))[shard]
    flip_bit(path, place)
    result = verify(out)
    assert result.problems == [f"{path} has changed since the run"]
    assert f"WRONG: {path} has changed since the run." in result.summary()
    assert result.summary().endswith("Verification failed.")


@pytest.mark.parametrize("role", ["model", "base", "tuned", "forget", "retain"])
@pytest.mark.parametrize("file", [0, 1, 2])
def test_a_flipped_bit_in_an_input_is_found(role: str, file: int, inputs: Inputs, out: Path) -> None:
    path = sorted(inputs[role].iterdir())[file]
    flip_bit(path, -1)
    assert verify(out).problems == [f"{path} has changed since the run"]


def test_a_missing_shard_of_the_output_is_found(out: Path) -> None:
    path = sorted(out.glob("*.safetensors"))[0]
    path.unlink()
    assert verify(out).problems == [f"{path} is gone"]


@pytest.mark.parametrize("role", ["model", "base", "tuned"])
def test_a_missing_checkpoint_leaves_the_tensors_unchecked(role: str, inputs: Inputs, out: Path) -> None:
    shutil.rmtree(inputs[role])
    result = verify(out)
    assert result.problems == []
    assert (result.files, result.recomputed, result.bounded) == (FILE_COUNT - 3, 0, 0)
    assert result.unchecked[0].startswith(f"{role}: {inputs[role]}")
    assert result.unchecked[1:] == [f"tensors, because of {role}"]
    assert f"Not checked: tensors, because of {role}." in result.summary()


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_a_missing_importance_leaves_the_bounds(role: str, inputs: Inputs, out: Path) -> None:
    shutil.rmtree(inputs[role])
    result = verify(out, full=True)
    assert result.problems == []
    assert len(result.unchecked) == 2
    assert result.bounded > 0
    assert result.bounded + result.recomputed == TENSOR_COUNT


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if 0 not in shape] + [FROZEN, COUNTER])
def test_a_wrong_tensor_is_found_though_its_hash_was_fixed(name: str, out: Path) -> None:
    forge(out, name, next_value)
    result = verify(out, full=True)
    assert result.problems == [f"tensor {name} is not what the inputs give"]
    assert result.recomputed == TENSOR_COUNT - 1


def test_a_tensor_put_back_is_found_though_the_report_calls_it_copied(inputs: Inputs, out: Path) -> None:
    forge(out, HEAD, lambda _: inputs.tensors["model"][HEAD])

    def call_it_copied(report: dict[str, Any]) -> None:
        for row in report["tensors"]:
            row["action"] = "copied: not covered by the importance"

    change_report(out, call_it_copied)
    assert verify(out, full=True).problems == [f"tensor {HEAD} is not what the inputs give"]


def test_another_strength_in_the_report_is_found(out: Path) -> None:
    change_report(out, lambda report: report.update(lam=0.75))
    assert len(verify(out, full=True).problems) == len(SHAPES) - 1  # all but the empty one


def test_another_layout_is_found_though_the_hash_was_fixed(out: Path) -> None:
    path = sorted(out.glob("*.safetensors"))[0]
    save_file(load_file(path), path, {"another": "header"})
    fix_hashes(out)
    problems = verify(out, full=True).problems
    assert len(problems) == 1
    assert problems[0].startswith(f"{path} is not laid out as ")


@pytest.mark.parametrize("role", ["output", "model", "base", "tuned", "forget_importance"])
def test_a_shard_that_the_report_does_not_list_is_found(role: str, out: Path) -> None:
    shard = sorted(out.glob("*.safetensors"))[1].name
    if "importance" in role:
        shard = shard.replace("model", "importance")

    def hide(report: dict[str, Any]) -> None:
        record = report["output"] if role == "output" else report["inputs"][role]
        del record["files"][shard]

    change_report(out, hide)
    problems = verify(out, full=True).problems
    assert len(problems) == 1
    assert problems[0].endswith(f"{shard} is not in the report")


def test_a_model_replaced_by_another_is_found(inputs: Inputs, out: Path) -> None:
    shutil.rmtree(inputs["model"])
    write_checkpoint(inputs["model"], inputs.tensors["base"], 2)
    shard = inputs["model"] / "model-00001-of-00002.safetensors"
    assert f"{shard} has changed since the run" in verify(out).problems


class TestWithoutImportances:
    def test_what_lies_in_bounds_passes(self, bounded: Path) -> None:
        result = verify(bounded, full=True)
        assert result.problems == []
        assert result.unchecked == ["weights, because the run did not keep the importances"]
        assert (result.files, result.bounded) == (FILE_COUNT - 6, len(SHAPES) - 1)
        assert result.recomputed == 3  # two copies, and the empty tensor
        assert "lie between theta and theta - lambda * tau everywhere" in result.summary()

    @pytest.mark.parametrize("end", ["theta", "whole step"])
    def test_a_value_just_outside_is_found(self, end: str, inputs: Inputs, bounded: Path) -> None:
        theta = inputs.tensors["model"][HEAD]
        whole = inputs.expected(None, 0.5)[HEAD]
        edge, inside = (theta, whole) if end == "theta" else (whole, theta)

        def spoil(tensor: torch.Tensor) -> torch.Tensor:
            tensor[3, 2] = edge[3, 2] + (edge[3, 2] - inside[3, 2]).sign() * 1e-6
            return tensor

        forge(bounded, HEAD, spoil)
        assert verify(bounded, full=True).problems == [f"tensor {HEAD} is not what the inputs give"]

    @pytest.mark.parametrize("name", [FROZEN, COUNTER])
    def test_a_copy_that_is_none_is_found(self, name: str, bounded: Path) -> None:
        forge(bounded, name, next_value)
        assert verify(bounded, full=True).problems == [f"tensor {name} is not what the inputs give"]

    def test_a_value_that_is_no_number_is_found(self, bounded: Path) -> None:
        forge(bounded, HEAD, lambda tensor: tensor.fill_(float("nan")))
        assert verify(bounded, full=True).problems == [f"tensor {HEAD} is not what the inputs give"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda report: report.update(rule="magic"), "rule is 'magic'"),
        (lambda report: report.update(p=-1.0), "p is -1.0"),
        (lambda report: report.update(lam=float("inf")), "lam is inf"),
        (lambda report: report["inputs"].pop("base"), "names no base"),
    ],
)
def test_a_report_that_no_run_can_have_written_is_refused(
    change: Callable[[dict[str, Any]], object], reason: str, out: Path
) -> None:
    change_report(out, change)
    with pytest.raises(InputError, match=rf"perta_report\.json: {reason}"):
        verify(out)


@given(data=st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_report_never_breaks_the_check(data: st.DataObject, out: Path) -> None:
    path = out / "perta_report.json"
    original = out.parent / "report.json"
    if not original.exists():
        shutil.copyfile(path, original)
    path.write_text(json.dumps(data.draw(damaged(json.loads(original.read_text())))))
    before = fingerprint(out)
    try:
        assert verify(out, full=True).summary()
    except PertaError as error:
        assert str(out) in str(error) or str(out.parent) in str(error)
    assert fingerprint(out) == before


def test_other_powers_are_recomputed_up_to_rounding(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "power"
    apply(*inputs.all, rule="grad", p=1.7, lam=0.5, out=out)
    result = verify(out, full=True)
    assert not result.problems
    assert result.summary().splitlines()[0].endswith("tensors were checked, up to the last bit of a power.")
    name = next(name for name, tensor in inputs.tensors["forget"].items() if tensor.numel() > 8)
    forge(out, name, lambda tensor: (tensor.double() * (1 + 2**-5)).to(tensor.dtype))
    assert [problem for problem in verify(out, full=True).problems if name in problem]


def test_the_outcome_is_said_first(inputs: Inputs, out: Path) -> None:
    claim = f"{out} holds what rule grad and lambda 0.5 give on the inputs named"
    first = verify(out, full=True).summary().splitlines()[0]
    checked = f"{FILE_COUNT} files and {TENSOR_COUNT} of {TENSOR_COUNT} tensors were checked"
    assert first == f"{claim}: {checked}, bit for bit."
    flip_bit(sorted(out.glob("*.safetensors"))[0], -1)
    assert verify(out).summary().splitlines()[0] == f"Not confirmed, as something is wrong: {claim}."


class TestData:
    """Data files: what became of them says nothing against the output."""

    @pytest.fixture
    def data(self, out: Path) -> Path:
        path = out.parent / "forget.jsonl"
        path.write_bytes(b"lines")
        record = {"path": str(path), "blake3": blake3(b"lines").hexdigest(), "samples": 1, "truncated": 0}
        change_report(out, lambda report: report["data"].update(forget=record))
        return path

    def test_unchanged(self, data: Path, out: Path) -> None:
        result = verify(out)
        assert (result.files, result.changed, result.unchecked) == (FILE_COUNT + 1, [], [])

    def test_changed(self, data: Path, out: Path) -> None:
        flip_bit(data, 0)
        result = verify(out)
        assert (result.files, result.changed, result.problems) == (FILE_COUNT, [f"forget data {data}"], [])
        assert f"Changed since the run, which is no fault of the output: forget data {data}." in result.summary()

    def test_gone(self, data: Path, out: Path) -> None:
        data.unlink()
        result = verify(out)
        assert (result.unchecked, result.changed) == ([f"forget data: {data} is gone"], [])


class TestInPlace:
    @pytest.fixture
    def model(self, inputs: Inputs) -> Path:
        apply(*inputs.all, rule="grad", lam=0.5, in_place=True, progress=False)
        return inputs["model"]

    def test_what_can_be_checked(self, model: Path) -> None:
        result = verify(model, full=True)
        assert (result.problems, result.recomputed, result.bounded) == ([], 0, 0)
        assert result.files == FILE_COUNT - 3  # the model as it was
        assert result.unchecked == ["tensors, because the run changed the model in place and its old values are gone"]
        assert result.summary().startswith("No tensor was computed again, so it is not known whether ")
        assert f"whether {model} holds what rule grad" in result.summary()

    def test_a_flipped_bit(self, model: Path) -> None:
        path = sorted(model.glob("*.safetensors"))[1]
        flip_bit(path, -1)
        assert verify(model).problems == [f"{path} has changed since the run"]

    def test_a_tensor_of_another_shape(self, model: Path) -> None:
        def reshape(report: dict[str, Any]) -> None:
            next(row for row in report["tensors"] if row["name"] == HEAD)["shape"] = [5, 37]

        change_report(model, reshape)
        assert verify(model).problems == [f"tensor {HEAD} is not of the type and shape in the report"]

    def test_a_base_that_is_the_model_is_gone_too(self, inputs: Inputs) -> None:
        model = inputs["model"]
        apply(model, model, inputs["tuned"], rule="tv", lam=1.0, in_place=True, progress=False)
        result = verify(model)
        assert (result.problems, result.files) == ([], 2 + 3)  # the output, and what the tuned one has


@pytest.mark.parametrize("damage", [b"", b"\x01" * 64])
def test_weights_that_an_adapter_did_not_need(damage: bytes, tmp_path: Path) -> None:
    """Only the headers of the base were read: what becomes of it says nothing against the output."""
    job = write_job(tmp_path)
    pf.tune(job.base, job.forget, tmp_path / "adapter", epochs=3, progress=False)
    out = tmp_path / "out"
    pf.apply(job.model, job.base, tmp_path / "adapter", rule="tv", out=out, progress=False)
    assert pf.verify(out, progress=False).recomputed
    shard = sorted(job.base.glob("*.safetensors"))[0]
    shard.write_bytes(damage) if damage else shard.unlink()
    result = pf.verify(out, progress=False)
    assert result.problems == [] and result.recomputed == 0 and result.companions
    (why,) = result.unchecked
    assert why.startswith("tensors, because an input cannot be opened any more: ") and str(job.base) in why
    (out / "config.json").write_text("{}")
    assert pf.verify(out, progress=False).problems == [f"{out / 'config.json'} has changed since the run"]
