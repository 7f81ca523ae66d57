"""Task vectors from LoRA adapters, made by peft, against applying the checkpoints that peft merges."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from perta_fast import ImportanceRatio, InputError, RunError, apply, apply_to_module_, unlearn, verify
from perta_fast.checkpoints.adapters import Adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.runs.inspect import inspect
from perta_fast.subtraction import compute as subtraction_module
from perta_fast.subtraction.adapter_changes import OpenedAdapter
from perta_fast.subtraction.job import match_names
from perta_fast.subtraction.matching import match_tensors
from tests.support.checkpoints import draw, read_checkpoint, same_bytes, write_checkpoint, write_importance
from tests.support.models import FORGET, RETAIN, llama, nudge_, tokenizer, write_lines

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # peft's own, of layers it corrects the config for
]

QUERY = "model.layers.0.self_attn.q_proj.weight"


def gpt2() -> GPT2LMHeadModel:
    """Its matrices are kept transposed, a square one among them."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2))


Build = Callable[[], PreTrainedModel]
MODELS: dict[str, Build] = {"llama": llama, "tied": lambda: llama(tie_word_embeddings=True), "gpt2": gpt2}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "every matrix": ("llama", {"target_modules": "all-linear", "r": 3, "lora_alpha": 5}),
    "rslora": ("llama", {"target_modules": "all-linear", "r": 5, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.up_proj": 1},
            "alpha_pattern": {"q_proj": 2, "o_proj": 11},
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head"]}),
    "whole tensors": ("llama", {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
}


def make_adapter(folder: Path, build: Build, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """Write base, model, an adapter with values in all of its tensors, and what peft merges it to."""
    base = build().to(dtype)
    base.save_pretrained(folder / "base")
    model = build()
    nudge_(model, 1)
    model.to(dtype).save_pretrained(folder / "model")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights="gaussian", **settings))
    for number, (name, parameter) in enumerate(adapted.named_parameters()):
        if parameter.requires_grad:
            parameter.data.add_(draw(tuple(parameter.shape), seed=number).to(parameter) * 0.05)
            assert name
    adapted.save_pretrained(folder / "adapter")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    merged.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "adapter"


def make_importances(folder: Path, build: Build) -> list[Path]:
    """Positive ones for every parameter that is stored."""
    shapes = {name: tuple(each.shape) for name, each in read_checkpoint(folder / "base").items()}
    return [
        write_importance(
            folder / role, {name: draw(shape, seed=seed + k).abs() for k, (name, shape) in enumerate(shapes.items())}
        )
        for role, seed in (("forget", 1000), ("retain", 2000))
    ]


def subtract(model: Path, base: Path, tuned: str | Path, out: Path) -> None:
    """The plain task vector, into a new directory."""
    apply(model, base, tuned, rule="tv", out=out, progress=False)


def rewrite_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(adapter: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("rule", ["tv", "grad"])
def test_as_the_merged_checkpoint(kind: str, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = ADAPTERS[kind]
    adapter = make_adapter(tmp_path, MODELS[model], settings)
    importances = [] if rule == "tv" else make_importances(tmp_path, MODELS[model])
    monkeypatch.setattr(subtraction_module, "CHUNK", 509)  # chunks begin and end within rows
    how: dict[str, Any] = {"rule": rule, "lam": 1.5, "progress": False}
    for tuned in ("adapter", "merged"):
        apply(
            tmp_path / "model", tmp_path / "base", tmp_path / tuned, *importances, out=tmp_path / f"out-{tuned}", **how
        )
    found, expected = read_checkpoint(tmp_path / "out-adapter"), read_checkpoint(tmp_path / "out-merged")
    before = read_checkpoint(tmp_path / "model")
    assert found.keys() == expected.keys()
    moved = 0
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-7, msg=name)
        moved += not torch.equal(found[name], before[name])
    assert moved >= len(Adapter.open(adapter).low_rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_one_rounding_of_the_exact_product(dtype: torch.dtype, tmp_path: Path) -> None:
    """In 16 bits the merged checkpoint has lost part of the task vector; an adapter's is not rounded at all."""
    make_adapter(tmp_path, llama, {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 2}, dtype)
    subtract(tmp_path / "model", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    product = factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double()
    theta = read_checkpoint(tmp_path / "model")[QUERY]
    expected = (theta.double() - product).to(dtype)
    found = read_checkpoint(tmp_path / "out")[QUERY]
    assert (found != expected).float().mean() < 0.01  # ties and their like
    torch.testing.assert_close(found, expected)


def test_what_the_adapter_leaves_alone_is_copied_and_the_base_is_not_read(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, llama, {"target_modules": ["q_proj"]})
    importances = make_importances(tmp_path, llama)
    how: dict[str, Any] = {"rule": "grad", "lam": 1.0, "progress": False}
    apply(tmp_path / "model", tmp_path / "base", adapter, *importances, out=tmp_path / "out", **how)
    for shard in (tmp_path / "base").glob("*.safetensors"):
        content = bytearray(shard.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        content[header:] = b"\xff" * (len(content) - header)  # NaN, wherever it would be read
        shard.write_bytes(content)
    report = apply(tmp_path / "model", tmp_path / "base", adapter, *importances, out=tmp_path / "again", **how)
    first, again, before = (read_checkpoint(tmp_path / name) for name in ("out", "again", "model"))
    assert all(same_bytes(first[name], again[name]) for name in first)
    assert all(same_bytes(first[name], before[name]) == ("q_proj" not in name) for name in first)
    assert report.counts == {"subtracted": 2, "copied: task vector is zero": len(first) - 2}
    assert report.inputs["base"]["files"] == {}
    assert set(report.inputs["tuned"]["files"]) == {"adapter_model.safetensors", "adapter_config.json"}
    model_bytes = sum(each.numel() * 4 for each in before.values())
    touched = 2 * before[QUERY].numel() * 4
    assert report.phases["apply"]["bytes"] == 2 * model_bytes + 2 * touched  # theta twice, the importances once
    checked = verify(tmp_path / "again", full=True, progress=False)
    assert not checked.problems and not checked.unchecked and checked.recomputed == len(first)


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_unlearn(stream: bool, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, llama, {"target_modules": "all-linear", "modules_to_save": ["lm_head"]})
    tokenizer().save_pretrained(tmp_path / "base")
    data = write_lines(tmp_path / "forget.jsonl", FORGET), write_lines(tmp_path / "retain.jsonl", RETAIN)
    for tuned in ("adapter", "merged"):
        unlearn(
            tmp_path / "model",
            tmp_path / "base",
            tmp_path / tuned,
            *data,
            lam=2.0,
            stream=stream,
            out=tmp_path / f"out-{tuned}",
            progress=False,
            rule="fisher",
        )
    found, expected = read_checkpoint(tmp_path / "out-adapter"), read_checkpoint(tmp_path / "out-merged")
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-7, msg=name)
    checked = verify(tmp_path / "out-adapter", full=True, progress=False)
    assert not checked.problems and checked.bounded
    assert verify(tmp_path / "out-adapter", full=True, progress=False).files > 5
    assert adapter.is_dir()


@pytest.mark.parametrize("kind", ["every matrix", "embedding", "whole tensors", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_live_module_as_the_files(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = ADAPTERS[kind]
    adapter = make_adapter(tmp_path, MODELS[model], settings, dtype)
    importances = make_importances(tmp_path, MODELS[model])
    how: dict[str, Any] = {"rule": "grad", "lam": 0.7}
    apply(tmp_path / "model", tmp_path / "base", adapter, *importances, out=tmp_path / "out", progress=False, **how)
    monkeypatch.setattr("perta_fast.subtraction.on_module.CHUNK", 1000)
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    apply_to_module_(module, tmp_path / "base", adapter, *importances, **how)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in module.state_dict().items():
        assert same_bytes(tensor, expected[name]), name


def test_by_a_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a directory, on a live module and by the reference alike."""
    adapter = make_adapter(tmp_path, llama, {"target_modules": "all-linear"}, torch.bfloat16)
    ImportanceRatio.of(*make_importances(tmp_path, llama)).save(tmp_path / "ratio")
    how: dict[str, Any] = {"importance": tmp_path / "ratio", "rule": "grad", "lam": 0.7}
    monkeypatch.setattr(subtraction_module, "CHUNK", 509)
    apply(tmp_path / "model", tmp_path / "base", adapter, out=tmp_path / "out", progress=False, **how)
    result = verify(tmp_path / "out", full=True, progress=False)
    assert not result.problems and not result.unchecked
    monkeypatch.setattr("perta_fast.subtraction.on_module.CHUNK", 1000)
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    apply_to_module_(module, tmp_path / "base", adapter, **how)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in module.state_dict().items():
        assert same_bytes(tensor, expected[name]), name


def test_in_place_as_to_a_directory(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, llama, {"target_modules": "all-linear"})
    how: dict[str, Any] = {"rule": "tv", "lam": 0.7, "progress": False}
    apply(tmp_path / "model", tmp_path / "base", adapter, out=tmp_path / "out", **how)
    apply(tmp_path / "model", tmp_path / "base", adapter, in_place=True, **how)
    found, expected = read_checkpoint(tmp_path / "model"), read_checkpoint(tmp_path / "out")
    assert all(same_bytes(found[name], expected[name]) for name in expected)


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job on the disk says all of the adapter that the rest needs."""
    from perta_fast import resume
    from perta_fast.checkpoints.adapters import LowRank

    make_adapter(tmp_path, llama, {"target_modules": "all-linear"})
    model = Checkpoint.open(tmp_path / "model")
    write_checkpoint(tmp_path / "shards", read_checkpoint(tmp_path / "model"), shards=3)
    arguments = tmp_path / "shards", tmp_path / "base", tmp_path / "adapter"
    how: dict[str, Any] = {"rule": "tv", "progress": False, "threads": 1}
    apply(*arguments, out=tmp_path / "whole", **how)
    factors, calls = LowRank.factors, []

    def failing(update: LowRank) -> Any:
        calls.append(update)
        if len(calls) == 12:
            raise RunError("no more")
        return factors(update)

    with monkeypatch.context() as patch, pytest.raises(RunError, match="no more"):
        patch.setattr(LowRank, "factors", failing)
        apply(*arguments, out=tmp_path / "out", **how)
    report = resume(tmp_path / "out", progress=False)
    assert report.resumed == 1
    found, expected = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "whole")
    assert all(same_bytes(found[name], expected[name]) for name in model.tensors)


def test_plans_name_their_factors(tmp_path: Path) -> None:
    path = make_adapter(tmp_path, gpt2, ADAPTERS["conv1d"][1])
    model, base = Checkpoint.open(tmp_path / "model"), Checkpoint.open(tmp_path / "base")
    adapter = OpenedAdapter.open(path, base)
    rows = {row["theta"]: row for row in match_names(match_tensors(model, base, adapter, None, None))}
    square = rows["transformer.h.0.attn.c_proj.weight"]
    assert square["a"] == "base_model.model.transformer.h.0.attn.c_proj.lora_A.weight"
    assert square["transposed"] is True and square["scale"] == 1.0


def test_names_without_their_beginning_are_found(tmp_path: Path) -> None:
    make_adapter(tmp_path, gpt2, ADAPTERS["conv1d"][1])
    subtract(tmp_path / "model", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    for name in ("model", "base"):  # as the hub's own GPT-2 is stored
        tensors = read_checkpoint(tmp_path / name)
        write_checkpoint(
            tmp_path / f"short-{name}", {key.removeprefix("transformer."): each for key, each in tensors.items()}
        )
    subtract(tmp_path / "short-model", tmp_path / "short-base", tmp_path / "adapter", tmp_path / "short")
    found, expected = read_checkpoint(tmp_path / "short"), read_checkpoint(tmp_path / "out")
    assert all(same_bytes(found[name.removeprefix("transformer.")], each) for name, each in expected.items())


def test_inspect(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, llama, {"target_modules": ["q_proj", "o_proj"], "r": 4, "lora_alpha": 2})
    text = inspect(adapter, every_tensor=True).text()
    assert "LoRA adapter" in text and "4 matrices of rank 4, scale 0.5" in text
    assert "q_proj.lora_A.weight  F32  [4, 32]" in text


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_adapter(folder, llama, {"target_modules": ["q_proj"]})
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "should have model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
        ({"peft_type": "IA3"}, "setting bias; peft .* does not know it"),
        ({"peft_type": "VERA"}, "of type VERA, not LORA; merge it"),
        ({"peft_type": "TOMORROW"}, "of type TOMORROW, not LORA; merge it"),
        ({"peft_type": None}, "of type None, not LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base model too"),
        ({"lora_bias": True, "init_lora_weights": True}, "should have model.layers.0.self_attn.q_proj.lora_B.bias"),
        ({"trainable_token_indices": [3]}, "has no tensors for trainable_token_indices"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "has no tensors for target_parameters"),
        ({"something_of_tomorrow": {"x": 1}}, "setting something_of_tomorrow is not understood"),
        ({"r": 9}, "rank 9, lora_alpha 8 for model.layers"),
        ({"lora_alpha": "much"}, "lora_alpha much"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf"),
        ({"lora_alpha": 10**400}, "lora_alpha 1000"),
        ({"rank_pattern": {"q_proj": 3}}, "rank 3, lora_alpha 8"),
        ({"alpha_pattern": {"(": 3}}, "is not a regular expression"),
        ({"alpha_pattern": [1]}, "is not the config of an adapter"),
        ({"peft_type": []}, "is not the config of an adapter"),
        ({"target_parameters": 5}, "is not the config of an adapter"),
        ({"trainable_token_indices": 5}, "has no tensors for trainable_token_indices"),
        ({"use_dora": {"a": []}}, "should have model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], message: str, plain: Path, tmp_path: Path) -> None:
    adapter = copy_of(plain / "adapter", tmp_path)
    rewrite_config(adapter, **changes)
    refused(plain, adapter, message, tmp_path)


STEM = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {name: each for name, each in t.items() if name != B}, "has no lora_B for model.layers.0"),
        (lambda t: t | {A: torch.ones(8, 31)}, r"shape \[32, 32\] in .*, but \[32, 31\]"),
        (lambda t: t | {A: torch.ones(7, 32)}, "which is no product of matrices"),
        (lambda t: t | {A: torch.ones(8, 32, dtype=torch.int8)}, "is I8; float32, bfloat16 or float16 is needed"),
        (lambda t: t | {f"{STEM}.lora_magnitude_vector": torch.ones(32)}, "is not of plain LoRA"),
        (
            lambda t: {name.replace("layers.0", "layers.9"): each for name, each in t.items()},
            r"adapts model.layers.9.self_attn.q_proj.weight, which is not in",
        ),
        (
            lambda t: t | {f"{STEM}.base_layer.weight": torch.ones(32, 32)},
            "holds a model.layers.0.self_attn.q_proj.weight that differs",
        ),
        (lambda t: t | {"base_model.model.model.norm.weight": torch.ones(5)}, r"model.norm.weight: shape \[32\]"),
    ],
)
def test_tensors_that_are_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, plain: Path, tmp_path: Path
) -> None:
    adapter = copy_of(plain / "adapter", tmp_path)
    rename(adapter, change)
    refused(plain, adapter, message, tmp_path)


def test_values_that_are_not_finite(plain: Path, tmp_path: Path) -> None:
    adapter = copy_of(plain / "adapter", tmp_path)
    rename(adapter, lambda tensors: tensors | {A: torch.full((8, 32), float("nan"))})
    with pytest.raises(RunError, match=r"layers\.0\.self_attn\.q_proj\.weight: the result would hold NaN"):
        subtract(plain / "model", plain / "base", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, MODELS["tied"], {"target_modules": ["lm_head"]})
    refused(tmp_path, adapter, "adapts lm_head.weight, which is tied to the input embedding", tmp_path)


def test_other_damage(plain: Path, tmp_path: Path) -> None:
    adapter = copy_of(plain / "adapter", tmp_path)
    (adapter / "adapter_config.json").write_text("{")
    refused(plain, adapter, "adapter_config.json: is not JSON", tmp_path)
    (adapter / "adapter_config.json").write_bytes((plain / "adapter" / "adapter_config.json").read_bytes())
    (adapter / "adapter_model.safetensors").unlink()
    refused(plain, adapter, "holds neither adapter_model.safetensors nor", tmp_path)
    with pytest.raises(InputError, match="holds a PEFT adapter, which only tuned can be"):
        subtract(plain / "adapter", plain / "base", plain / "adapter", tmp_path / "out")


def test_the_advice_to_merge_works(plain: Path, tmp_path: Path) -> None:
    """The program in the message, run here; what it writes is a checkpoint that is taken."""
    import shlex

    adapter = copy_of(plain / "adapter", tmp_path)
    rewrite_config(adapter, base_model_name_or_path=str(plain / "base"))
    config = (adapter / "adapter_config.json").read_text()
    rewrite_config(adapter, peft_type="VERA")
    with pytest.raises(InputError) as caught:
        Adapter.open(adapter)
    (adapter / "adapter_config.json").write_text(config)
    program = shlex.split(str(caught.value).split("merged checkpoint: ", 1)[1])
    assert program[:2] == ["python", "-c"]
    exec(program[2], {})
    subtract(plain / "model", plain / "base", f"{adapter}-merged", tmp_path / "out")


def copy_of(adapter: Path, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(adapter, folder / "adapter"))


def refused(folder: Path, adapter: Path, message: str, tmp_path: Path) -> None:
    """The error says why, and nothing is written."""
    with pytest.raises(InputError, match=message):
        subtract(folder / "model", folder / "base", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
