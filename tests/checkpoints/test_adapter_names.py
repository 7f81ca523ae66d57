"""Adapters that were saved by other ways than peft's: the same bits, or a refusal that says what is there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from perta_fast import InputError
from perta_fast.checkpoints.adapter_names import PREFIX, peft_names
from tests.families.test_multimodal import build as multimodal
from tests.support.adapters import logits, logits_of, tuned_model, write_adapter, write_theta_f
from tests.support.checkpoints import read_checkpoint, same_bytes
from tests.support.models import llama

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

Tensors = dict[str, Tensor]
TARGETS = ["q_proj", "down_proj"]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **{"target_modules": TARGETS} | settings)


def rewrite(adapter: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, path)


def as_state(folder: Path, adapter_name: str = "default", trained: bool = False) -> Tensors:
    """The state dict of the adapted model itself, or what of it was trained."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = PeftModel.from_pretrained(model, folder / "adapter", adapter_name=adapter_name, is_trainable=trained)
    if trained:
        return {name: value.detach().clone() for name, value in adapted.named_parameters() if value.requires_grad}
    return {name: value.clone() for name, value in adapted.state_dict().items()}


WAYS: dict[str, Callable[[Path, Tensors], Tensors]] = {
    "a state dict": lambda folder, tensors: as_state(folder),
    "a state dict, the adapter has a name": lambda folder, tensors: as_state(folder, "sft"),
    "what was trained": lambda folder, tensors: as_state(folder, trained=True),
    "within DDP": lambda folder, tensors: {f"module.{name}": tensor for name, tensor in as_state(folder).items()},
    "the prefix twice": lambda folder, tensors: {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()},
    "no prefix": lambda folder, tensors: {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()},
    "names of the bare model": lambda folder, tensors: {
        name.replace(f"{PREFIX}model.", PREFIX): tensor for name, tensor in tensors.items()
    },
}
FORMS: dict[str, Callable[[], Any]] = {
    "LoRA and whole modules": lambda: lora(modules_to_save=["lm_head", "mlp"], target_modules=["q_proj"]),
    "LoRA of embeddings": lambda: lora(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "DoRA": lambda: lora(use_dora=True, modules_to_save=["norm"]),
    "LoHa": lambda: LoHaConfig(task_type="CAUSAL_LM", target_modules=TARGETS, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_the_bits_of_the_adapter_that_peft_saves(form: str, way: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, llama, FORMS[form]())
    expected = read_checkpoint(write_theta_f(tmp_path / "base", adapter, tmp_path / "expected"))
    rewrite(adapter, lambda tensors: WAYS[way](tmp_path, tensors))
    found = read_checkpoint(write_theta_f(tmp_path / "base", adapter, tmp_path / "found"))
    assert found.keys() == expected.keys()
    assert all(same_bytes(found[name], expected[name]) for name in found)


def test_magnitudes_of_dora_as_an_older_peft_named_them(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, llama, lora(use_dora=True))
    expected = read_checkpoint(write_theta_f(tmp_path / "base", adapter, tmp_path / "expected"))
    rewrite(adapter, lambda tensors: {n.replace("_vector", "_vector.weight"): value for n, value in tensors.items()})
    found = read_checkpoint(write_theta_f(tmp_path / "base", adapter, tmp_path / "found"))
    assert all(same_bytes(found[name], expected[name]) for name in expected)


def test_biases_beside_a_module_that_was_saved_as_a_whole(tmp_path: Path) -> None:
    """Peft writes its two copies of the biases too."""
    build = lambda: llama(attention_bias=True)  # noqa: E731
    config = lora(target_modules=["up_proj"], modules_to_save=["self_attn"], bias="all")
    adapter = write_adapter(tmp_path, build, config)
    assert any(".modules_to_save." in name for name in load_file(adapter / "adapter_model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rewrite(tmp_path / "adapter", lambda tensors: tensors)
    out = read_checkpoint(write_theta_f(tmp_path / "base", adapter, tmp_path / "out"))
    saved = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in model.state_dict().items():
        if "self_attn" in name:
            torch.testing.assert_close(out[name], saved[f"{PREFIX}{name}"], rtol=0, atol=0)
            assert not torch.equal(out[name], tensor)


def qwen2() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=300, num_key_value_heads=2, **sizes))


def test_biases_of_modules_that_a_type_of_peft_leaves_alone(tmp_path: Path) -> None:
    config = OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=8, bias="all")
    adapter = write_adapter(tmp_path, qwen2, config)
    expected = logits(tuned_model(tmp_path / "base", adapter))
    out = write_theta_f(tmp_path / "base", adapter, tmp_path / "out")
    torch.testing.assert_close(logits_of(out), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_the_model_without_its_head(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        AutoModel.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj"], use_dora=True)
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter += 0.05 * parameter.requires_grad
    adapted.save_pretrained(tmp_path / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    whole.model = adapted.base_model.model
    expected = logits(whole)
    out = write_theta_f(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(logits_of(out), expected, rtol=1e-4, atol=1e-5)


def test_stored_names_of_a_model_for_text_and_images(tmp_path: Path) -> None:
    """Older versions of transformers had in memory what is in files today."""
    base = multimodal("Gemma 3", 0)
    base.save_pretrained(tmp_path / "base")
    targets = r".*language_model.*q_proj"
    adapted = get_peft_model(base, LoraConfig(target_modules=targets, use_dora=True, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = read_checkpoint(write_theta_f(tmp_path / "base", tmp_path / "adapter", tmp_path / "expected"))
    now, then = f"{PREFIX}model.language_model.", f"{PREFIX}language_model.model."
    rewrite(tmp_path / "adapter", lambda tensors: {name.replace(now, then): value for name, value in tensors.items()})
    assert all(name.startswith(then) for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    found = read_checkpoint(write_theta_f(tmp_path / "base", tmp_path / "adapter", tmp_path / "found"))
    assert all(same_bytes(found[name], expected[name]) for name in expected)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, llama, lora())
    state = as_state(tmp_path)
    both = state | {name.replace(".default", ".dpo"): value.clone() for name, value in state.items() if "lora_" in name}
    rewrite(adapter, lambda tensors: both)
    with pytest.raises(
        InputError, match="holds 2 adapters, default and dpo; save each one alone, with save_pretrained"
    ):
        write_theta_f(tmp_path / "base", adapter, tmp_path / "out")


def test_tensors_that_modules_share_keep_their_names() -> None:
    names = ["base_model.vera_A", "base_model.tinylora_v.default.0", f"{PREFIX}model.norm.weight"]
    assert peft_names(names, "here") == dict(zip(names, names, strict=True))


def test_two_tensors_of_one_name_are_refused() -> None:
    names = [f"{PREFIX}norm.weight", "norm.weight"]
    with pytest.raises(InputError, match=r"here: tensors .* are both base_model.model.norm.weight to peft"):
        peft_names(names, "here")


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa"])
def test_the_head_of_a_classifier_on_a_language_model(kind: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    how: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": ["q_proj"]}
    config = LoHaConfig(**how) if kind == "LoHa" else LoraConfig(use_dora=kind == "DoRA", **how)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"score.weight.*of a classifier \(task_type SEQ_CLS\)") as caught:
        write_theta_f(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "that the adapter was tuned from" not in str(caught.value)
    assert not (tmp_path / "out").exists()
