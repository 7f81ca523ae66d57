"""Names that wrappers add: taken off in checkpoints, adapters, importances and live modules, with the same bits."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel

from perta_fast import InputError, apply, apply_to_module_, estimate_importance, unlearn, verify
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.wrappers import plain_name
from perta_fast.importance.store import Importance
from perta_fast.models.loading import load_subject
from perta_fast.runs.inspect import inspect
from perta_fast.tuning.checkpoint import write_tuned
from tests.support.checkpoints import read_checkpoint, same_bytes
from tests.support.models import Job, draw_samples, llama, nudge_, write_job

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]

Renaming = Callable[[str], str]


def compiled_layers(name: str) -> str:
    return name.replace("layers.0.", "layers.0._orig_mod.").replace("lm_head.", "lm_head._orig_mod.")


NAMES: dict[str, Renaming] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "compiled layers": compiled_layers,
    "DDP": lambda name: f"module.{name}",
    "DDP of a compiled model": lambda name: f"module._orig_mod.{name}",
    "compiled DDP": lambda name: f"_orig_mod.module.{name}",
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
    "activation checkpointing": lambda name: name.replace("mlp.", "mlp._checkpoint_wrapped_module."),
    "all": lambda name: "module._fsdp_wrapped_module._orig_mod." + name.replace(
        ".mlp.", "._fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod.mlp."
    ),
}  # fmt: skip


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
def test_names_are_plain_without_those_of_wrappers(rename: Renaming) -> None:
    for name in llama().state_dict():
        assert plain_name(rename(name)) == name
        assert plain_name(f"base_model.model.{rename(name)}") == f"base_model.model.{name}"
        assert plain_name(f"module.base_model.model.{rename(name)}") == f"base_model.model.{name}"


@pytest.mark.parametrize("name", ["model.module.weight", "my_orig_mod.weight", "model.modules.0.weight", "submodule.x"])
def test_other_names_are_kept(name: str) -> None:
    assert plain_name(name) == name


def renamed(checkpoint: Path, rename: Renaming) -> Path:
    """A copy of a checkpoint with other names, in its shards and its index."""
    copy = checkpoint.with_name(f"{checkpoint.name}-renamed")
    shutil.copytree(checkpoint, copy)
    for shard in copy.glob("*.safetensors"):
        save_file({rename(name): tensor for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    for path in copy.glob("*.index.json"):
        index = json.loads(path.read_bytes())
        index["weight_map"] = {rename(name): shard for name, shard in index["weight_map"].items()}
        path.write_text(json.dumps(index))
    return copy


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_checkpoints_are_taken_and_the_output_keeps_the_models_names(
    rename: Renaming, tied: bool, tmp_path: Path
) -> None:
    job = write_job(tmp_path, tie_word_embeddings=tied)
    apply(*job.checkpoints, rule="tv", lam=0.7, out=tmp_path / "plain", progress=False)
    expected = read_checkpoint(tmp_path / "plain")
    for number in range(3):  # model, base or tuned has other names
        inputs = [renamed(path, rename) if k == number else path for k, path in enumerate(job.checkpoints)]
        out = tmp_path / f"out-{number}"
        apply(*inputs, rule="tv", lam=0.7, out=out, progress=False)
        shards = [load_file(shard) for shard in out.glob("*.safetensors")]
        stored = {name: tensor for shard in shards for name, tensor in shard.items()}
        assert stored.keys() == {rename(name) if number == 0 else name for name in expected}
        assert all(same_bytes(tensor, expected[plain_name(name)]) for name, tensor in stored.items())
        assert not verify(out).problems
        shown = str(inspect(out, every_tensor=True).text())
        assert all(name in shown for name in stored)


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_a_checkpoint_with_such_names_is_unlearned(stream: bool, tmp_path: Path) -> None:
    job = write_job(tmp_path, dtype=torch.float32)
    how: dict[str, Any] = {"rule": "fisher", "lam": 1.0, "stream": stream, "check": False, "progress": False}
    unlearn(*job.checkpoints, job.forget, job.retain, out=tmp_path / "plain", **how)
    inputs = [renamed(path, NAMES["all"]) for path in job.checkpoints]
    unlearn(*inputs, job.forget, job.retain, out=tmp_path / "out", **how)
    expected, got = read_checkpoint(tmp_path / "plain"), read_checkpoint(tmp_path / "out")
    assert got.keys() == {NAMES["all"](name) for name in expected}
    assert all(same_bytes(got[NAMES["all"](name)], tensor) for name, tensor in expected.items())


def test_a_tuned_checkpoint_of_such_a_base_has_plain_names(tmp_path: Path) -> None:
    base = renamed(write_job(tmp_path).base, NAMES["all"])
    subject = load_subject(base, "cpu", None)
    write_tuned(subject.module, Checkpoint.open(base), tmp_path / "tuned")
    loaded = load_subject(tmp_path / "tuned", "cpu", None).module.state_dict()
    assert loaded.keys() == subject.module.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in subject.module.state_dict().items())


def test_two_names_that_become_the_same_are_refused(tmp_path: Path) -> None:
    job = write_job(tmp_path, max_shard_size="1GB")
    path = job.model / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"_orig_mod.lm_head.weight": tensors["lm_head.weight"].clone()}, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"_orig_mod\.lm_head\.weight.* are both lm_head\.weight without the names"):
        apply(*job.checkpoints, rule="tv", lam=1, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def trained_adapter(job: Job, **settings: Any) -> Path:
    model = get_peft_model(llama(), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(job.base.parent / "adapter", save_embedding_layers=False)
    return job.base.parent / "adapter"


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "whole tensors": {"modules_to_save": ["norm"]},
    "DoRA": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {r"layers\.0\.self_attn.q_proj": 3},
    },
}


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_taken(kind: str, rename: Renaming, tmp_path: Path) -> None:
    job = write_job(tmp_path)
    adapter = trained_adapter(job, **ADAPTERS[kind])
    copy = renamed(adapter, lambda name: f"base_model.model.{rename(name.removeprefix('base_model.model.'))}")
    if rename is compiled_layers:
        config = json.loads((copy / "adapter_config.json").read_bytes())
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = {
                key.replace("0.", "0._orig_mod.").replace(r"0\.", r"0\._orig_mod\."): value
                for key, value in config[name].items()
            }
            config[name] = pattern
        (copy / "adapter_config.json").write_text(json.dumps(config))
    for number, tuned in enumerate((adapter, copy)):
        apply(job.model, job.base, tuned, rule="tv", lam=0.7, out=tmp_path / f"out-{number}", progress=False)
    expected, got = read_checkpoint(tmp_path / "out-0"), read_checkpoint(tmp_path / "out-1")
    assert all(same_bytes(got[name], tensor) for name, tensor in expected.items())


def test_the_advised_merge_of_such_an_adapter_merges_it(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    adapter = trained_adapter(job)
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "olora"}))
    for tuned in (adapter, renamed(adapter, lambda name: name.replace("layers.0.", "layers.0._orig_mod."))):
        with pytest.raises(InputError, match="merge it and give the merged checkpoint: python -c") as error:
            apply(job.model, job.base, tuned, rule="tv", lam=0.7, out=tmp_path / "out", progress=False)
        exec(str(error.value).split('python -c "')[1].rstrip('"'))
    merged, again = (read_checkpoint(tmp_path / f"{name}-merged") for name in ("adapter", "adapter-renamed"))
    assert not same_bytes(
        merged["model.layers.0.self_attn.q_proj.weight"], llama().state_dict()["model.layers.0.self_attn.q_proj.weight"]
    )
    assert all(same_bytes(again[name], tensor) for name, tensor in merged.items())


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def compiled_parts(model: nn.Module) -> nn.Module:
    layers: Any = model.get_submodule("model.layers")
    layers[0] = torch.compile(layers[0])
    model.lm_head = torch.compile(model.lm_head)  # type: ignore[assignment]
    return model


def checkpointed_parts(model: nn.Module) -> nn.Module:
    layers: Any = model.get_submodule("model.layers")
    for number, layer in enumerate(layers):
        layers[number] = checkpoint_wrapper(layer)
    return model


LIVE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": torch.compile,
    "compiled in place": lambda model: (model.compile(), model)[1],
    "compiled parts": compiled_parts,
    "checkpointed": checkpoint_wrapper,
    "checkpointed parts": checkpointed_parts,
    "DataParallel": DataParallel,
    "DDP": DistributedDataParallel,
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model)),
    "DDP of all": lambda model: DistributedDataParallel(torch.compile(checkpointed_parts(model))),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("wrap", LIVE.values(), ids=LIVE)
def test_live_modules_give_the_same_bits(wrap: Callable[[nn.Module], nn.Module], tied: bool, tmp_path: Path) -> None:
    job = write_job(tmp_path, dtype=torch.float32, tie_word_embeddings=tied)
    samples = draw_samples(5)
    plain, wrapped = llama(tie_word_embeddings=tied), llama(tie_word_embeddings=tied)
    nudge_(plain, 1)
    nudge_(wrapped, 1)
    outside = wrap(wrapped)
    found: dict[str, tuple[Importance, Importance]] = {}
    for estimator in ("grad", "empirical-fisher"):
        expected, got = (
            estimate_importance(model, samples, estimator, progress=False)  # type: ignore[arg-type]
            for model in (plain, outside)
        )
        assert list(got.tensors) == list(expected.tensors)
        assert all(same_bytes(got.tensors[name], tensor) for name, tensor in expected.tensors.items())
        assert got.metadata == expected.metadata
        found[estimator] = expected, got
    for number, model in enumerate((plain, outside)):
        importance = found["grad"][number]
        counted = apply_to_module_(model, job.base, job.tuned, importance, importance, rule="fisher", lam=0.5)
        assert counted == len(dict(plain.named_parameters()))
    after = {plain_name(name): parameter for name, parameter in outside.named_parameters()}
    assert after.keys() == dict(plain.named_parameters()).keys()
    assert all(same_bytes(after[name].detach(), value.detach()) for name, value in plain.named_parameters())
    assert not torch.equal(plain.get_submodule("model.norm").weight, _start(tied).get_submodule("model.norm").weight)


def _start(tied: bool) -> nn.Module:
    model = llama(tie_word_embeddings=tied)
    nudge_(model, 1)
    return model


def test_an_adapter_is_subtracted_from_a_wrapped_module(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    adapter = trained_adapter(job)
    plain, wrapped = llama(), torch.compile(checkpointed_parts(llama()))
    for model in (plain, wrapped):
        assert apply_to_module_(model, job.base, adapter, rule="tv", lam=0.5) == 4
    after = {plain_name(name): parameter for name, parameter in wrapped.named_parameters()}
    assert all(same_bytes(after[name].detach(), value.detach()) for name, value in plain.named_parameters())
