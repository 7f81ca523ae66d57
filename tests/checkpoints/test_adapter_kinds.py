"""Every kind of adapter that peft knows: taken exactly, or refused with advice that gives the tuned model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from transformers import MixtralConfig, MixtralForCausalLM

from perta_fast import InputError, apply
from perta_fast.checkpoints.adapters import Adapter
from tests.checkpoints.test_adapters import gpt2
from tests.support.adapters import (
    Build,
    change_settings,
    logits,
    logits_of,
    run_advice,
    tuned_model,
    write_adapter,
    write_theta_f,
)
from tests.support.checkpoints import read_checkpoint, same_bytes
from tests.support.models import llama

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

Outcome = Literal["read", "by peft", "merge first", "refused"]
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


def mixtral() -> MixtralForCausalLM:
    """Its experts are joined in memory and apart on disk."""
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=64,
        )
    )


@dataclass(frozen=True)
class Kind:
    """An adapter to make, and what becomes of it. message: of the error."""

    outcome: Outcome
    settings: dict[str, Any] = field(default_factory=dict)
    peft_type: str = "LORA"
    build: Build = llama
    message: str = ""
    written: bool = True

    def config(self) -> Any:
        settings: dict[str, Any] = {"task_type": "CAUSAL_LM"}
        if "target_modules" in PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.peft_type)].__dataclass_fields__:
            settings["target_modules"] = PROJECTIONS
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.peft_type)](**settings | self.settings)


def lora(outcome: Outcome, message: str = "", build: Build = llama, **settings: Any) -> Kind:
    return Kind(outcome, settings, build=build, message=message)


def unwritten(name: str, message: str) -> Kind:
    """A type that a small model cannot have: it is refused by its config alone."""
    return Kind("refused", {}, name, message=message, written=False)


def of_type(name: str, outcome: Outcome, message: str = "", **settings: Any) -> Kind:
    return Kind(outcome, settings, name, message=message)


KINDS: dict[str, Kind] = {
    "LoRA": lora("read"),
    "rsLoRA": lora("read", use_rslora=True, r=5),
    "`rank_pattern`, `alpha_pattern`": lora(
        "read", rank_pattern={"q_proj": 7, r"layers\.1\.mlp\.down_proj": 1}, alpha_pattern={"v_proj": 3}
    ),
    "`fan_in_fan_out` (GPT-2)": lora("read", build=gpt2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "`layers_to_transform`": lora("read", layers_to_transform=[1]),
    "`bias`": lora("read", build=gpt2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True),
    "`modules_to_save`": lora("read", modules_to_save=["lm_head", "norm"]),
    "embeddings": lora("read", target_modules=["embed_tokens", "q_proj"]),
    "`init_lora_weights`: gaussian, eva, orthogonal, mica": lora("read", init_lora_weights="mica"),
    "`use_dora`": lora("by peft", use_dora=True, target_modules=[*PROJECTIONS, "embed_tokens"]),
    "`lora_bias`": lora("by peft", build=gpt2, target_modules=["c_attn"], lora_bias=True, fan_in_fan_out=True),
    "`target_parameters` (joined experts)": lora(
        "by peft",
        build=mixtral,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "`trainable_token_indices`": lora("by peft", trainable_token_indices=[1, 2, 9]),
    "`init_lora_weights`: pissa, olora": lora("merge first", "changes the base model too", init_lora_weights="pissa"),
    "`init_lora_weights`: pissa_niter_N, corda, lora_ga, loftq": lora(
        "refused", "path_initial_model_for_weight_conversion", init_lora_weights="pissa_niter_4"
    ),
    "`velora_config`": lora("by peft", velora_config=VeloraConfig()),
    "`use_bdlora`": lora(
        "by peft",
        use_bdlora=BdLoraConfig(target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj", "v_proj"], nblocks=2),
    ),
    "`monteclora_config`": lora("by peft", monteclora_config=MontecloraConfig()),
    "`kasa_config`": lora("merge first", "setting kasa_config is not understood", kasa_config=KasaConfig()),
    "`arrow_config`": lora("refused", "mixed anew for every text", arrow_config={"top_k": 1}),
    "`use_qalora`": lora("refused", "peft cannot merge", use_qalora=True),
    "`layer_replication`": lora("refused", "more layers than its base", layer_replication=[(0, 2), (1, 2)]),
    "`alora_invocation_tokens`": lora("refused", "on for some tokens only", alora_invocation_tokens=[5]),
    "ADALORA": of_type("ADALORA", "by peft", total_step=10),
    "BOFT": of_type("BOFT", "by peft", boft_block_size=4),
    "C3A": of_type("C3A", "by peft", block_size=8),
    "DEFT": of_type("DEFT", "by peft"),
    "DELORA": of_type("DELORA", "by peft"),
    "FOURIERFT": of_type("FOURIERFT", "by peft", n_frequency=20),
    "GLORA": of_type("GLORA", "by peft"),
    "GRALORA": of_type("GRALORA", "by peft"),
    "HIRA": of_type("HIRA", "by peft"),
    "HRA": of_type("HRA", "by peft"),
    "IA3": of_type("IA3", "by peft", feedforward_modules=["down_proj"]),
    "LN_TUNING": of_type("LN_TUNING", "by peft", target_modules=["input_layernorm", "norm"]),
    "LOHA": of_type("LOHA", "by peft"),
    "LOKR": of_type("LOKR", "by peft"),
    "MISS": of_type("MISS", "by peft", r=8),
    "OFT": of_type("OFT", "by peft", oft_block_size=4),
    "OSF": of_type("OSF", "merge first", "of type OSF"),
    "PEANUT": of_type("PEANUT", "by peft"),
    "PSOFT": of_type("PSOFT", "merge first", "of type PSOFT", r=8),
    "ROAD": of_type("ROAD", "by peft", group_size=8),
    "SHIRA": of_type("SHIRA", "by peft", r=4),
    "SUPERTUNING": of_type("SUPERTUNING", "by peft"),
    "TRAINABLE_TOKENS": of_type("TRAINABLE_TOKENS", "by peft", target_modules=["embed_tokens"], token_indices=[1, 9]),
    "WAVEFT": of_type("WAVEFT", "by peft", n_frequency=20),
    "FROD": of_type("FROD", "merge first", "of type FROD"),
    "PVERA": of_type("PVERA", "merge first", "of type PVERA"),
    "RANDLORA": of_type("RANDLORA", "merge first", "of type RANDLORA", r=4),
    "TINYLORA": of_type("TINYLORA", "merge first", "of type TINYLORA"),
    "UNILORA": of_type("UNILORA", "merge first", "of type UNILORA"),
    "VBLORA": of_type("VBLORA", "merge first", "of type VBLORA", vector_length=8, num_vectors=16),
    "VERA": of_type("VERA", "merge first", "of type VERA"),
    "PROMPT_TUNING": of_type("PROMPT_TUNING", "refused", "adds tokens to the text", num_virtual_tokens=4),
    "P_TUNING": of_type("P_TUNING", "refused", "adds tokens to the text", num_virtual_tokens=4),
    "PREFIX_TUNING": of_type("PREFIX_TUNING", "refused", "adds tokens to the text", num_virtual_tokens=4),
    "ADAPTION_PROMPT": of_type(
        "ADAPTION_PROMPT",
        "refused",
        "adds tokens to the text",
        adapter_len=4,
        adapter_layers=2,
        target_modules="self_attn",
    ),
    "CARTRIDGE": unwritten("CARTRIDGE", "adds tokens to the text"),
    "CPT": unwritten("CPT", "adds tokens to the text"),
    "MULTITASK_PROMPT_TUNING": unwritten("MULTITASK_PROMPT_TUNING", "adds tokens to the text"),
    "POLY": unwritten("POLY", "mixes its parts anew for every text"),
    "XLORA": unwritten("XLORA", "mixes its parts anew for every text"),
    "SHADOW": unwritten("SHADOW", "peft cannot merge"),
    "ADAMSS": of_type("ADAMSS", "refused", "finds clusters anew, which depend on the number of threads"),
    "BEFT": of_type("BEFT", "refused", "peft cannot merge"),
    "LILY": of_type("LILY", "refused", "peft cannot merge"),
}


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.outcome in ("read", "by peft")])
def test_taken_as_the_tuned_model(name: str, tmp_path: Path) -> None:
    """θ_f has the tensors that peft's float32 merge has, and computes what the tuned model does."""
    kind = KINDS[name]
    adapter = write_adapter(tmp_path, kind.build, kind.config())
    tuned = tuned_model(tmp_path / "base", adapter)
    expected = logits(tuned)
    write_theta_f(tmp_path / "base", adapter, tmp_path / "theta_f")
    torch.testing.assert_close(logits_of(tmp_path / "theta_f"), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits_of(tmp_path / "base"), expected, atol=1e-3)
    opened = Adapter.open(adapter)
    assert bool(opened.by_peft) == (kind.outcome == "by peft")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    for lam in (0.7, -1.0):
        for role in ("adapter", "merged"):
            out = tmp_path / f"{role}{lam}"
            apply(tmp_path / "model", tmp_path / "base", tmp_path / role, rule="tv", lam=lam, out=out, progress=False)
        found, wanted = (read_checkpoint(tmp_path / f"{role}{lam}") for role in ("adapter", "merged"))
        assert found.keys() == wanted.keys()
        for tensor in wanted:
            # A product of factors is not rounded before it is subtracted; what peft merges is the same bit for bit.
            close = torch.allclose(found[tensor], wanted[tensor], rtol=1e-6, atol=1e-7)
            assert close if _is_factored(opened, tensor) else same_bytes(found[tensor], wanted[tensor]), tensor


def _is_factored(adapter: Adapter, name: str) -> bool:
    return name in adapter.low_rank


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.outcome == "merge first"])
def test_the_advice_to_merge_gives_the_tuned_model(name: str, tmp_path: Path) -> None:
    """The command is run as it is printed, from a place where the adapter's own base is gone."""
    kind = KINDS[name]
    awkward = kind.peft_type == "VERA"
    folder = tmp_path / ('it\'s a "$HOME" place' if awkward else "place")
    folder.mkdir()
    adapter = write_adapter(folder, kind.build, kind.config())
    expected = logits(tuned_model(folder / "base", adapter))
    change_settings(adapter, base_model_name_or_path="/gone/since")
    with pytest.raises(InputError, match=kind.message) as caught:
        apply(folder / "model", folder / "base", adapter, rule="tv", out=folder / "out", progress=False)
    assert not (folder / "out").exists()
    run_advice(str(caught.value))
    write_theta_f(folder / "base", Path(f"{adapter}-merged"), folder / "theta_f")
    torch.testing.assert_close(logits_of(folder / "theta_f"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.outcome == "refused"])
def test_no_advice_to_merge_where_that_gives_another_model(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    if kind.peft_type == "LORA" and "init_lora_weights" not in kind.settings:
        adapter = write_adapter(tmp_path, kind.build, lora("read").config())
        change_settings(adapter, **kind.settings)
    elif not kind.written:
        adapter = write_adapter(tmp_path, kind.build, lora("read").config())
        change_settings(adapter, peft_type=kind.peft_type)
    else:
        adapter = write_adapter(tmp_path, kind.build, kind.config())
    with pytest.raises(InputError, match=kind.message) as caught:
        apply(tmp_path / "model", tmp_path / "base", adapter, rule="tv", out=tmp_path / "out", progress=False)
    assert "merge it and give" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_page_says_what_becomes_of_every_kind() -> None:
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    kinds = page.partition("## Every kind")[2].partition("## Tied embeddings")[0]
    rows = [row.split("|")[1:3] for row in kinds.splitlines() if row.startswith("| ")]
    table = {name.strip(): outcome.strip() for name, outcome in rows if name.strip() not in ("setting", "type")}
    assert table == {name: kind.outcome for name, kind in KINDS.items()}
    assert {str(peft_type.value) for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING} <= {
        kind.peft_type for kind in KINDS.values()
    }
