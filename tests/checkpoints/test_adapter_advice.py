"""What messages about adapters tell a person to do, done."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from perta_fast import InputError, apply
from perta_fast.cli import main
from perta_fast.models.merge_adapter import merge_adapter
from perta_fast.runs.inspect import inspect
from tests.checkpoints.test_adapters import gpt2
from tests.support.adapters import (
    IDS,
    change_settings,
    logits,
    logits_of,
    run_advice,
    tuned_model,
    write_adapter,
    write_theta_f,
)
from tests.support.checkpoints import draw, read_checkpoint
from tests.support.models import llama

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "down_proj"]} | settings)


def refusal(folder: Path, message: str, tuned: str = "adapter") -> str:
    """The message with which ``apply`` refuses the adapter; nothing is written."""
    with pytest.raises(InputError, match=message) as caught:
        apply(folder / "model", folder / "base", folder / tuned, rule="tv", out=folder / "refused", progress=False)
    assert not (folder / "refused").exists()
    return str(caught.value)


def tune_(adapted: Any) -> None:
    """Move all that is trained."""
    with torch.no_grad():
        for number, parameter in enumerate(adapted.parameters()):
            if parameter.requires_grad:
                parameter.add_(draw(tuple(parameter.shape), seed=number).to(parameter) * 0.05)


def assert_converted_or_merged_live(live: Any, expected: torch.Tensor, tmp_path: Path) -> None:
    """Both ways out that the message names give the tuned model."""
    initial = str(tmp_path / "before")
    live.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=initial)
    out = write_theta_f(tmp_path / "base", tmp_path / "converted", tmp_path / "of converted")
    torch.testing.assert_close(logits_of(out), expected, rtol=1e-4, atol=1e-4)
    live.merge_and_unload().save_pretrained(tmp_path / "live")
    out = write_theta_f(tmp_path / "base", tmp_path / "live", tmp_path / "of live")
    torch.testing.assert_close(logits_of(out), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa_niter_4", "pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_start_that_changed_the_base_is_converted_or_merged_live(start: str, rslora: bool, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    llama(1).save_pretrained(tmp_path / "model")
    live = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora(init_lora_weights=start, use_rslora=rslora)
    )
    live.save_pretrained(tmp_path / "before")
    tune_(live)
    live.save_pretrained(tmp_path / "adapter")
    expected = logits(live)
    if "niter" in start:  # loading it draws the base's change anew: what a merge gives now is another model
        message = refusal(tmp_path, "path_initial_model_for_weight_conversion, the adapter as it was before training")
        assert "merge it and give" not in message and "merge_and_unload, then save_pretrained" in message
        assert not torch.allclose(logits(tuned_model(tmp_path / "base", tmp_path / "adapter")), expected, atol=1e-4)
    else:
        run_advice(refusal(tmp_path, "changes the base model too; merge it"))
        out = write_theta_f(tmp_path / "base", tmp_path / "adapter-merged", tmp_path / "merged")
        torch.testing.assert_close(logits_of(out), expected, rtol=1e-4, atol=1e-5)
    assert_converted_or_merged_live(live, expected, tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_residue_in_bfloat16_is_that_of_the_training(start: str, tmp_path: Path) -> None:
    """The base's change was rounded to its type when training began; the advised merge rounds it as well."""
    base = llama().to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    llama(1).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    live = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora(init_lora_weights=start))
    tune_(live)
    live.save_pretrained(tmp_path / "adapter")
    expected = logits(live.float())
    run_advice(refusal(tmp_path, "merge it"))
    torch.testing.assert_close(logits_of(tmp_path / "adapter-merged"), expected, rtol=1e-4, atol=1e-5)


def started_from_data(start: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An adapter that peft begins with what a model makes of samples."""
    settings: dict[str, Any] = {"init_lora_weights": start, "r": 4, "lora_alpha": 8}
    if start == "lora_ga":
        from peft.tuners.lora.config import LoraGAConfig
        from peft.tuners.lora.loraga import preprocess_loraga

        config = lora(**settings, lora_ga_config=LoraGAConfig())
        preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())
        return get_peft_model(model, config)
    # Of the package attrs, which may not be installed, peft uses here what the standard library has too.
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    texts = torch.randint(2, 300, (20, 1, 64), generator=torch.Generator().manual_seed(0))
    config = lora(**settings, corda_config=CordaConfig(corda_method="kpm"))
    with torch.no_grad():
        preprocess_corda(model, config, run_model=lambda: [model(input_ids=text) for text in texts])
    return get_peft_model(model, config)


@pytest.mark.parametrize("start", ["lora_ga", "corda"])
def test_a_start_from_data_is_not_repeated_by_loading(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways out that the message names give the tuned model; LoftQ's start needs a GPU and bitsandbytes."""
    llama().save_pretrained(tmp_path / "base")
    llama(1).save_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    live = started_from_data(start, base, monkeypatch)
    live.save_pretrained(tmp_path / "before")
    tune_(live)
    live.save_pretrained(tmp_path / "adapter")
    expected = logits(live)
    message = refusal(tmp_path, "path_initial_model_for_weight_conversion, the adapter as it was before training")
    assert "merge it and give" not in message and "merge_and_unload, then save_pretrained" in message
    if start == "corda":
        with pytest.raises(ValueError, match="please run `preprocess_corda` first"):
            tuned_model(tmp_path / "base", tmp_path / "adapter")
    else:
        assert not torch.allclose(logits(tuned_model(tmp_path / "base", tmp_path / "adapter")), expected, atol=1e-4)
    assert_converted_or_merged_live(live, expected, tmp_path)


@pytest.mark.parametrize("start", ["lora_ga", "corda", "pissa_niter_16"])
def test_a_start_that_can_be_converted(start: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, llama, lora())
    change_settings(tmp_path / "adapter", init_lora_weights=start)
    message = refusal(tmp_path, f"init_lora_weights '{start}' changes the base")
    assert "merge it and give" not in message and "path_initial_model_for_weight_conversion" in message


@pytest.mark.parametrize("start", ["loftq", "something new"])
def test_a_start_that_cannot_be_converted(start: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, llama, lora())
    change_settings(tmp_path / "adapter", init_lora_weights=start)
    message = refusal(tmp_path, f"init_lora_weights '{start}' changes the base")
    assert "merge it and give" not in message and "path_initial" not in message
    assert "merge_and_unload, then save_pretrained" in message


def test_a_bias_for_which_the_model_has_no_place(tmp_path: Path) -> None:
    """Peft cannot merge it either."""
    adapter = write_adapter(tmp_path, llama, lora(lora_bias=True))
    message = refusal(tmp_path, "lora_bias gives model.layers.0.mlp.down_proj a bias, for which the model has no")
    assert "merge" not in message and "tune again without lora_bias" in message
    with pytest.raises(Exception, match="bias"):
        tuned_model(tmp_path / "base", adapter).merge_and_unload()


def test_a_bias_beside_one_of_the_base_is_taken(tmp_path: Path) -> None:
    """GPT-2's maps have biases, and are transposed."""
    config = lora(target_modules=["c_attn", "c_fc"], lora_bias=True, fan_in_fan_out=True, use_rslora=True)
    adapter = write_adapter(tmp_path, gpt2, config)
    expected = logits(tuned_model(tmp_path / "base", adapter))
    out = write_theta_f(tmp_path / "base", adapter, tmp_path / "out")
    torch.testing.assert_close(logits_of(out), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [{"fine_tune_type": "lora"}, {"fine_tune_type": "dora"}, {}])
def test_an_adapter_of_mlx(config: dict[str, str], tmp_path: Path) -> None:
    write_adapter(tmp_path, llama, lora())
    mlx = tmp_path / "it's of mlx"
    mlx.mkdir()
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(32, 8)}, mlx / "adapters.safetensors")
    settings = {"lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}, "model": "somewhere/else"} | config
    (mlx / "adapter_config.json").write_text(json.dumps(settings))
    message = refusal(tmp_path, "an adapter of MLX, not of peft", mlx.name)
    command = shlex.split(message.partition("checkpoint: ")[2])
    assert command == [
        *("mlx_lm.fuse", "--model", str(tmp_path / "base"), "--adapter-path", str(mlx)),
        *("--save-path", f"{mlx}-fused"),
    ]


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "whole"])
def test_parts_that_were_on_other_processes(kind: str, tmp_path: Path) -> None:
    settings = {"use_dora": kind == "DoRA", "modules_to_save": ["norm"] if kind == "whole" else None}
    config = LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM") if kind == "LoHa" else lora(**settings)
    path = write_adapter(tmp_path, llama, config) / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    chosen = [name for name in tensors if kind != "whole" or "norm" in name]
    save_file(tensors | {name: torch.empty(0) for name in chosen}, path)
    message = refusal(tmp_path, r"has shape \[0\]: DeepSpeed ZeRO-3 or FSDP")
    assert "stage3_gather_16bit_weights_on_model_save" in message and "merge it" not in message


def test_no_tensors(tmp_path: Path) -> None:
    path = write_adapter(tmp_path, llama, lora()) / "adapter_model.safetensors"
    save_file({}, path)
    refusal(tmp_path, "the adapter has no tensors, so it changes nothing")
    arguments = [f"--{role}={tmp_path / path}" for role, path in (("model", "model"), ("base", "base"))]
    command = ["apply", *arguments, f"--tuned={path.parent}", "--rule=tv", "--lam=1", f"--out={tmp_path / 'out'}"]
    assert main(command) == 2
    assert main([*command, "--allow-zero"]) == 2


def test_no_name_meets_the_model(tmp_path: Path) -> None:
    """Merging would write the base again: peft leaves out what it does not know."""
    path = write_adapter(tmp_path, llama, lora()) / "adapter_model.safetensors"
    tensors = {name.replace("layers", "blocks"): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    message = refusal(tmp_path, "adapts model.blocks.0.mlp.down_proj.weight, which is not in")
    assert "merge" not in message and "the checkpoint that the adapter was tuned from" in message


def test_what_its_config_does_not_name(tmp_path: Path) -> None:
    """Peft would leave these out too, so that a merge is not the tuned model."""
    write_adapter(tmp_path, llama, lora(use_dora=True))
    change_settings(tmp_path / "adapter", use_dora=False)
    message = refusal(tmp_path, "is not of plain LoRA, but adapter_config.json names no other form")
    assert "merge" not in message


def test_without_a_base_the_adapters_own_is_named(tmp_path: Path) -> None:
    write_adapter(tmp_path, llama, lora())
    change_settings(tmp_path / "adapter", peft_type="VERA", base_model_name_or_path="of/the hub")
    with pytest.raises(InputError, match=r"merge_adapter\(.*, 'of/the hub'\)"):
        inspect(tmp_path / "adapter").text()
    assert refusal(tmp_path, "of type VERA").endswith(f", '{tmp_path / 'base'}')\"")


def tied() -> Any:
    return llama(tie_word_embeddings=True)


@pytest.mark.parametrize(
    "config",
    [
        lora(init_lora_weights="pissa", target_modules=["q_proj", "lm_head"]),
        lora(init_lora_weights="olora", target_modules=["q_proj", "embed_tokens"]),
        lora(init_lora_weights="pissa", target_modules=["q_proj"], modules_to_save=["lm_head"]),
        VeraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], r=8),
    ],
    ids=["pissa, head", "olora, embedding", "pissa, whole head", "VeRA, head"],
)
def test_a_merge_of_tied_matrices_gives_both(config: Any, tmp_path: Path) -> None:
    """Peft's merge would add what belongs to one of them to both. Then the model is untied, as its message says."""
    adapter = write_adapter(tmp_path, tied, config)
    expected = logits(tuned_model(tmp_path / "base", adapter))
    run_advice(refusal(tmp_path, "merge it and give the merged checkpoint"))
    torch.testing.assert_close(logits_of(tmp_path / "adapter-merged"), expected, rtol=1e-4, atol=1e-5)
    run_advice(refusal(tmp_path, "two matrices as well: untie that with", "adapter-merged"))
    out, untied = tmp_path / "out", tmp_path / "model-untied"
    write_theta_f(tmp_path / "base", tmp_path / "adapter-merged", out, untied)
    found, before, merged = (read_checkpoint(path) for path in (out, untied, tmp_path / "adapter-merged"))
    base = read_checkpoint(tmp_path / "base")
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, before[name] + merged[name] - base[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("way", ["the prefix twice", "no prefix", "a state dict"])
def test_a_merge_of_names_that_peft_does_not_know(way: str, start: str, tmp_path: Path) -> None:
    """Peft would leave the tensors out and write the base."""
    adapter = write_adapter(tmp_path, llama, lora(init_lora_weights=start, modules_to_save=["norm"]))
    expected = logits(tuned_model(tmp_path / "base", adapter))
    path = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    rename = {
        "the prefix twice": lambda name: f"base_model.model.{name}",
        "no prefix": lambda name: name.removeprefix("base_model.model."),
        "a state dict": lambda name: name.replace("norm.", "norm.modules_to_save.default.").replace(
            "lora_A.", "lora_A.default."
        ),
    }[way]
    save_file({rename(name): tensor for name, tensor in tensors.items()}, path)
    run_advice(refusal(tmp_path, "merge it and give the merged checkpoint"))
    torch.testing.assert_close(logits_of(tmp_path / "adapter-merged"), expected, rtol=1e-4, atol=1e-5)


def test_a_merge_does_not_leave_tensors_out(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, llama, lora())
    path = adapter / "adapter_model.safetensors"
    save_file({name.replace("layers", "blocks"): value for name, value in load_file(path).items()}, path)
    with pytest.raises(InputError, match=r"blocks.* has no place in the model in"):
        merge_adapter(str(adapter), str(tmp_path / "base"))


@pytest.mark.parametrize("kind", ["VERA", "pissa"])
def test_an_adapter_of_a_model_without_its_head_is_merged_into_the_whole(kind: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    llama(1).save_pretrained(tmp_path / "model")
    modules = {"target_modules": ["q_proj", "v_proj"]}
    config = VeraConfig(r=8, **modules) if kind == "VERA" else LoraConfig(init_lora_weights=kind, **modules)
    live = get_peft_model(AutoModel.from_pretrained(tmp_path / "base"), config)
    tune_(live)
    live.save_pretrained(tmp_path / "adapter")
    run_advice(refusal(tmp_path, "merge it"))
    tuned = live.merge_and_unload().state_dict()
    merged = read_checkpoint(tmp_path / "adapter-merged")
    base = read_checkpoint(tmp_path / "base")
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, tuned.get(name.removeprefix("model."), base[name]), rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(tensor, base[name]) for name, tensor in merged.items())


def test_a_pickled_adapter_is_converted_before_it_is_merged(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, llama, lora(init_lora_weights="pissa"))
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    run_advice(refusal(tmp_path, r"adapter_model\.bin, which is never loaded here; convert it with"))
    run_advice(refusal(tmp_path, "merge it"))
    assert read_checkpoint(tmp_path / "adapter-merged").keys() == read_checkpoint(tmp_path / "base").keys()
