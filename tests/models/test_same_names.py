"""Checkpoints, adapters, importances and modules whose names differ, but not for transformers: the same bits."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from perta_fast import InputError, apply, apply_to_module_, estimate_importance, sweep, unlearn, verify
from perta_fast.importance.store import Importance
from perta_fast.models.stored_names import as_stored
from tests.families.matrix import write
from tests.families.test_multimodal import BY_FAMILY, of_vision
from tests.families.test_multimodal import build as multimodal
from tests.support.checkpoints import read_checkpoint, same_bytes
from tests.support.models import FORGET, RETAIN, draw_samples, nudge_, tokenizer, write_lines

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=16, n_layer=2, n_head=2))


def opt() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "max_position_embeddings": 64}
    return OPTForCausalLM(OPTConfig(vocab_size=300, num_hidden_layers=2, num_attention_heads=2, **sizes))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {"gpt2": gpt2, "bloom": bloom, "opt": opt}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Callable[[], PreTrainedModel]:
    return FAMILIES[request.param]


def seeded(build: Callable[[], PreTrainedModel], seed: int | None) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build()
    if seed is not None:
        nudge_(model, seed)
    return model


def written(folder: Path, build: Callable[[], PreTrainedModel]) -> list[Path]:
    """model, base and tuned, with the names of transformers."""
    for name, seed in (("model", 1), ("base", None), ("tuned", 2)):
        seeded(build, seed).save_pretrained(folder / name, max_shard_size="20KB")
        tokenizer().save_pretrained(folder / name)
    return [folder / "model", folder / "base", folder / "tuned"]


def as_on_the_hub(checkpoint: Path) -> Path:
    """A copy whose names lack the prefix of the base model."""
    copy = checkpoint.with_name(f"{checkpoint.name}-hub")
    shutil.copytree(checkpoint, copy)
    for shard in copy.glob("*.safetensors"):
        save_file({plain(name): tensor for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    for path in copy.glob("*.index.json"):
        index = json.loads(path.read_bytes())
        index["weight_map"] = {plain(name): shard for name, shard in index["weight_map"].items()}
        path.write_text(json.dumps(index))
    return copy


def plain(name: str) -> str:
    return name.removeprefix("transformer.").removeprefix("model.")


def applied_as_on_the_hub(
    inputs: Sequence[Path], which: tuple[int, ...], tmp_path: Path
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What is expected, and what a run makes if those of ``which`` have names without the prefix."""
    apply(*inputs, rule="tv", lam=0.7, out=tmp_path / "expected", progress=False)
    mixed = [as_on_the_hub(path) if k in which else path for k, path in enumerate(inputs)]
    apply(*mixed, rule="tv", lam=0.7, out=tmp_path / "out", progress=False)
    rename = plain if 0 in which else str
    expected = {rename(name): tensor for name, tensor in read_checkpoint(tmp_path / "expected").items()}
    return expected, read_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_checkpoints_without_the_prefix(
    which: tuple[int, ...], family: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    inputs = written(tmp_path, family)
    expected, got = applied_as_on_the_hub(inputs, which, tmp_path)
    assert got.keys() == expected.keys()
    assert all(same_bytes(got[name], tensor) for name, tensor in expected.items())
    assert not verify(tmp_path / "out").problems
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_importances_and_unlearning(stream: bool, family: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    inputs = written(tmp_path, family)
    data = [write_lines(tmp_path / "f.jsonl", FORGET), write_lines(tmp_path / "r.jsonl", RETAIN)]
    how: dict[str, Any] = {"rule": "fisher", "lam": 1.0, "stream": stream, "check": False, "progress": False}
    unlearn(*inputs, *data, out=tmp_path / "expected", **how)
    hub = [as_on_the_hub(path) for path in inputs]
    unlearn(hub[0], inputs[1], hub[2], *data, out=tmp_path / "out-0", **how)
    unlearn(inputs[0], hub[1], inputs[2], *data, out=tmp_path / "out-1", **how)
    paths = [tmp_path / "forget", tmp_path / "retain"]
    for path, rows in zip(paths, data, strict=True):
        estimate_importance(inputs[1], rows, "grad", out=path, stream=stream, progress=False)
    apply(hub[0], hub[1], inputs[2], *paths, rule="fisher", lam=1.0, out=tmp_path / "out-2", progress=False)
    estimate_importance(hub[1], data[0], "grad", out=tmp_path / "hub", stream=stream, progress=False)
    expected = read_checkpoint(tmp_path / "hub")
    assert all(same_bytes(read_checkpoint(paths[0])[name], tensor) for name, tensor in expected.items())
    expected = read_checkpoint(tmp_path / "expected")
    for number, rename in enumerate((plain, str, plain)):
        got = read_checkpoint(tmp_path / f"out-{number}")
        assert all(same_bytes(got[rename(name)], tensor) for name, tensor in expected.items())


def test_a_live_module(family: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    _, base, tuned = written(tmp_path, family)
    samples = draw_samples(4)
    modules = [seeded(family, 1), seeded(family, 1)]
    importance = estimate_importance(modules[0], samples, "grad", progress=False)
    for module, names in zip(modules, (str, as_on_the_hub), strict=True):
        pair = Path(names(base)), Path(names(tuned))  # type: ignore[arg-type]
        apply_to_module_(module, *pair, importance, importance, rule="fisher", lam=0.5)
    pairs = zip(*(module.parameters() for module in modules), strict=True)
    assert all(same_bytes(first.detach(), second.detach()) for first, second in pairs)
    assert not all(map(torch.equal, modules[0].parameters(), seeded(family, 1).parameters()))


def test_an_importance_with_the_names_of_the_hub(tmp_path: Path) -> None:
    inputs = written(tmp_path, gpt2)
    rows = write_lines(tmp_path / "f.jsonl", FORGET)
    found = estimate_importance(inputs[1], rows, "grad", out=tmp_path / "importance", progress=False)
    other = Importance({plain(name): tensor for name, tensor in found.tensors.items()}, found.metadata)
    other.save(tmp_path / "hub")
    for number, path in enumerate((tmp_path / "importance", tmp_path / "hub")):
        apply(*inputs, path, path, rule="fisher", lam=1.0, out=tmp_path / f"out-{number}", progress=False)
    expected, got = (read_checkpoint(tmp_path / f"out-{number}") for number in range(2))
    assert all(same_bytes(got[name], tensor) for name, tensor in expected.items())


def test_two_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    inputs = written(tmp_path, gpt2)
    hub = as_on_the_hub(inputs[0])
    path = next(file for file in inputs[1].glob("*.safetensors") if "transformer.ln_f.bias" in load_file(file))
    tensors = load_file(path)
    save_file(tensors | {"ln_f.bias": tensors["transformer.ln_f.bias"].clone()}, path, {"format": "pt"})
    for index in inputs[1].glob("*.index.json"):
        content = json.loads(index.read_bytes())
        content["weight_map"]["ln_f.bias"] = path.name
        index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="to one place; remove"):
        apply(hub, inputs[1], inputs[2], rule="tv", lam=1, out=tmp_path / "out", progress=False)


def test_adapters(family: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    inputs = written(tmp_path, family)
    targets = {"gpt2": ["c_attn"], "bloom": ["query_key_value"], "opt": ["q_proj"]}
    base = seeded(family, None)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=targets[base.config.model_type]))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    for number, names in enumerate((str, as_on_the_hub)):
        pair = Path(names(inputs[0])), Path(names(inputs[1]))  # type: ignore[arg-type]
        apply(*pair, tmp_path / "adapter", rule="tv", lam=0.7, out=tmp_path / f"out-{number}", progress=False)
    expected, got = (read_checkpoint(tmp_path / f"out-{number}") for number in range(2))
    assert all(same_bytes(got[plain(name)], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_equal_names_need_no_torch(tmp_path: Path) -> None:
    inputs = [as_on_the_hub(path) for path in written(tmp_path, gpt2)]
    program = (
        "import sys; from perta_fast.cli import main; "
        f"code = main(['apply', '--model', {str(inputs[0])!r}, '--base', {str(inputs[1])!r}, '--tuned', "
        f"{str(inputs[2])!r}, '--rule', 'tv', '--lam', '1', '--out', {str(tmp_path / 'out')!r}]); "
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip().endswith("0 False"), done.stderr


MULTIMODAL = list(BY_FAMILY)


def in_memory(checkpoint: Path, model: PreTrainedModel) -> Path:
    """A copy with the names that the model has in memory, as some trainers save it."""
    copy = checkpoint.with_name(f"{checkpoint.name}-memory")
    copy.mkdir()
    shutil.copy(checkpoint / "config.json", copy)
    state = {name: tensor.clone() for name, tensor in model.named_parameters()}
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_names_in_memory_and_stored_names(kind: str, tmp_path: Path) -> None:
    models = [multimodal(kind, seed) for seed in (1, 2, 3)]
    inputs = [write(model, tmp_path / str(number)) for number, model in enumerate(models)]
    apply(*inputs, rule="tv", lam=0.7, out=tmp_path / "expected", progress=False)
    memory = [in_memory(path, model) for path, model in zip(inputs, models, strict=True)]
    expected = read_checkpoint(tmp_path / "expected")
    for number in (1, 2):
        mixed = [memory[k] if k == number else path for k, path in enumerate(inputs)]
        out = tmp_path / f"out-{number}"
        apply(*mixed, rule="tv", lam=0.7, out=out, progress=False)
        got = read_checkpoint(out)
        assert got.keys() == expected.keys()
        assert all(same_bytes(got[name], tensor) for name, tensor in expected.items())
    apply_to_module_(models[0], memory[1], memory[2], rule="tv", lam=0.7)
    changed = as_stored(models[0], dict(models[0].named_parameters()))
    assert all(same_bytes(tensor.detach(), expected[name]) for name, tensor in changed.items())


@pytest.mark.parametrize("targets", [r".*language_model.*\.q_proj", r".*\.(q_proj|qkv|fc1)"], ids=["text", "all"])
@pytest.mark.parametrize("kind", MULTIMODAL)
def test_adapters_of_multimodal_models(kind: str, targets: str, tmp_path: Path) -> None:
    """As the same adapter with the stored names, which are matched without transformers."""
    theta, base = (write(multimodal(kind, seed), tmp_path / str(seed)) for seed in (1, 2))
    model = multimodal(kind, 2)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    shutil.copytree(tmp_path / "adapter", tmp_path / "stored")
    file, plain_model, tensors = tmp_path / "stored" / "adapter_model.safetensors", multimodal(kind, 2), {}
    for key, tensor in load_file(file).items():
        module, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
        weight = plain_model.get_parameter(f"{module}.weight")
        (stored,) = as_stored(plain_model, {f"{module}.weight": weight})
        tensors[f"base_model.model.{stored.removesuffix('.weight')}.lora_{rest}"] = tensor
    save_file(tensors, file, {"format": "pt"})
    for name in ("adapter", "stored"):
        apply(theta, base, tmp_path / name, rule="tv", lam=0.7, out=tmp_path / f"out-{name}", progress=False)
    before, expected, got = map(read_checkpoint, (theta, tmp_path / "out-stored", tmp_path / "out-adapter"))
    assert sum(not same_bytes(before[name], tensor) for name, tensor in expected.items()) == len(tensors) // 2
    assert all(same_bytes(got[name], tensor) for name, tensor in expected.items())
    live = multimodal(kind, 1)
    apply_to_module_(live, base, tmp_path / "adapter", rule="tv", lam=0.7)
    changed = as_stored(live, dict(live.named_parameters()))
    assert all(same_bytes(tensor.detach(), expected[name]) for name, tensor in changed.items())


def test_a_head_that_has_another_name_in_memory(tmp_path: Path) -> None:
    """GPT-NeoX's: it is not taken for the input embedding."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    paths = written(tmp_path, lambda: GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=300, **sizes)))
    apply(*paths, rule="tv", out=tmp_path / "expected", progress=False)
    tensors = read_checkpoint(paths[2])
    assert "embed_out.weight" in tensors
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    shutil.copytree(paths[2], tmp_path / "in memory", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, tmp_path / "in memory" / "model.safetensors", {"format": "pt"})
    apply(*paths[:2], tmp_path / "in memory", rule="tv", out=tmp_path / "out", progress=False)
    found, expected = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(same_bytes(found[name], expected[name]) for name in found)


def whole_places(name: str) -> str:
    """A name without what stands before it in a multimodal model."""
    for beginning in ("model.language_model.", "language_model.model.", "language_model.", "model."):
        name = name.removeprefix(beginning)
    return name


def language_part(checkpoint: Path, config: Any) -> Path:
    """A copy of the language part alone, a model of text."""
    copy = checkpoint.with_name(f"{checkpoint.name}-text")
    tensors = {name: tensor for name, tensor in read_checkpoint(checkpoint).items() if not of_vision(name)}
    head = {name: tensor for name, tensor in tensors.items() if name.endswith("lm_head.weight")}
    rest = {f"model.{whole_places(name)}": tensor for name, tensor in tensors.items() if name not in head}
    config.architectures = [f"{config.model_type} as text"]
    config.save_pretrained(copy)
    save_file(rest | dict.fromkeys(head and ["lm_head.weight"], *head.values()), copy / "model.safetensors")
    return copy


@pytest.mark.parametrize("text", [(2,), (1, 2), (0,), (0, 2)], ids=str)
@pytest.mark.parametrize("kind", ["Gemma 3", "LLaVA"])
def test_a_multimodal_model_and_its_language_part(kind: str, text: tuple[int, ...], tmp_path: Path) -> None:
    models = [multimodal(kind, seed) for seed in (1, 2, 3)]
    inputs = [write(model, tmp_path / str(number)) for number, model in enumerate(models)]
    apply(*inputs, rule="tv", lam=0.7, out=tmp_path / "expected", progress=False)
    config = models[0].config.get_text_config()
    mixed = [language_part(path, config) if k in text else path for k, path in enumerate(inputs)]
    apply(*mixed, rule="tv", lam=0.7, out=tmp_path / "out", progress=False)
    got, before = read_checkpoint(tmp_path / "out"), read_checkpoint(mixed[0])
    assert got.keys() == before.keys()
    changed = {whole_places(name): tensor for name, tensor in read_checkpoint(tmp_path / "expected").items()}
    for name, tensor in got.items():
        assert same_bytes(tensor, before[name] if of_vision(name) else changed[whole_places(name)]), name
    if 0 not in text:
        apply_to_module_(models[0], *mixed[1:], rule="tv", lam=0.7)
        live = as_stored(models[0], dict(models[0].named_parameters()))
        assert all(same_bytes(tensor.detach(), got[name]) for name, tensor in live.items())


def bart() -> PreTrainedModel:
    sizes = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 16, "max_position_embeddings": 64}
    return BartForConditionalGeneration(BartConfig(vocab_size=300, **sizes, **layers))


@pytest.mark.parametrize("which", [(0,), (2,), (1, 2)], ids=str)
def test_an_encoder_belongs_to_the_model(which: tuple[int, ...], tmp_path: Path) -> None:
    """Transformers has a class for text with the decoder of BART alone."""
    inputs = written(tmp_path, bart)
    expected, got = applied_as_on_the_hub(inputs, which, tmp_path)
    assert all(same_bytes(got[name], tensor) for name, tensor in expected.items())
    config = BartConfig.from_pretrained(inputs[2])
    config.encoder_layers = 1
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "shallow")
    with pytest.raises(InputError, match=r"lacks tensors model\.encoder\.layers\.1\."):
        apply(inputs[0], inputs[1], tmp_path / "shallow", rule="tv", out=tmp_path / "none", progress=False)
    with pytest.raises(InputError, match="has an encoder and a decoder"):
        estimate_importance(inputs[0], draw_samples(2), "grad", progress=False)


@pytest.mark.parametrize("kind", ["Gemma 3", "LLaVA"])
@pytest.mark.parametrize(("text", "stream"), [((1, 2), False), ((1, 2), True), ((0,), False), ((0,), True)], ids=str)
def test_importances_at_a_language_part(kind: str, text: tuple[int, ...], stream: bool, tmp_path: Path) -> None:
    """An importance has the names of the checkpoint that it was taken at."""
    models = [multimodal(kind, seed) for seed in (1, 2, 3)]
    inputs = [write(model, tmp_path / str(number)) for number, model in enumerate(models)]
    config = models[0].config.get_text_config()
    mixed = [language_part(path, config) if k in text else path for k, path in enumerate(inputs)]
    for k in text:
        tokenizer().save_pretrained(mixed[k])
    data = [write_lines(tmp_path / "f.jsonl", FORGET[:3]), write_lines(tmp_path / "r.jsonl", RETAIN[:3])]
    for out, three in ((tmp_path / "expected", inputs), (tmp_path / "out", mixed)):
        unlearn(*three, *data, rule="fisher", lam=0.7, out=out, stream=stream, progress=False)
    got, before = read_checkpoint(tmp_path / "out"), read_checkpoint(mixed[0])
    changed = {whole_places(name): tensor for name, tensor in read_checkpoint(tmp_path / "expected").items()}
    assert got.keys() == before.keys()
    assert all(same_bytes(tensor, changed[whole_places(name)]) for name, tensor in got.items())
    assert not all(same_bytes(tensor, before[name]) for name, tensor in got.items())


@pytest.mark.parametrize("kind", ["Gemma 3", "LLaVA"])
def test_a_live_module_with_importances_at_a_language_part(kind: str, tmp_path: Path) -> None:
    """In memory and from files; a sweep does the same."""
    models = [multimodal(kind, seed) for seed in (1, 2, 3)]
    inputs = [write(model, tmp_path / str(number)) for number, model in enumerate(models)]
    text = [language_part(path, models[0].config.get_text_config()) for path in inputs]
    tokenizer().save_pretrained(text[1])
    data = [write_lines(tmp_path / "f.jsonl", FORGET[:3]), write_lines(tmp_path / "r.jsonl", RETAIN[:3])]
    paths = [tmp_path / "forget", tmp_path / "retain"]
    saved = [estimate_importance(text[1], *pair, progress=False) for pair in zip(data, ["grad"] * 2, strict=True)]
    for importance, path in zip(saved, paths, strict=True):
        importance.save(path)
    apply(inputs[0], *text[1:], *paths, rule="fisher", lam=0.7, out=tmp_path / "expected", progress=False)
    expected = read_checkpoint(tmp_path / "expected")
    for importances in (saved, paths):
        module = multimodal(kind, 1)
        apply_to_module_(module, *text[1:], *importances, rule="fisher", lam=0.7)
        changed = as_stored(module, dict(module.named_parameters()))
        assert all(same_bytes(tensor.detach(), expected[name]) for name, tensor in changed.items())
    scored = sweep(inputs[0], *text[1:], *data, *paths, rule="fisher", lams=[0.7], progress=False)
    assert len(scored.rows) == 2


def test_a_model_that_is_not_for_text_is_refused_in_a_line(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_audio"}))
    for stream in (False, True):
        with pytest.raises(InputError, match=r"Unrecognized configuration class .* AutoModelForCausalLM\.$"):
            estimate_importance(tmp_path, draw_samples(2), "grad", out=tmp_path / "out", stream=stream, progress=False)
