"""Commands of messages, run on models of every class: with images, with an encoder, with a classifier's head."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, PreTrainedModel

from perta_fast import InputError, apply
from perta_fast.checkpoints.advice import conversion_command, merge_command, untie_command
from perta_fast.checkpoints.checkpoint import Checkpoint
from tests.families.configs import SIZES
from tests.families.test_multimodal import BY_FAMILY
from tests.support.adapters import run_advice, write_adapter
from tests.support.checkpoints import draw, read_checkpoint, same_bytes
from tests.support.models import llama, nudge_, tokenizer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def classifier() -> PreTrainedModel:
    config = transformers.LlamaConfig(**SIZES, num_labels=3)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model


def t5() -> PreTrainedModel:
    sizes = {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


CLASSES: dict[str, Callable[[], PreTrainedModel]] = {**BY_FAMILY, "classifier": classifier, "T5": t5, "Llama": llama}


def save(name: str, folder: Path) -> PreTrainedModel:
    torch.manual_seed(3)
    model = CLASSES[name]()
    nudge_(model, 2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_a_checkpoint_is_converted_whole(name: str, with_tokenizer: bool, tmp_path: Path) -> None:
    save(name, tmp_path / "m")
    if with_tokenizer:
        tokenizer().save_pretrained(tmp_path / "m")
    run_advice(conversion_command(tmp_path / "m"))
    expected, converted = read_checkpoint(tmp_path / "m"), read_checkpoint(tmp_path / "m-safetensors")
    assert converted.keys() == expected.keys()
    assert all(same_bytes(tensor, converted[key]) for key, tensor in expected.items())
    assert (tmp_path / "m-safetensors" / "tokenizer.json").exists() == with_tokenizer


@pytest.mark.parametrize("name", CLASSES)
def test_an_adapter_is_merged_into_the_whole_model(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "base")
    kind = type(CLASSES[name]())
    modules = ["q", "wo"] if name == "T5" else ["q_proj", "down_proj"]
    adapted = get_peft_model(kind.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=modules))
    with torch.no_grad():
        for number, parameter in enumerate(adapted.parameters()):
            if parameter.requires_grad:
                parameter.add_(draw(tuple(parameter.shape), seed=number) * 0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter").merge_and_unload(
    ).save_pretrained(tmp_path / "expected")  # fmt: skip
    run_advice(merge_command(tmp_path / "adapter", str(tmp_path / "base")))
    expected, merged = read_checkpoint(tmp_path / "expected"), read_checkpoint(tmp_path / "adapter-merged")
    assert merged.keys() == expected.keys() == read_checkpoint(tmp_path / "base").keys()
    assert all(same_bytes(tensor, merged[key]) for key, tensor in expected.items())


@pytest.mark.parametrize("name", ["Gemma 3", "Llama"])
def test_a_tied_model_is_untied_whole(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = CLASSES[name]() if name == "Gemma 3" else llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "m")
    run_advice(untie_command(tmp_path / "m"))
    expected, untied = read_checkpoint(tmp_path / "m"), read_checkpoint(tmp_path / "m-untied")
    (head,) = untied.keys() - expected.keys()
    assert head.endswith("lm_head.weight")
    assert all(same_bytes(tensor, untied[key]) for key, tensor in expected.items())
    again = type(model).from_pretrained(tmp_path / "m-untied")
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_an_adapter_of_another_type_is_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    adapter = write_adapter(tmp_path, llama, config)
    file = adapter / "adapter_model.safetensors"
    stored = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(InputError, match="float32, bfloat16 or float16 is needed, with: ") as caught:
        apply(tmp_path / "model", tmp_path / "base", adapter, rule="tv", out=tmp_path / "out", progress=False)
    run_advice(str(caught.value))
    opened = Checkpoint.open(tmp_path / "adapter-float32", "adapter_model")
    assert all(torch.equal(opened.tensor(key), stored[key].float()) for key in stored)
    report = apply(
        *(tmp_path / "model", tmp_path / "base", tmp_path / "adapter-float32"),
        rule="tv", out=tmp_path / "out", progress=False,
    )  # fmt: skip
    assert report.tensors


@pytest.mark.parametrize("where", ["shared", "lm_head"])
@pytest.mark.parametrize("how", ["LoRA", "DoRA", "whole"])
def test_a_matrix_that_encoder_and_decoder_share_is_not_adapted(where: str, how: str, tmp_path: Path) -> None:
    chosen = {"modules_to_save": [where]} if how == "whole" else {"use_dora": how == "DoRA"}
    modules = ["q", "v", *([] if how == "whole" else [where])]
    write_adapter(tmp_path, t5, LoraConfig(target_modules=modules, **chosen), loads=AutoModelForSeq2SeqLM)
    with pytest.raises(InputError, match=rf"adapts {where}\.weight, a matrix that encoder and decoder share"):
        apply(tmp_path / "model", tmp_path / "base", tmp_path / "adapter", rule="tv", out=tmp_path / "out")


def test_other_matrices_of_an_encoder_decoder_are_adapted(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, t5, LoraConfig(target_modules=["q", "wo"]), loads=AutoModelForSeq2SeqLM)
    tuned = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base"), adapter)
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    apply(tmp_path / "base", tmp_path / "base", adapter, rule="tv", lam=-1.0, out=tmp_path / "out", progress=False)
    expected, found = read_checkpoint(tmp_path / "merged"), read_checkpoint(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
