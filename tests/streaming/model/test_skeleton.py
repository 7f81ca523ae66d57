"""A skeleton's weights are those that ``from_pretrained`` gives, whichever part is read; faults are named."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from perta_fast import InputError, RunError, estimate_importance
from perta_fast.files import reading
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.model.structure import Structure
from tests.families.configs import FAMILIES, Family
from tests.families.matrix import build, write
from tests.support.models import draw_samples, llama, tokenizer

CPU = torch.device("cpu")
BY_NAME = {family.name: family for family in FAMILIES}


def part_names(structure: Structure) -> list[str]:
    return [name for part in structure.parts for name in part]


def written(family: Family, folder: Path) -> Path:
    """With buffers that no code of the model's own would give."""
    model = build(family, 3)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(0.25)
    return write(model, folder)


def names_and_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.shape) for name, each in model.named_parameters()}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in FAMILIES),
        *((BY_NAME[name], torch.bfloat16) for name in ("Llama", "Mixtral", "DeepSeek-V2", "GPT-OSS")),
    ],
    ids=lambda each: each.name if isinstance(each, Family) else str(each),
)
def test_reads_what_transformers_loads(family: Family, dtype: torch.dtype, tmp_path: Path) -> None:
    """Parameters one part at a time, and buffers; in the types that transformers keeps them in."""
    folder = written(family, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    skeleton = Skeleton.open(folder, CPU, dtype)
    parameters = dict(model.named_parameters())
    assert sorted(part_names(skeleton)) == sorted(parameters)
    for part in skeleton.parts:
        for name, tensor in skeleton.read(part).items():
            assert tensor.dtype == parameters[name].dtype, name
            assert torch.equal(tensor, parameters[name]), name
    buffers = dict(model.named_buffers())
    found = dict(skeleton.model.named_buffers())
    assert found.keys() == buffers.keys()
    for name, tensor in found.items():
        assert tensor.dtype == buffers[name].dtype, name
        assert torch.equal(tensor, buffers[name]), name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_stored_again_part_by_part(family: Family, tmp_path: Path) -> None:
    """What is read and cut up again is what the files hold, as the safetensors library reads them."""
    folder = write(build(family, 3), tmp_path / "model")
    expected = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    skeleton = Skeleton.open(folder, CPU, None)
    seen = []
    for part in skeleton.parts:
        stored = skeleton.as_stored(skeleton.read(part))
        assert sorted(stored) == sorted(skeleton.weights.names(part))
        for name, tensor in stored.items():
            assert torch.equal(tensor, expected[name]), name
            assert skeleton.stored_shapes[name] == tuple(tensor.shape)
        seen += stored
    assert sorted(seen) == sorted(skeleton.stored_shapes)
    assert seen and expected.keys() - set(seen) <= dict(skeleton.model.named_buffers()).keys()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_structure_from_the_configuration_alone(family: Family, tmp_path: Path) -> None:
    model = build(family, 3)
    model.config.save_pretrained(tmp_path)
    structure = Structure.build(tmp_path)
    assert {tensor.device.type for tensor in structure.model.state_dict().values()} == {"meta"}
    assert names_and_shapes(structure.model) == names_and_shapes(model)  # type: ignore[arg-type]
    names = part_names(structure)
    assert sorted(names) == sorted(names_and_shapes(model))
    assert len(names) == len(set(names))
    assert structure.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert len(structure.by_layer) == 2 and all(structure.by_layer)


def test_holding_and_letting_go(tmp_path: Path) -> None:
    folder = write(build(BY_NAME["Llama tied"], 3), tmp_path / "model")
    skeleton = Skeleton.open(folder, CPU, None)
    model = skeleton.model
    before = dict(model.named_parameters())
    with skeleton.in_memory(skeleton.vocabulary):
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
        assert head.weight is embedding.weight and head.weight.device == CPU
    assert all(each is before[name] for name, each in model.named_parameters())


def test_a_shard_cut_short_during_the_run(tmp_path: Path) -> None:
    folder = write(llama(), tmp_path / "model")
    skeleton = Skeleton.open(folder, CPU, None)
    name = "model.layers.1.mlp.up_proj.weight"
    entry = skeleton.checkpoint.tensors[name]
    os.truncate(entry.path, entry.begin + 5)
    with pytest.raises(RunError, match=f"{entry.path.name}: ends inside tensor {name}"):
        skeleton.read([name])
    entry.path.unlink()
    with pytest.raises(RunError, match=f"{entry.path.name}: tensor .* cannot be read: No such file"):
        skeleton.read([name])


@pytest.mark.skipif(sys.platform != "linux", reason="finds the shard through /proc")
def test_a_streamed_run_whose_shard_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(llama(), tmp_path / "model")
    original, calls = reading.read_fully, []

    def read_and_cut(descriptor: int, buffer: memoryview, offset: int) -> bool:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.suffix == ".safetensors":  # not a scratch file, which the main thread reads meanwhile
            calls.append(offset)
            if len(calls) == 20:
                os.truncate(path, offset)
        return original(descriptor, buffer, offset)

    monkeypatch.setattr(reading, "read_fully", read_and_cut)
    with pytest.raises(RunError, match="ends inside tensor"):
        estimate_importance(folder, draw_samples(3), out=tmp_path / "out", stream=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replace a tensor of a checkpoint of one file, or take it out."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_damaged_experts(tmp_path: Path) -> None:
    model = build(BY_NAME["Qwen3-MoE"], 3)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    change(tmp_path, name, torch.zeros(3, 3))
    with pytest.raises(InputError, match=f"{name} is .3, 3., those that it is joined with are .16, 32."):
        Skeleton.open(tmp_path, CPU, None)
    change(tmp_path, name, None)
    with pytest.raises(InputError, match=r"experts\.gate_up_proj cannot be made of 4 of .*, 3 of "):
        Skeleton.open(tmp_path, CPU, None)


def test_a_buffer_that_is_not_there(tmp_path: Path) -> None:
    model = build(BY_NAME["DeepSeek-V3, yarn"], 3)
    model.save_pretrained(tmp_path)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    change(tmp_path, name, None)
    with pytest.raises(InputError, match=f"lacks tensor {name}"):
        Skeleton.open(tmp_path, CPU, None)
