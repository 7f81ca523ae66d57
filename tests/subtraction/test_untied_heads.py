"""Output heads of models that do not tie them: none is taken for an input embedding."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForSequenceClassification, LlamaModel, PreTrainedModel

from perta_fast import InputError, apply, apply_to_module_
from tests.families.configs import SIZES
from tests.support.checkpoints import read_checkpoint, same_bytes, write_checkpoint
from tests.support.models import llama, nudge_

pytestmark = pytest.mark.usefixtures("one_thread")


def write_three(make: Callable[[], PreTrainedModel], folder: Path) -> list[Path]:
    """model, base, tuned."""
    paths = []
    for seed, role in enumerate(("model", "base", "tuned")):
        torch.manual_seed(7)
        model = make()
        nudge_(model, seed)
        model.save_pretrained(folder / role)
        paths.append(folder / role)
    return paths


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
@pytest.mark.parametrize("role", [0, 1, 2])
def test_a_model_without_a_head_is_refused(kind: type[PreTrainedModel], role: int, tmp_path: Path) -> None:
    paths = write_three(llama, tmp_path)
    torch.manual_seed(7)
    kind(llama().config).save_pretrained(tmp_path / "headless")
    paths[role] = tmp_path / "headless"
    with pytest.raises(InputError, match=r"(lacks|has) tensors? lm_head.weight") as error:
        apply(*paths, rule="tv", out=tmp_path / "out")
    assert "tie" not in str(error.value)
    if role:
        model = llama()
        with pytest.raises(InputError, match=r"lacks tensor lm_head.weight"):
            apply_to_module_(model, *paths[1:], rule="tv")


def neox() -> PreTrainedModel:
    """Its head is embed_out.weight in files and lm_head.weight in memory."""
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}))


def with_names_in_memory(path: Path) -> Path:
    tensors = {name.replace("embed_out", "lm_head"): tensor for name, tensor in read_checkpoint(path).items()}
    assert "lm_head.weight" in tensors
    shutil.rmtree(path, ignore_errors=False)
    write_checkpoint(path, tensors)
    neox().config.save_pretrained(path)
    return path


@pytest.mark.parametrize("renamed", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_a_head_under_two_names(renamed: tuple[int, ...], tmp_path: Path) -> None:
    paths = write_three(neox, tmp_path)
    apply(*paths, rule="tv", lam=0.7, out=tmp_path / "expected")
    live = GPTNeoXForCausalLM.from_pretrained(paths[0])
    for role in renamed:
        with_names_in_memory(paths[role])
    apply(*paths, rule="tv", lam=0.7, out=tmp_path / "out")
    found, expected = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "expected")
    assert ("lm_head.weight" in found) is (0 in renamed)
    assert all(
        same_bytes(found[name.replace("embed_out", "lm_head") if 0 in renamed else name], tensor)
        for name, tensor in expected.items()
    )
    apply_to_module_(live, *paths[1:], rule="tv", lam=0.7)
    assert same_bytes(live.lm_head.weight.detach(), expected["embed_out.weight"])


def test_an_adapter_of_such_a_head(tmp_path: Path) -> None:
    """Named as in memory; the input embedding stays."""
    model, base, _ = write_three(neox, tmp_path)
    settings = LoraConfig(target_modules=["lm_head"], r=2, lora_alpha=2, init_lora_weights=False)
    adapted = get_peft_model(GPTNeoXForCausalLM.from_pretrained(base), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    apply(model, base, tmp_path / "adapter", rule="tv", out=tmp_path / "out")
    before, after = read_checkpoint(model), read_checkpoint(tmp_path / "out")
    assert [name for name in before if not same_bytes(before[name], after[name])] == ["embed_out.weight"]
    delta = adapted.base_model.model.lm_head.get_delta_weight("default").detach()
    assert torch.allclose(before["embed_out.weight"] - after["embed_out.weight"], delta, atol=1e-6)
