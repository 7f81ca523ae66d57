"""Tensors that transformers leaves aside when it loads a model: one checkpoint may have them and another not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from perta_fast import apply_to_module_, unlearn
from perta_fast.errors import InputError
from perta_fast.runs.apply import apply
from perta_fast.runs.verify import verify
from tests.families.configs import FAMILIES, ONE_HEAD_SIZE, Family
from tests.families.matrix import build
from tests.families.test_multimodal import build as build_multimodal
from tests.support.checkpoints import draw, read_checkpoint, same_bytes
from tests.support.models import FORGET, RETAIN, nudge_, tokenizer, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = dict[str, Tensor]
_QWEN = ONE_HEAD_SIZE | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MIXED = ONE_HEAD_SIZE | {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
OTHERS = {
    "Qwen3.5": Family("Qwen3.5", "Qwen3_5TextConfig", _QWEN),
    "GLM-4 MoE": Family("GLM-4 MoE", "Glm4MoeConfig", _MIXED),
    "Qwen3-Next": Family("Qwen3-Next", "Qwen3NextConfig", _QWEN | _MIXED | {"num_experts": 4}),
} | {family.name: family for family in FAMILIES}
# What the hub's own files of these families hold beside the model: the names are theirs.
LEFT_ASIDE: dict[str, list[str]] = {
    "Llama": [f"model.layers.{k}.self_attn.rotary_emb.inv_freq" for k in range(2)],
    "GPT-2": ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
    "GPT-J": ["transformer.h.0.attn.masked_bias"],
    "GPT-NeoX": ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.rotary_emb.inv_freq"],
    "DeepSeek-V3, yarn": [
        "model.layers.2.eh_proj.weight",
        "model.layers.2.embed_tokens.weight",
        "model.layers.2.mlp.experts.0.gate_proj.weight",
        "model.layers.2.shared_head.head.weight",
    ],
    "GLM-4 MoE": ["model.layers.2.eh_proj.weight", "model.layers.2.mlp.experts.3.up_proj.weight"],
    "Qwen3.5": ["mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight", "mtp.norm.weight"],
    "Qwen3-Next": ["mtp.fc.weight", "mtp.layers.0.mlp.experts.1.up_proj.weight"],
}


def write(model: PreTrainedModel, folder: Path, more: Tensors) -> Path:
    """Save a model with tensors that it does not have."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if more:
        path = folder / "model.safetensors"
        save_file(load_file(path) | more, path, {"format": "pt"})
    return folder


def write_three(folder: Path, name: str, having: set[str]) -> tuple[Path, Path, Path]:
    """model, base and tuned; those in ``having`` with the tensors that are left aside, of other values each."""
    paths = []
    for seed, role in enumerate(("model", "base", "tuned")):
        more = {extra: draw((4, 4), seed=10 * seed + k) for k, extra in enumerate(LEFT_ASIDE[name])}
        paths.append(write(build(OTHERS[name], seed), folder / role, more if role in having else {}))
    return paths[0], paths[1], paths[2]


@pytest.mark.parametrize("name", LEFT_ASIDE)
@pytest.mark.parametrize("having", ["model", "base", "tuned", "model base", "model tuned", "base tuned"])
def test_the_models_are_copied_and_all_else_is_as_without_them(name: str, having: str, tmp_path: Path) -> None:
    plain = write_three(tmp_path / "plain", name, set())
    paths = write_three(tmp_path / "with", name, set(having.split()))
    apply(*plain, rule="tv", lam=0.7, out=tmp_path / "expected")
    report = apply(*paths, rule="tv", lam=0.7, out=tmp_path / "out")
    expected, found, model = map(read_checkpoint, (tmp_path / "expected", tmp_path / "out", paths[0]))
    assert found.keys() == model.keys()
    for tensor in model:
        assert same_bytes(found[tensor], expected.get(tensor, model[tensor]))
    aside = len(LEFT_ASIDE[name]) if "model" in having else 0
    assert report.counts.get("copied: not part of the language model", 0) == aside
    assert not verify(tmp_path / "out", full=True, progress=False).problems
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for tensor, value in AutoModelForCausalLM.from_pretrained(tmp_path / "expected").state_dict().items():
        assert same_bytes(again[tensor], value)


def test_in_all_three_they_are_subtracted_from_as_ever(tmp_path: Path) -> None:
    paths = write_three(tmp_path, "Llama", {"model", "base", "tuned"})
    apply(*paths, rule="tv", out=tmp_path / "out")
    found, model, base, tuned = map(read_checkpoint, (tmp_path / "out", *paths))
    for name in LEFT_ASIDE["Llama"]:
        assert same_bytes(found[name], model[name] - (tuned[name] - base[name]))


def without(path: Path, name: str) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("Llama", "model.layers.1.self_attn.q_proj.weight"),
        ("Llama", "model.norm.weight"),
        ("GPT-2", "transformer.h.0.attn.c_attn.bias"),  # transformers' pattern for what it ignores fits this one too
        ("GPT-NeoX", "gpt_neox.layers.1.attention.query_key_value.bias"),
        ("DeepSeek-V3, yarn", "model.layers.1.mlp.experts.3.up_proj.weight"),
        ("Qwen3.5", "model.layers.0.linear_attn.A_log"),
    ],
)
@pytest.mark.parametrize("lacking", ["model", "base", "tuned"])
def test_a_tensor_of_the_language_model_is_still_needed(name: str, needed: str, lacking: str, tmp_path: Path) -> None:
    paths = write_three(tmp_path, name, {"model", "base"})
    without(tmp_path / lacking, needed)
    with pytest.raises(InputError, match=rf"tensor {needed}"):
        apply(*paths, rule="tv", out=tmp_path / "out")


@pytest.mark.parametrize("shallow", ["model", "base", "tuned"])
def test_a_model_with_fewer_layers_is_another_model(shallow: str, tmp_path: Path) -> None:
    """Transformers would leave the last layer aside for the one with fewer layers, but not for the others."""
    for seed, role in enumerate(("model", "base", "tuned")):
        depth = 1 if role == shallow else 2
        config = transformers.LlamaConfig(**FAMILIES[0].settings | {"num_hidden_layers": depth})
        model = transformers.LlamaForCausalLM(config)
        nudge_(model, seed)
        model.save_pretrained(tmp_path / role)
    with pytest.raises(InputError, match=r"tensors model.layers.1."):
        apply(*(tmp_path / role for role in ("model", "base", "tuned")), rule="tv", out=tmp_path / "out")


def test_a_checkpoint_without_a_known_configuration_must_have_all(tmp_path: Path) -> None:
    paths = write_three(tmp_path, "Llama", {"model"})
    (tmp_path / "tuned" / "config.json").unlink()
    with pytest.raises(InputError, match=r"tensors model.layers.0.self_attn.rotary_emb.inv_freq"):
        apply(*paths, rule="tv", out=tmp_path / "out")


def qwen(seed: int) -> PreTrainedModel:
    """Qwen3.5 with its vision tower, as it lies on the hub."""
    torch.manual_seed(7)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 8}
    model = transformers.Qwen3_5ForConditionalGeneration(
        transformers.Qwen3_5Config(
            text_config=_QWEN, vision_config=vision | {"out_hidden_size": 32, "num_position_embeddings": 16}
        )
    )
    nudge_(model, seed)
    return model


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("rule", ["tv", "fisher"])
def test_a_hub_checkpoint_with_vision_and_prediction_layers_tuned_as_text(
    stream: bool, rule: str, tmp_path: Path
) -> None:
    more = {name: draw((4, 4), seed=k) for k, name in enumerate(LEFT_ASIDE["Qwen3.5"])}
    base = write(qwen(0), tmp_path / "base", more)
    full = AutoModelForCausalLM.from_pretrained(base)
    nudge_(full, 5)
    model = write(full, tmp_path / "model", {})
    tuned = AutoModelForCausalLM.from_pretrained(base)
    nudge_(tuned, 6)
    write(tuned, tmp_path / "tuned", {})
    data = [write_lines(tmp_path / f"{role}.jsonl", rows) for role, rows in (("forget", FORGET), ("retain", RETAIN))]
    how: dict[str, Any] = {"rule": rule, "lam": 1.0, "stream": stream, "check": False, "progress": False}
    unlearn(model, base, tmp_path / "tuned", *data, out=tmp_path / "text", **how)
    without_vision = write(AutoModelForCausalLM.from_pretrained(base), tmp_path / "plain base", {})
    unlearn(model, without_vision, tmp_path / "tuned", *data, out=tmp_path / "expected", **how)
    found, expected = read_checkpoint(tmp_path / "text"), read_checkpoint(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(same_bytes(found[name], expected[name]) for name in expected)
    # The hub's own files as the model: what is left aside is copied.
    unlearn(base, base, tmp_path / "tuned", *data, out=tmp_path / "hub", **how)
    unlearn(without_vision, without_vision, tmp_path / "tuned", *data, out=tmp_path / "hub2", **how)
    found, expected, before = map(read_checkpoint, (tmp_path / "hub", tmp_path / "hub2", base))
    assert found.keys() == before.keys()
    assert all(same_bytes(found[name], expected.get(name, before[name])) for name in before)


BUILDS: dict[str, Callable[[int], PreTrainedModel]] = {
    "Gemma 3": lambda seed: build_multimodal("Gemma 3", seed),
    "LLaVA": lambda seed: build_multimodal("LLaVA", seed),
    "Qwen2-VL": lambda seed: build_multimodal("Qwen2-VL", seed),
}


def vision_names(path: Path) -> list[str]:
    return [name for name in read_checkpoint(path) if any(part in name for part in ("vision", "visual", "projector"))]


@pytest.mark.parametrize("family", BUILDS)
def test_vision_parts_that_tuned_lacks(family: str, tmp_path: Path) -> None:
    paths = [write(BUILDS[family](seed), tmp_path / role, {}) for seed, role in enumerate(("model", "base", "tuned"))]
    vision = vision_names(paths[0])
    assert vision
    apply(*paths, rule="tv", out=tmp_path / "whole")
    for name in vision:
        without(paths[2], name)
    report = apply(*paths, rule="tv", out=tmp_path / "out")
    assert report.counts["copied: not part of the language model"] == len(vision)
    found, whole, before = map(read_checkpoint, (tmp_path / "out", tmp_path / "whole", paths[0]))
    assert all(same_bytes(found[name], before[name] if name in vision else whole[name]) for name in before)
    module = BUILDS[family](0)
    apply_to_module_(module, *paths[1:], rule="tv")
    module.save_pretrained(tmp_path / "live")
    live = read_checkpoint(tmp_path / "live")
    assert all(same_bytes(live[name], found[name]) for name in found)
