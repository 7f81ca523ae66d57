"""Adapters that peft merges, on models of other families and with the settings that people use."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    TrainableTokensConfig,
    get_peft_model,
)

from perta_fast import InputError
from perta_fast.models.language_part import auto_class
from tests.checkpoints.test_adapter_kinds import mixtral
from tests.checkpoints.test_adapters import gpt2
from tests.families.configs import ONE_HEAD_SIZE, SIZES
from tests.families.test_multimodal import build
from tests.support.adapters import Build, logits, logits_of, run_advice, tuned_model, write_adapter, write_theta_f
from tests.support.models import llama

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def qwen3_moe() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **ONE_HEAD_SIZE, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss() -> transformers.PreTrainedModel:
    """Its experts are stored joined, and transposed."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**ONE_HEAD_SIZE, num_local_experts=4, num_experts_per_tok=2)
    model = transformers.GptOssForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def gpt_neox() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))


def mamba() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=300, hidden_size=32, state_size=4, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **settings)


FORMS: dict[str, tuple[Build, Any]] = {
    "DoRA, ranks, scales, one layer, biases": (
        llama,
        lora(
            target_modules=["q_proj", "up_proj", "down_proj"],
            layers_to_transform=[1],
            rank_pattern={"q_proj": 3},
            alpha_pattern={r"layers\.1\.mlp\.up_proj": 5},
            use_dora=True,
            use_rslora=True,
            bias="all",
        ),
    ),
    "DoRA, biases of its modules": (
        gpt2,
        lora(target_modules=["c_attn"], use_dora=True, bias="lora_only", fan_in_fan_out=True),
    ),
    "DoRA by a pattern": (
        llama,
        lora(
            target_modules=r".*\.layers\.[01]\.(self_attn\.[qk]_proj|mlp\.up_proj)",
            exclude_modules=["model.layers.0.mlp.up_proj"],
            use_dora=True,
        ),
    ),
    "DoRA without a task": (llama, LoraConfig(target_modules=["q_proj"], use_dora=True)),
    "one parameter of experts": (
        qwen3_moe,
        lora(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
    ),
    "experts and router": (
        qwen3_moe,
        lora(target_modules=[], target_parameters=["mlp.experts.down_proj", "mlp.gate.weight"]),
    ),
    "experts of two ranks": (
        mixtral,
        lora(
            target_modules=[],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            rank_pattern={"experts.gate_up_proj": 3},
        ),
    ),
    "experts that are stored joined": (
        gpt_oss,
        lora(target_modules=["o_proj"], target_parameters=["1.mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ),
    "a parameter of a linear map": (llama, lora(target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"])),
    "tokens of both matrices": (
        llama,
        lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [3]}),
    ),
    "tokens and a whole head": (
        llama,
        lora(target_modules=["q_proj"], trainable_token_indices=[1, 2], modules_to_save=["lm_head"]),
    ),
    "tokens of GPT-2": (gpt2, TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[1, 2])),
    "LoHa": (
        gpt_neox,
        LoHaConfig(
            task_type="CAUSAL_LM",
            target_modules=["query_key_value", "dense_h_to_4h"],
            rank_pattern={"dense_h_to_4h": 3},
        ),
    ),
    "LoKr, decomposed": (
        llama,
        LoKrConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], decompose_both=True, r=2),
    ),
    "LoKr and whole tensors": (
        llama,
        LoKrConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    ),
    "IA3 as it is by default": (llama, IA3Config(task_type="CAUSAL_LM")),
    "IA3 of GPT-2": (gpt2, IA3Config(task_type="CAUSAL_LM")),
    "OFT": (llama, OFTConfig(task_type="CAUSAL_LM", target_modules="all-linear", oft_block_size=8)),
    "AdaLoRA": (llama, AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10)),
    "a head that has another name in files": (gpt_neox, lora(target_modules=["query_key_value", "lm_head"])),
    "a whole head of another name": (gpt_neox, lora(target_modules=["query_key_value"], modules_to_save=["lm_head"])),
    "both as a whole": (gpt_neox, lora(target_modules=["dense"], modules_to_save=["embed_in", "lm_head"])),
    "both matrices, which are apart": (gpt_neox, lora(target_modules=["embed_in", "lm_head"], use_dora=True)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", FORMS)
def test_as_the_tuned_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build_model, config = FORMS[name]
    adapter = write_adapter(tmp_path, build_model, config, dtype)
    expected, before = logits(tuned_model(tmp_path / "base", adapter)), logits_of(tmp_path / "base")
    found = logits_of(write_theta_f(tmp_path / "base", adapter, tmp_path / "theta_f"))
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    else:  # θ_f is rounded to the base's type here
        assert (found - expected).abs().max() < 0.1 * (before - expected).abs().max() + 1e-3
    assert not torch.equal(found, before)


@pytest.mark.parametrize("family", ["Gemma 3", "LLaVA", "Qwen2-VL"])
@pytest.mark.parametrize("vision", [False, True], ids=["text", "text and images"])
def test_models_for_text_and_images(family: str, vision: bool, tmp_path: Path) -> None:
    """Names in memory are not those on disk."""
    module = build(family, 0)
    module.save_pretrained(tmp_path / "base")
    kind = auto_class(module.config)
    targets = ["q_proj", "v_proj"] if vision else r".*language_model.*\.(q_proj|v_proj)"
    adapted = get_peft_model(kind.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=targets, use_dora=True))
    with torch.no_grad():
        for number, parameter in enumerate(adapted.parameters()):
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    adapted.save_pretrained(tmp_path / "adapter")
    out = write_theta_f(tmp_path / "base", tmp_path / "adapter", tmp_path / "theta_f")
    found = kind.from_pretrained(out)
    torch.testing.assert_close(logits(found), logits(adapted), rtol=1e-4, atol=1e-5)
    merged = adapted.merge_and_unload().state_dict()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6]),
        TrainableTokensConfig(token_indices=[5, 6]),
        LoraConfig(target_modules=["q_proj", "embed_tokens", "lm_head"], ensure_weight_tying=True),
    ],
    ids=["tokens", "tokens alone", "LoRA on both"],
)
def test_the_tied_matrix_of_a_model_for_text_and_images(config: Any, tmp_path: Path) -> None:
    build("Gemma 3", 0).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(auto_class(build("Gemma 3", 0).config).from_pretrained(tmp_path / "base"), config)
    with torch.no_grad():
        for number, parameter in enumerate(adapted.parameters()):
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    out = write_theta_f(tmp_path / "base", tmp_path / "adapter", tmp_path / "theta_f")
    found = type(build("Gemma 3", 0)).from_pretrained(out)
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-5)


def test_an_embedding_of_another_name_is_tied_too(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, mamba, lora(target_modules=["embeddings", "x_proj"]))
    expected = logits(tuned_model(tmp_path / "base", adapter))
    with pytest.raises(InputError, match=r"adapts backbone.embeddings.weight, which is tied") as caught:
        write_theta_f(tmp_path / "base", adapter, tmp_path / "out")
    run_advice(str(caught.value))
    out = write_theta_f(tmp_path / "base", adapter, tmp_path / "theta_f", tmp_path / "base-untied")
    torch.testing.assert_close(logits_of(out), expected, rtol=1e-4, atol=1e-5)
