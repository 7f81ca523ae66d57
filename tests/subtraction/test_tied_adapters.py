"""Adapters of models whose input embedding and output head are one matrix: the exact tensors, or the way to them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig
from safetensors.torch import save_model
from transformers import AutoModelForCausalLM

from perta_fast import InputError, apply, apply_to_module_, unlearn, verify
from tests.checkpoints.test_adapters import gpt2
from tests.support.adapters import logits, logits_of, run_advice, tuned_model, write_adapter, write_theta_f
from tests.support.checkpoints import read_checkpoint, same_bytes, write_checkpoint
from tests.support.models import FORGET, RETAIN, llama, tokenizer, write_lines

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"]} | settings)


ONE_MATRIX = {
    "LoRA on both, tied": lambda: lora(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True),
    "LoRA on the embedding, tied": lambda: lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    "LoRA on the head, tied": lambda: lora(target_modules=["lm_head", "q_proj"], ensure_weight_tying=True),
    "both saved, tied": lambda: lora(modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True),
    "embedding saved, tied": lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "trained tokens": lambda: lora(trainable_token_indices=[1, 2, 9]),
    "trained tokens by name": lambda: lora(trainable_token_indices={"embed_tokens": [1, 2, 9]}),
    "tokens alone": lambda: TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[1, 2, 9]),
}
TWO_MATRICES = {
    "LoRA on both": lambda: lora(target_modules=["embed_tokens", "lm_head"]),
    "LoRA on the head": lambda: lora(target_modules=["lm_head", "q_proj"]),
    "LoRA on the embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "DoRA on the embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"], use_dora=True),
    "DoRA on the head": lambda: lora(target_modules=["lm_head"], use_dora=True),
    "both saved": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    "embedding saved": lambda: lora(modules_to_save=["embed_tokens"]),
    "head saved": lambda: lora(modules_to_save=["lm_head"]),
    "trained tokens of the head": lambda: lora(trainable_token_indices={"lm_head": [3, 4]}),
    "tokens of the head alone": lambda: TrainableTokensConfig(
        task_type="CAUSAL_LM", target_modules=["lm_head"], token_indices=[3, 4]
    ),
}


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def store_both(folder: Path) -> None:
    """Write the matrix a second time, as older versions of transformers did."""
    tensors = read_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    tensors |= {HEAD: tensors[EMBEDDING]}
    shutil.move(write_checkpoint(folder / "new", tensors) / "model.safetensors", folder / "model.safetensors")


def store_head_alone(folder: Path) -> None:
    """Write it as safetensors' own ``save_model`` does, which keeps the first of equal names."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"))
    assert HEAD in read_checkpoint(folder) and EMBEDDING not in read_checkpoint(folder)


STORED: dict[str, Callable[[Path], None]] = {
    "embedding": lambda folder: None,
    "both": store_both,
    "head": store_head_alone,
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", ONE_MATRIX)
def test_one_matrix_is_taken(name: str, stored: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, tied, ONE_MATRIX[name]())
    expected = logits(tuned_model(tmp_path / "base", adapter))
    STORED[stored](tmp_path / "base")
    out = write_theta_f(tmp_path / "base", adapter, tmp_path / "theta_f")
    torch.testing.assert_close(logits_of(out), expected, rtol=1e-4, atol=1e-5)
    tensors = read_checkpoint(out)
    assert tensors.keys() == read_checkpoint(tmp_path / "base").keys()
    if stored == "both":
        assert same_bytes(tensors[HEAD], tensors[EMBEDDING])
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    apply_to_module_(module, tmp_path / "base", adapter, rule="tv", lam=-1.0)
    torch.testing.assert_close(logits(module), expected, rtol=1e-4, atol=1e-5)
    checked = verify(out, full=True, progress=False)
    assert not checked.problems and checked.recomputed == checked.tensors


@pytest.mark.parametrize("name", TWO_MATRICES)
def test_two_matrices_are_refused_with_the_command_that_makes_room(name: str, tmp_path: Path) -> None:
    """Adapter and merged checkpoint have one answer; after the command both give the tuned model."""
    adapter = write_adapter(tmp_path, tied, TWO_MATRICES[name]())
    base, model = tmp_path / "base", tmp_path / "model"
    tokenizer().save_pretrained(base)
    tuned = tuned_model(base, adapter)
    expected = logits(tuned)
    with pytest.raises(InputError, match="two matrices") as caught:
        apply(base, base, adapter, rule="tv", lam=-1.0, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    run_advice(str(caught.value))
    out = write_theta_f(base, adapter, tmp_path / "theta_f", tmp_path / "base-untied")
    torch.testing.assert_close(logits_of(out), expected, rtol=1e-4, atol=1e-5)
    module = AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(InputError, match="two matrices"):
        apply_to_module_(module, base, adapter, rule="tv")
    if "saved" not in name:  # else what peft merges is not the tuned model
        return
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    with pytest.raises(InputError, match="untie that with") as caught:
        apply(base, base, tmp_path / "merged", rule="tv", lam=-1.0, out=tmp_path / "out", progress=False)
    run_advice(str(caught.value))
    with pytest.raises(InputError, match="two matrices"):
        apply_to_module_(module, base, tmp_path / "merged", rule="tv")
    merged = write_theta_f(base, tmp_path / "merged", tmp_path / "merged_theta_f", tmp_path / "base-untied")
    first, second = read_checkpoint(out), read_checkpoint(merged)
    assert first.keys() == second.keys()
    for tensor, value in second.items():
        torch.testing.assert_close(first[tensor], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("saved", [False, True], ids=["LoRA", "saved"])
def test_tying_of_an_embedding_that_peft_does_not_look_for(saved: bool, tmp_path: Path) -> None:
    """It looks for ``embed_tokens`` and ``lm_head``: with ``wte`` the tuned model has two matrices all the same."""
    how: dict[str, Any] = {"modules_to_save": ["wte"]} if saved else {"target_modules": ["c_attn", "wte"]}
    adapter = write_adapter(
        tmp_path,
        gpt2,
        lora(**{"target_modules": ["c_attn"], "ensure_weight_tying": True, "fan_in_fan_out": True} | how),
    )
    expected = logits(tuned_model(tmp_path / "base", adapter))
    with pytest.raises(InputError, match="two matrices") as caught:
        write_theta_f(tmp_path / "base", adapter, tmp_path / "out")
    run_advice(str(caught.value))
    out = write_theta_f(tmp_path / "base", adapter, tmp_path / "theta_f", tmp_path / "base-untied")
    torch.testing.assert_close(logits_of(out), expected, rtol=1e-4, atol=1e-5)


def test_equal_copies_beside_the_adapter(tmp_path: Path) -> None:
    """Saved with ``save_embedding_layers``: both matrices as they were."""
    from peft import PeftModel

    adapter = write_adapter(tmp_path, tied, lora())
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter)
    tuned.save_pretrained(tmp_path / "with embeddings", save_embedding_layers=True)
    assert len(read_checkpoint(tmp_path / "with embeddings")) == len(read_checkpoint(adapter)) + 2
    first = write_theta_f(tmp_path / "base", adapter, tmp_path / "first")
    second = write_theta_f(tmp_path / "base", tmp_path / "with embeddings", tmp_path / "second")
    ours, theirs = read_checkpoint(first), read_checkpoint(second)
    assert all(same_bytes(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("roles", [("base",), ("model",), ("tuned",), ("base", "model", "tuned")], ids="-".join)
def test_a_tied_checkpoint_that_stores_the_head_alone(roles: tuple[str, ...], tmp_path: Path) -> None:
    """Of the same three checkpoints, whichever of them store the matrix as ``lm_head.weight``."""
    for seed, role in enumerate(("base", "model", "tuned")):
        llama(seed, tie_word_embeddings=True).save_pretrained(tmp_path / role)
    arguments = tmp_path / "model", tmp_path / "base", tmp_path / "tuned"
    apply(*arguments, rule="tv", out=tmp_path / "expected", progress=False)
    for role in roles:
        store_head_alone(tmp_path / role)
    apply(*arguments, rule="tv", out=tmp_path / "out", progress=False)
    found, expected = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "expected")
    if "model" in roles:
        expected[HEAD] = expected.pop(EMBEDDING)
    assert found.keys() == expected.keys()
    assert all(same_bytes(found[name], expected[name]) for name in found)
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    apply_to_module_(module, *arguments[1:], rule="tv")
    assert same_bytes(module.lm_head.weight, expected[HEAD if "model" in roles else EMBEDDING])
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits(module))


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_unlearn_with_the_head_alone(stream: bool, tmp_path: Path) -> None:
    for seed, role in enumerate(("base", "model", "tuned")):
        llama(seed, tie_word_embeddings=True).save_pretrained(tmp_path / role)
    tokenizer().save_pretrained(tmp_path / "base")
    data = write_lines(tmp_path / "forget.jsonl", FORGET), write_lines(tmp_path / "retain.jsonl", RETAIN)
    arguments = (tmp_path / "model", tmp_path / "base", tmp_path / "tuned", *data)
    unlearn(*arguments, stream=stream, out=tmp_path / "expected", progress=False, lam=1.0, rule="fisher")
    for role in ("base", "model", "tuned"):
        store_head_alone(tmp_path / role)
    unlearn(*arguments, stream=stream, out=tmp_path / "out", progress=False, lam=1.0, rule="fisher")
    found, expected = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "expected")
    expected[HEAD] = expected.pop(EMBEDDING)
    assert found.keys() == expected.keys()
    assert all(same_bytes(found[name], expected[name]) for name in found)
