"""Quantised checkpoints: recognised by every layout, refused by every command, undone by the command shown."""

import inspect
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from perta_fast import InputError, apply, apply_to_module_, cli, estimate_importance
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.quantised import open_plain
from perta_fast.models.loading import load_subject
from perta_fast.runs.inspect import inspect as found_in
from tests.support.checkpoints import draw, fingerprint, read_checkpoint, same_bytes, write_checkpoint
from tests.support.inputs import BF16, F32, write_inputs
from tests.support.models import Job, llama, tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

F8 = torch.float8_e4m3fn
UP = "model.layers.0.mlp.up_proj"
# What each library stores for one matrix, by its documentation and as transformers reads it.
LAYOUTS: dict[str, dict[str, Tensor]] = {
    "fp8": {"weight": torch.zeros(8, 8, dtype=F8), "weight_scale_inv": torch.ones(1, 1)},
    "compressed-tensors": {
        "weight_packed": torch.zeros(8, 1, dtype=torch.int32),
        "weight_scale": torch.ones(8, 1),
        "weight_shape": torch.tensor([8, 8]),
    },
    "bitsandbytes": {"weight": torch.zeros(8, 8, dtype=torch.int8), "SCB": torch.ones(8)},
    "bitsandbytes nf4": {
        "weight": torch.zeros(32, 1, dtype=torch.uint8),
        "weight.absmax": torch.ones(1),
        "weight.quant_map": torch.ones(16),
        "weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    },
    "gptq": {
        "qweight": torch.zeros(1, 8, dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8),
        "g_idx": torch.zeros(8, dtype=torch.int32),
    },
    "gptq or awq": {
        "qweight": torch.zeros(8, 1, dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8),
    },
    "hqq": {"W_q": torch.zeros(4, 8, dtype=torch.uint8), "scale": torch.ones(8, 1), "zero": torch.ones(8, 1)},
    "float8 with scales": {"weight": torch.zeros(8, 8, dtype=F8), "weight_scale": torch.ones(())},
    "float8 without scales": {"weight": torch.zeros(8, 8, dtype=torch.float8_e5m2)},
}
OTHER_NAMES = {
    "mxfp4": {
        "model.layers.0.mlp.experts.down_proj_blocks": torch.zeros(2, 8, 1, 16, dtype=torch.uint8),
        "model.layers.0.mlp.experts.down_proj_scales": torch.zeros(2, 8, 1, dtype=torch.uint8),
    },
    "torchao": {
        "model.layers.0.mlp.up_proj._weight_qdata": torch.zeros(8, 8, dtype=torch.int8),
        "model.layers.0.mlp.up_proj._weight_scale": torch.ones(8, 1),
    },
}
CASES = [
    (name.split(" nf4")[0], {f"{UP}.{part}": each for part, each in kept.items()}) for name, kept in LAYOUTS.items()
]


@pytest.mark.parametrize(("method", "tensors"), [*CASES, *OTHER_NAMES.items()])
def test_tensors_alone_show_the_method(method: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", {"model.norm.weight": draw((8,))} | tensors)
    Checkpoint.open(folder)
    with pytest.raises(InputError, match=rf"model: is quantised \({method}: tensor model\.layers\.0\.\S+ \(") as caught:
        open_plain(folder)
    named = str(caught.value).split(": tensor ")[1].split()[0]
    assert named in tensors
    assert f"in {folder / 'model.safetensors'})" in str(caught.value)


def configure(folder: Path, **entries: object) -> Path:
    (folder / "config.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize("nested", [False, True])
def test_the_configuration_alone_is_enough(nested: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", {UP: draw((8, 8))})
    settings = {"quantization_config": {"quant_method": "aqlm"}}
    configure(folder, **({"text_config": settings} if nested else settings))
    words = r"is quantised \(aqlm: quantization_config in .*model/config\.json\)\. If these tensors are plain"
    with pytest.raises(InputError, match=words):
        open_plain(folder)


def test_the_configuration_decides_between_methods_that_look_alike(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", dict(CASES)["gptq or awq"])
    configure(folder, quantization_config={"quant_method": "awq"})
    with pytest.raises(InputError, match=r"is quantised \(awq: quantization_config .* and tensor .*qweight"):
        open_plain(folder)


@pytest.mark.parametrize("content", ['{"quantization_config": null}', '{"quantization_config": {}}', "{}"])
def test_plain_weights_pass(content: str, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, shards=2)  # with a counter, and a float tensor called scale
    (inputs["model"] / "config.json").write_text(content)
    assert open_plain(inputs["model"]).tensors.keys() == inputs.tensors["model"].keys()


def test_inspect_shows_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", dict(CASES)["gptq"])
    assert "\n  quantised: gptq (tensor " in found_in(folder).text()
    assert "quantised" not in found_in(write_checkpoint(tmp_path / "plain", {UP: draw((8, 8))})).text()


def like_transformers(source: Path, target: Path, tensors: dict[str, Tensor], **entries: object) -> Path:
    """A checkpoint of other tensors with the configuration of ``source``, with ``entries`` added."""
    write_checkpoint(target, tensors)
    tokenizer().save_pretrained(target)
    return configure(target, **json.loads((source / "config.json").read_text()), **entries)


def quantised_copy(source: Path, target: Path) -> Path:
    """A checkpoint of transformers with block-scaled float8 matrices, and its tokenizer."""
    blocks = 8
    tensors = {}
    for name, tensor in read_checkpoint(source).items():
        if "_proj" not in name:
            tensors[name] = tensor
            continue
        rows, columns = (size // blocks for size in tensor.shape)
        tiles = tensor.float().reshape(rows, blocks, columns, blocks)
        scales = tiles.abs().amax((1, 3)) / torch.finfo(F8).max
        tensors[name] = (tiles / scales[:, None, :, None]).reshape(tensor.shape).to(F8)
        tensors[f"{name}_scale_inv"] = scales
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [blocks, blocks]}
    return like_transformers(source, target, tensors, quantization_config=settings)


def dequantised(folder: Path) -> dict[str, Tensor]:
    """What ``quantised_copy`` stands for: each float8 value times its block's scale, rounded once."""
    stored = read_checkpoint(folder)
    result = {}
    for name, tensor in stored.items():
        if f"{name}_scale_inv" in stored:
            scales = stored[f"{name}_scale_inv"].repeat_interleave(8, 0).repeat_interleave(8, 1)
            result[name] = (tensor.float() * scales).to(BF16)
        elif not name.endswith("_scale_inv"):
            result[name] = tensor
    return result


@pytest.fixture(scope="module")
def float8(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised_copy(job.base, tmp_path_factory.mktemp("float8") / "it's $quantised")


def paths(job: Job, **changes: Path) -> list[str]:
    chosen = {"model": job.model, "base": job.base, "tuned": job.tuned} | changes
    return [word for name, path in chosen.items() for word in (f"--{name}", str(path))]


def data(job: Job) -> list[str]:
    return ["--forget", str(job.forget), "--retain", str(job.retain)]


COMMANDS: dict[str, Callable[[Job, Path], list[str]]] = {
    "apply, model": lambda job, bad: ["apply", *paths(job, model=bad), "--rule", "tv", "--lam", "1"],
    "apply, tuned": lambda job, bad: ["apply", *paths(job, tuned=bad), "--rule", "tv", "--lam", "1"],
    "unlearn": lambda job, bad: ["unlearn", "--rule=fisher", *paths(job, base=bad), *data(job), "--lam", "1"],
    "unlearn, streamed": lambda job, bad: [
        "unlearn",
        "--rule=fisher",
        *paths(job, model=bad),
        *data(job),
        "--lam",
        "1",
        "--stream",
    ],
    "dry run": lambda job, bad: [*COMMANDS["unlearn"](job, bad), "--stream", "--dry-run"],
    "sweep": lambda job, bad: ["sweep", *paths(job, base=bad), *data(job), "--lams", "1"],
    "importance": lambda job, bad: ["importance", "--model", str(bad), "--data", str(job.forget)],
    "importance, streamed": lambda job, bad: [*COMMANDS["importance"](job, bad), "--stream"],
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_every_command_that_computes_refuses_it(
    arguments: Callable[[Job, Path], list[str]],
    job: Job,
    float8: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = fingerprint(float8, job.model)
    assert cli.main([*arguments(job, float8), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"perta: error: {float8}: is quantised (fp8: " in error
    assert command_in(error, float8)
    assert fingerprint(float8, job.model) == before
    assert list(tmp_path.iterdir()) == []


def test_live_models_refuse_it(job: Job, float8: Path) -> None:
    module = llama()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(InputError, match=r"is quantised \(fp8"):
        apply_to_module_(module, float8, job.tuned, rule="tv")
    module.is_quantized, module.quantization_method = True, "bitsandbytes"
    with pytest.raises(InputError, match=r"the module is quantised \(bitsandbytes\)"):
        apply_to_module_(module, job.base, job.tuned, rule="tv")
    with pytest.raises(InputError, match=r"the module is quantised \(bitsandbytes\)"):
        estimate_importance(module, job.forget, tokenizer=tokenizer())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_evaluation_takes_what_transformers_can_load(float8: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers loads float8 with accelerate")
    loaded = load_subject(float8, "cpu", None).module.state_dict()
    for name, tensor in dequantised(float8).items():
        assert same_bytes(loaded[name], tensor)


def command_in(message: str, folder: Path) -> str:
    """The Python program that a message shows for the checkpoint in ``folder``."""
    words = shlex.split(message[message.index("python -c ") :])
    assert words[:2] == ["python", "-c"] and len(words) == 3
    assert repr(str(folder)) in words[2]
    return words[2]


def run_advice(folder: Path, refuse: Callable[[], object] | None = None) -> dict[str, Tensor]:
    """Run the program that the refusal of ``folder`` shows; the tensors it makes, which are then accepted."""
    with pytest.raises(InputError) as caught:
        refuse() if refuse else open_plain(folder)
    before = fingerprint(folder)
    exec(command_in(str(caught.value), folder), {})
    assert fingerprint(folder) == before
    made = Path(f"{folder}-safetensors")
    open_plain(made)
    assert (made / "tokenizer.json").exists()
    return read_checkpoint(made)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bytes(found[name], tensor), name


def test_the_command_for_block_scaled_float8(float8: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers loads float8 with accelerate")
    assert_same(run_advice(float8), dequantised(float8))


def test_the_command_for_mxfp4(tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"],
        dtype=BF16,
    )
    GptOssForCausalLM(config).to(BF16).save_pretrained(tmp_path / "plain")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    tensors, expected = {}, {}
    for name, tensor in read_checkpoint(tmp_path / "plain").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = expected[name] = tensor
            continue
        # Rows of the transposed matrix in blocks of 32: 16 bytes of two values, low half first, and 2^(e-127).
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32)
        pairs = torch.randint(256, (*shape, 16), dtype=torch.uint8)
        exponents = torch.randint(118, 128, shape, dtype=torch.uint8)
        numbers = torch.stack([values[(pairs & 15).long()], values[(pairs >> 4).long()]], -1).flatten(-2)
        numbers = numbers * 2.0 ** (exponents.float() - 127)[..., None]
        expected[name] = numbers.flatten(-2).transpose(1, 2).to(BF16).contiguous()
        tensors |= {f"{name}_blocks": pairs, f"{name}_scales": exponents}
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    folder = like_transformers(tmp_path / "plain", tmp_path / "model", tensors, quantization_config=settings)
    assert_same(run_advice(folder), expected)
    # Evaluation takes it too, although the tensors have other names in the file.
    assert_same(dict(load_subject(folder, "cpu", None).module.state_dict()), expected)


def test_the_command_for_float8_without_scales_is_exact(job: Job, tmp_path: Path) -> None:
    narrow = {name: tensor.to(F8) if "_proj" in name else tensor for name, tensor in read_checkpoint(job.base).items()}
    folder = like_transformers(job.base, tmp_path / "model", narrow)
    assert_same(run_advice(folder), {name: tensor.to(F32) for name, tensor in narrow.items()})


def ways_of_transformers() -> dict[str, str]:
    """How transformers undoes each method that it can, from its own classes."""
    ways = {}
    for name, settings in AUTO_QUANTIZATION_CONFIG_MAPPING.items():
        method = name.removesuffix("_4bit").removesuffix("_8bit")
        if "dequantize" in inspect.signature(settings).parameters:
            ways[method] = f"quantization_config=t.{settings.__name__}(dequantize=True)).save_pretrained("
            assert getattr(transformers, settings.__name__) is settings
        elif AUTO_QUANTIZER_MAPPING[name]._dequantize is not HfQuantizer._dequantize:
            ways[method] = ").dequantize().save_pretrained("
    return ways


def test_exactly_what_transformers_can_undo_has_a_command(tmp_path: Path) -> None:
    """The others' commands are run above; these need packages or devices that few have."""
    folder = write_checkpoint(tmp_path / "model", {UP: draw((8, 8))})
    shown = {}
    for name in AUTO_QUANTIZATION_CONFIG_MAPPING.keys() - {"gguf"}:
        method = name.removesuffix("_4bit").removesuffix("_8bit")
        configure(folder, quantization_config={"quant_method": method})
        with pytest.raises(InputError, match=rf"is quantised \({method}: ") as caught:
            open_plain(folder)
        message = str(caught.value)
        if "transformers cannot undo that; give the checkpoint from before it was quantised" not in message:
            shown[method] = command_in(message, folder)
            compile(shown[method], "shown", "exec")
    ways = ways_of_transformers()
    assert shown.keys() == ways.keys() - {"gguf"}
    assert {method for method, program in shown.items() if ways[method] not in program} == set()


def test_other_weights_alone_get_a_word(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"holds model-Q4_K_M\.gguf, .* give the checkpoint that it was made from"):
        Checkpoint.open(tmp_path)


def test_float64_is_saved_as_float32_by_the_command(job: Job, tmp_path: Path) -> None:
    wide = {name: tensor.double() / 3 for name, tensor in read_checkpoint(job.base).items()}
    folder = like_transformers(job.base, tmp_path / "model", wide)
    found = run_advice(folder, lambda: apply(job.model, folder, job.tuned, rule="tv", out=tmp_path / "out"))
    assert_same(found, {name: tensor.to(F32) for name, tensor in wide.items()})
