"""Weights in other files beside the shards, and an adapter beside a model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from perta_fast import choose, cli, unlearn
from perta_fast.errors import InputError
from perta_fast.models import loading
from perta_fast.records.report import Report
from perta_fast.runs.apply import apply
from perta_fast.runs.verify import verify
from tests.checkpoints.test_adapters import make_adapter
from tests.support.checkpoints import draw, fingerprint, read_checkpoint, same_bytes
from tests.support.inputs import Inputs, write_inputs
from tests.support.models import Job, llama, write_job

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]

OTHERS = [
    "consolidated.safetensors",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "consolidated.00.pth",
    "model.pt",
    "last.ckpt",
    "model-q4.gguf",
    "tf_model.h5",
    "flax_model.msgpack",
    "weights.npz",
    "model.safetensors.bak",
    "MODEL.GGUF",
    "model.safetensors~",
    "rust_model.ot",
    "weights.tar.gz",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "original/consolidated.00.pth",
    "checkpoint-500/model.safetensors",
    "global_step5/mp_rank_00_model_states.pt",
    "onnx/model.onnx",
    ".git/lfs/objects",
]
HARMLESS = [
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "sampler.bin",
    "rng_state.pth",
    "rng_state_3.pth",
    "tokenizer.model",
    "model.safetensors.md5",
    "forget/importance.safetensors",
    ".cache/huggingface/download/model.safetensors.metadata",
]


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return write_inputs(tmp_path / "inputs", shards=2)


def put(folder: Path, name: str) -> None:
    path = folder / name
    if name == ".git/lfs/objects":
        path /= "ab/cd/abcd"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"{}")


@pytest.mark.parametrize("name", OTHERS)
def test_in_place_each_is_named_and_nothing_is_changed(name: str, inputs: Inputs) -> None:
    put(inputs["model"], name)
    before = fingerprint(inputs.folder)
    with pytest.raises(InputError, match=rf"beside its shards lie other weights.*: {name}; .*pass leave_others"):
        apply(*inputs.checkpoints, rule="tv", in_place=True)
    assert fingerprint(inputs.folder) == before


@pytest.mark.parametrize("others", [OTHERS[:20], OTHERS[20:]])
def test_in_place_all_are_named_at_once(others: list[str], inputs: Inputs) -> None:
    for name in others:
        put(inputs["model"], name)
    with pytest.raises(InputError) as caught:
        apply(*inputs.checkpoints, rule="tv", in_place=True)
    assert all(name in str(caught.value) for name in others)


def test_left_as_they_are_on_request(inputs: Inputs, tmp_path: Path) -> None:
    for name in OTHERS:
        put(inputs["model"], name)
    apply(*inputs.checkpoints, rule="tv", out=tmp_path / "out")
    before = {name: (inputs["model"] / name) for name in OTHERS}
    report = apply(*inputs.checkpoints, rule="tv", in_place=True, leave_others=True)
    assert all(path.exists() for path in before.values())
    assert set(report.other_weights) == set(OTHERS)
    (warning,) = report.warnings
    assert warning.startswith("left as they were, with what was to be forgotten: ")
    shown = report.other_weights[:20]
    assert all(name in warning and name in report.summary() for name in shown)
    assert f" and {len(OTHERS) - 20} more" in warning
    (line,) = (line for line in verify(inputs["model"], progress=False).unchecked if "other weights" in line)
    assert all(name in line for name in shown)
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert (inputs["model"] / shard.name).read_bytes() == shard.read_bytes()


def test_in_a_new_directory_they_are_not_and_the_report_says_so(inputs: Inputs, tmp_path: Path) -> None:
    for name in OTHERS:
        put(inputs["model"], name)
    report = apply(*inputs.checkpoints, rule="tv", out=tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "perta_report.json",
        "perta_files.b3",
        "README.md",
    }
    assert set(Report.load(tmp_path / "out").other_weights) == set(OTHERS)
    assert all(name in report.summary() for name in report.other_weights[:20])
    assert "not copied, as other weights or an adapter: " in report.summary()
    assert not report.warnings
    verification = verify(tmp_path / "out", progress=False)
    assert not verification.problems
    assert not verification.unchecked


@pytest.mark.parametrize("name", HARMLESS)
def test_files_without_weights_are_no_hindrance(name: str, inputs: Inputs) -> None:
    put(inputs["model"], name)
    assert apply(*inputs.checkpoints, rule="tv", in_place=True).other_weights == []


def test_a_report_without_the_field_is_read(inputs: Inputs, tmp_path: Path) -> None:
    apply(*inputs.checkpoints, rule="tv", out=tmp_path / "out")
    path = tmp_path / "out" / "perta_report.json"
    content = json.loads(path.read_text())
    del content["other_weights"]
    path.write_text(json.dumps(content))
    assert Report.load(tmp_path / "out").other_weights == []


@pytest.mark.parametrize("stream", [False, True])
def test_unlearn_says_so_before_it_loads_the_model(
    stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_job(tmp_path)
    put(job.model, "model.gguf")
    monkeypatch.delattr(loading, "load_subject")
    with pytest.raises(InputError, match="lie other weights"):
        unlearn(*job.checkpoints, job.forget, job.retain, stream=stream, in_place=True, lam=1.0, rule="fisher")


@pytest.mark.parametrize("make", [apply, unlearn, choose])
def test_it_is_for_a_run_in_place_alone(make: Callable[..., Report], tmp_path: Path) -> None:
    strength = {"lam": 1.0} if make is not choose else {}
    with pytest.raises(InputError, match="leave_others is for a change in place; leave it out, or give in_place"):
        make(*"mbtfr", **strength, out=tmp_path / "out", leave_others=True)


def test_on_the_command_line(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(job.model, model)
    put(model, "pytorch_model.bin")
    command = ["apply", "--model", model, "--base", job.base, "--tuned", job.tuned, "--rule", "tv", "--lam", "1"]
    assert cli.main([*map(str, command), "--in-place"]) == 2
    assert "pytorch_model.bin" in capsys.readouterr().err
    assert cli.main([*map(str, command), "--in-place", "--leave-others"]) == 0


def write_with_adapter(folder: Path) -> tuple[Path, Path, Path]:
    """model, base and tuned; in the model's directory lies an adapter too."""
    adapter = make_adapter(folder, llama, {"target_modules": ["q_proj"]})
    for path in adapter.iterdir():
        if path.name.startswith("adapter"):
            shutil.copy(path, folder / "model" / path.name)
    return folder / "model", folder / "base", folder / "merged"


def test_the_output_of_a_model_with_an_adapter_loads(tmp_path: Path) -> None:
    model, base, tuned = write_with_adapter(tmp_path)
    report = apply(model, base, tuned, rule="tv", out=tmp_path / "out")
    assert report.other_weights == ["adapter_config.json", "adapter_model.safetensors"]
    assert not list((tmp_path / "out").glob("adapter*"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    theta, theta_0, theta_f = map(read_checkpoint, (model, base, tuned))
    for name, value in loaded.items():
        step = theta_f[name] - theta_0[name]
        assert same_bytes(value, theta[name] - step) or not step.any()


def test_in_place_a_model_with_an_adapter_is_refused_unless_it_is_left(tmp_path: Path) -> None:
    model, base, tuned = write_with_adapter(tmp_path)
    with pytest.raises(InputError, match=r"adapter_config.json, adapter_model.safetensors"):
        apply(model, base, tuned, rule="tv", in_place=True)
    apply(model, base, tuned, rule="tv", in_place=True, leave_others=True)
    assert "lora_A" in str(AutoModelForCausalLM.from_pretrained(model))


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_an_adapter_beside_base_or_tuned_is_not_read_and_that_is_said(
    role: str, inputs: Inputs, tmp_path: Path
) -> None:
    (inputs[role] / "adapter_config.json").write_text("{}")
    save_file({"a": draw((2,))}, inputs[role] / "adapter_model.safetensors")
    (warning,) = apply(*inputs.checkpoints, rule="tv", out=tmp_path / "out").warnings
    assert f"{inputs[role]}: holds an adapter beside the model; the adapter was not read" in warning
