"""Streamed importance against the in-memory path, itself held to autograd; for the families, tests/families."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from perta_fast import Importance, InputError, RunError, estimate_importance, unlearn
from perta_fast.cli import main
from perta_fast.data.samples import Sample
from perta_fast.importance import store
from perta_fast.rules import ESTIMATORS
from perta_fast.streaming import scratch_files
from perta_fast.streaming.model.partial_forward import PartialForward
from perta_fast.streaming.model.skeleton import Skeleton
from tests.runs.test_estimate import by_autograd
from tests.support.checkpoints import fingerprint, read_checkpoint
from tests.support.children import run_child
from tests.support.models import Job, draw_samples, llama, nudge_, tokenizer, write_job

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = draw_samples(11)
BY_FAMILY: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: llama(num_hidden_layers=3),
    "llama of one layer": lambda: llama(num_hidden_layers=1),
}


def write(folder: Path, model: PreTrainedModel, attention: str | None = None) -> Path:
    """A checkpoint with its tokenizer; ``attention``: the implementation that its configuration asks for."""
    nudge_(model, 3, 0.05)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if attention is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": attention}))
    return folder


def importance(model: Any, data: Any = SAMPLES, estimator: Any = "grad", **settings: Any) -> Importance:
    return estimate_importance(model, data, estimator, **{"batch_size": 4, "progress": False} | settings)


def assert_close(found: Importance, expected: Importance, tolerance: float = 1e-6) -> None:
    assert list(found.tensors) == list(expected.tensors)
    assert found.metadata == expected.metadata
    for name, tensor in expected.tensors.items():
        assert float((found.tensors[name] - tensor).norm()) <= tolerance * float(tensor.norm()), name


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    return write(tmp_path / "model", llama(num_hidden_layers=3))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", BY_FAMILY)
def test_equals_the_in_memory_path(family: str, attention: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    folder = write(tmp_path / "model", BY_FAMILY[family](), attention)
    assert Skeleton.open(folder, torch.device("cpu"), None).model.config._attn_implementation == attention
    for estimator in ESTIMATORS:
        expected = importance(folder, estimator=estimator)
        found = importance(folder, estimator=estimator, out=tmp_path / estimator, stream=True)
        assert found.directory == tmp_path / estimator
        assert_close(found, expected, 0)


@pytest.mark.parametrize("tied", [False, True])
def test_equals_autograd(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(8)
    module = llama(tie_word_embeddings=tied).eval()
    folder = write(tmp_path / "model", module)
    for estimator, exact in zip(ESTIMATORS, by_autograd(module, SAMPLES), strict=True):
        found = importance(folder, estimator=estimator, out=tmp_path / estimator, stream=True).tensors
        assert found.keys() == exact.keys()
        for name, tensor in exact.items():
            assert float((found[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()), name


def test_a_weight_that_is_also_used_by_hand(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaMLP.forward

    def by_hand(mlp: LlamaMLP, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = original(mlp, hidden)
        return result + hidden @ mlp.up_proj.weight.T @ mlp.up_proj.weight

    monkeypatch.setattr(LlamaMLP, "forward", by_hand)
    found = importance(model, estimator="empirical-fisher", out=tmp_path / "out", stream=True)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    assert found.metadata.one_by_one == ", ".join(names)
    module = LlamaForCausalLM.from_pretrained(model).eval()
    for name, exact in by_autograd(module, SAMPLES)[1].items():
        assert float((found.tensors[name] - exact).norm()) <= 1e-5 * float(exact.norm()), name


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_files_are_those_of_the_in_memory_path(
    estimator: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, over several shards; and nothing else is left."""
    monkeypatch.setattr(store, "SHARD_BYTES", 60_000)
    before = fingerprint(model)
    importance(model, estimator=estimator, out=tmp_path / "memory")
    importance(model, estimator=estimator, out=tmp_path / "stream", stream=True)
    files = [{path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("memory", "stream")]
    assert len(files[0]) > 3
    assert files[0] == files[1]
    assert names_in(tmp_path) == ["memory", "model", "stream"]
    assert fingerprint(model) == before


@pytest.mark.parametrize("batch_size", [1, 3, 11, 50])
def test_any_batch_size(batch_size: int, model: Path, tmp_path: Path) -> None:
    expected = importance(model, batch_size=batch_size)
    found = importance(model, batch_size=batch_size, out=tmp_path / "out", stream=True)
    assert_close(found, expected, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_types(dtype: torch.dtype, tmp_path: Path) -> None:
    """A bfloat16 checkpoint, in its own type and in another."""
    folder = write(tmp_path / "model", llama().to(torch.bfloat16))
    for number, asked in enumerate((None, dtype)):
        expected = importance(folder, dtype=asked)
        assert_close(importance(folder, dtype=asked, out=tmp_path / f"{number}", stream=True), expected, 0)


def test_one_sample_of_two_tokens(model: Path, tmp_path: Path) -> None:
    data = [Sample((5, 9), (-100, 9))]
    for estimator in ESTIMATORS:
        expected = importance(model, data, estimator)
        assert_close(importance(model, data, estimator, out=tmp_path / estimator, stream=True), expected, 0)


# The whole job, and the command line.


def test_unlearn(job: Job, tmp_path: Path) -> None:
    for name, stream in (("memory", False), ("stream", True)):
        unlearn(
            *job.checkpoints,
            job.forget,
            job.retain,
            out=tmp_path / name,
            stream=stream,
            progress=False,
            lam=1.0,
            rule="fisher",
        )
    expected, found = (read_checkpoint(tmp_path / name) for name in ("memory", "stream"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(tensor, read_checkpoint(job.model)[name]) for name, tensor in found.items())
    assert names_in(tmp_path) == ["memory", "stream"]


def test_command_line(job: Job, tmp_path: Path) -> None:
    files = []
    for name, options in (("memory", ()), ("stream", ("--stream",))):
        arguments = ["importance", "--model", job.base, "--data", job.forget, "--out", tmp_path / name, "--quiet"]
        assert main([str(each) for each in (*arguments, *options)]) == 0
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
    arguments = ["unlearn", "--lam", "1", "--rule", "empirical-fisher", "--stream", "--quiet"]
    for name in ("model", "base", "tuned", "forget", "retain"):
        arguments += [f"--{name}", str(getattr(job, name))]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--save-importance", str(tmp_path / "kept")]) == 0
    kept = Importance.load(tmp_path / "kept" / "forget")
    assert_close(kept, importance(job.base, job.forget, "empirical-fisher", batch_size=8), 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("rule", ESTIMATORS)
def test_cuda(rule: str, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", torch.float32)
    arguments = ["unlearn", "--lam", "1", "--rule", rule, "--stream", "--quiet"]
    for name in ("model", "base", "tuned", "forget", "retain"):
        arguments += [f"--{name}", str(getattr(job, name))]
    for device in ("cpu", "cuda"):
        places = ["--out", str(tmp_path / device), "--save-importance", str(tmp_path / f"kept {device}")]
        assert main([*arguments, "--device", device, *places]) == 0
    for role in ("forget", "retain"):
        expected, found = (Importance.load(tmp_path / f"kept {device}" / role) for device in ("cpu", "cuda"))
        assert_close(found, expected, 1e-4)
    before, after, other = map(read_checkpoint, (job.model, tmp_path / "cpu", tmp_path / "cuda"))
    for name, tensor in before.items():
        assert float((other[name] - after[name]).norm()) <= 1e-3 * float((after[name] - tensor).norm()), name


# What is refused.


def assert_refused(message: str, model: Any, out: Path, **settings: Any) -> None:
    with pytest.raises(InputError, match=message):
        importance(model, **{"out": out, "stream": True} | settings)
    assert not out.exists()
    assert not [name for name in names_in(out.parent) if "perta" in name]


def test_arguments(model: Path, tmp_path: Path) -> None:
    assert_refused("a live module is in memory already", llama(), tmp_path / "out")
    assert_refused("would run in torch.float64", model, tmp_path / "out", dtype=torch.float64)
    with pytest.raises(InputError, match="stream needs out"):
        importance(model, stream=True)


def test_layers_that_are_not_found(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 0}))
    assert_refused("looked for one list of 0 equal decoder layers", model, tmp_path / "out")


def change(model: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def test_damaged_checkpoints(model: Path, tmp_path: Path) -> None:
    norm = "model.layers.1.input_layernorm.weight"
    change(model, lambda tensors: tensors.update({norm: torch.ones(7)}))
    assert_refused(rf"{norm} is \[7\], config.json calls for \[32\]", model, tmp_path / "out")
    change(model, lambda tensors: tensors.update({norm: torch.ones(32, dtype=torch.int32)}))
    assert_refused(f"{norm} is I32, not floating point", model, tmp_path / "out")
    change(model, lambda tensors: tensors.pop(norm))
    assert_refused(f"lacks tensor {norm}", model, tmp_path / "out")
    (model / "config.json").write_text('{"model_type": "nothing"}')
    assert_refused("transformers cannot build this model", model, tmp_path / "out")


def test_tied_in_the_configuration_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", llama(tie_word_embeddings=True))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert_close(importance(folder, out=tmp_path / "same", stream=True), importance(folder))
    change(folder, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    assert_refused("lm_head.weight and model.embed_tokens.weight differ", folder, tmp_path / "out")


# What goes wrong on the way: the samples are named, and nothing is left.


def assert_nothing_left(model: Path) -> None:
    assert names_in(model.parent) == [model.name]


def test_a_loss_that_is_not_finite(model: Path, tmp_path: Path) -> None:
    token = next(k for k in range(300) if sum(k in sample.input_ids for sample in SAMPLES) == 1)
    (number,) = (n for n, sample in enumerate(SAMPLES) if token in sample.input_ids)
    change(model, lambda tensors: tensors["model.embed_tokens.weight"][token].fill_(float("nan")))
    for estimator in ESTIMATORS:
        with pytest.raises(
            RunError, match=rf"^sample {number} \(counted from 0\): what the embedding makes of it is not finite"
        ):
            importance(model, estimator=estimator, out=tmp_path / "out", stream=True)
        assert_nothing_left(model)


def test_a_full_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, written = scratch_files.write_fully, [0]

    def limited(descriptor: int, data: memoryview, offset: int) -> None:
        written[0] += len(data)
        if written[0] > 20_000:
            raise OSError(28, "No space left on device")
        original(descriptor, data, offset)

    monkeypatch.setattr(scratch_files, "write_fully", limited)
    with pytest.raises(RunError, match="the disk is full"):
        importance(model, out=tmp_path / "out", stream=True)
    assert_nothing_left(model)


@pytest.mark.parametrize("call", [2, 8, 13])  # of nine in the forward walk, and nine in the backward walk
def test_interrupted(call: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = PartialForward.layer, [0]

    def interrupted(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(PartialForward, "layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        importance(model, out=tmp_path / "out", stream=True)
    assert_nothing_left(model)


# Memory.


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.streaming.peak_memory", str(tmp_path), *ESTIMATORS]
    # Blocks of a layer this small are given back to the system when freed, as those of a large one always are.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = run_child(command, env=settings, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == len(ESTIMATORS)
    for line in lines:
        shallow, deep, least = map(int, line.split())
        assert shallow >= least  # the measure sees at least what must be there
        assert deep <= 1.1 * shallow
