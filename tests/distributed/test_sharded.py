"""Live modules that FSDP2 or tensor parallelism has sharded: as the same modules in one piece."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from perta_fast import Importance, ImportanceRatio, InputError, apply_to_module_, estimate_importance
from perta_fast.data.samples import Sample
from perta_fast.errors import NotFiniteError
from tests.distributed.launch import on_ranks
from tests.runs.test_estimate import SAMPLES, assert_near, by_autograd, make, saved
from tests.support.models import nudge_

FAMILIES = ("llama tied", "gpt2", "mixtral")


def sharded(family: str, mesh: Any = None) -> Any:
    """The model with each of its layers, and the rest, sharded by FSDP2."""
    model = make(family)
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    layers = model.transformer.h if family == "gpt2" else model.model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _estimated(group: Any, families: tuple[str, ...], folder: Path, count: int) -> dict[str, Any]:
    """Two processes hold one copy; of four, two pairs hold a copy each."""
    pairs = dist.get_world_size() == 4
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "part")) if pairs else None
    found: dict[str, Any] = {}
    for family in families:
        model = sharded(family, mesh)
        if family == "gpt2":  # for what is not in a layer, a divisor of the user's
            model.set_force_sum_reduction_for_comms(True)
            model.set_gradient_divide_factor(5.0)
        importance = estimate_importance(
            model, SAMPLES[:count], batch_size=2, progress=False, group=group, out=folder / family
        )
        assert all(isinstance(each, DTensor) for each in importance.tensors.values())
        found[family] = {name: each.full_tensor() for name, each in importance.tensors.items()}
        assert all(parameter.grad is None for parameter in model.parameters())
    return found


@pytest.mark.parametrize(("world", "families", "count"), [(2, FAMILIES, 11), (4, FAMILIES[:1], 3)])
@pytest.mark.usefixtures("one_thread")
def test_the_mean_gradient_of_a_sharded_module(
    world: int, families: tuple[str, ...], count: int, tmp_path: Path
) -> None:
    outcomes = on_ranks(world, _estimated, families, tmp_path, count)
    for family in families:
        model = make(family)
        expected = saved(model, by_autograd(model, SAMPLES[:count])[0], tmp_path / "expected" / family)
        one = estimate_importance(model, SAMPLES[:count], progress=False).tensors
        for found in outcomes:
            assert_near(found[family], expected)
            assert_near(found[family], one, 1e-6)
        kept = Importance.load(tmp_path / family)
        assert kept.tensors.keys() == one.keys()
        assert all(torch.equal(kept.tensors[name], outcomes[0][family][name]) for name in one)


def _other_errors(group: Any) -> list[str]:
    broken = sharded("llama tied")

    def explode(_: Any, arguments: Any, keywords: Any, output: Any) -> Any:
        output.logits = output.logits * torch.where(keywords["input_ids"][:, :1] == 299, torch.nan, 1.0)[..., None]
        return output

    broken.register_forward_hook(explode, with_kwargs=True)
    samples = list(SAMPLES)
    samples[4] = Sample((299, *SAMPLES[4].input_ids[1:]), SAMPLES[4].labels)
    texts = []
    for kind, data, settings in (
        (NotFiniteError, samples, {"group": group}),
        (InputError, SAMPLES, {}),
        (InputError, SAMPLES, {"group": group, "estimator": "empirical-fisher"}),
    ):
        with pytest.raises(kind) as caught:
            estimate_importance(broken, data, progress=False, **settings)
        texts.append(str(caught.value))
    return texts


def test_refusals() -> None:
    for not_finite, no_group, squares in on_ranks(2, _other_errors):
        assert "the loss of sample 4 (counted from 0)" in not_finite
        assert "pass group" in no_group
        assert "estimate grad" in squares


# The subtraction.


def write_models(folder: Path) -> None:
    """Of each family base and tuned, with importances as files."""
    for family in FAMILIES:
        for name, seed in (("base", 5), ("tuned", 6)):
            model = make(family)
            nudge_(model, seed)
            model.save_pretrained(folder / family / name)
        for role, samples in (("forget", SAMPLES[:4]), ("retain", SAMPLES[4:])):
            estimate_importance(make(family), samples, progress=False, out=folder / family / role)


def whole(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: (each.full_tensor() if isinstance(each, DTensor) else each).detach().clone()
        for name, each in model.named_parameters()
    }


def placed(model: Any, mesh: Any, placements: Any) -> Any:
    """Every matrix a DTensor, as tensor parallelism has them; tied ones stay tied."""
    cut = {
        parameter: torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, placements))
        for parameter in model.parameters()
        if parameter.dim() >= 2
    }
    for part in model.modules():
        for key, parameter in part._parameters.items():
            if parameter in cut:
                setattr(part, key, cut[parameter])
    return model


def _apply(model: Any, folder: Path, importances: Any, group: Any = None) -> dict[str, torch.Tensor]:
    """importances: the two, or their ratio."""
    places = folder / "base", folder / "tuned"
    if isinstance(importances, ImportanceRatio):
        changed = apply_to_module_(model, *places, importance=importances, rule="grad", lam=2.0, group=group)
    else:
        changed = apply_to_module_(model, *places, *importances, rule="grad", lam=2.0, group=group)
    assert changed > 10
    return whole(model)


def _applied(group: Any, folder: Path) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for family in FAMILIES:
        stored = folder / family / "forget", folder / family / "retain"
        found[family] = _apply(sharded(family, mesh), folder / family, stored, group)
    model = sharded("llama tied", mesh)
    held_in_memory = [
        estimate_importance(model, samples, progress=False, group=group) for samples in (SAMPLES[:4], SAMPLES[4:])
    ]
    found["in memory"] = _apply(model, folder / "llama tied", held_in_memory, group)
    return found


def _applied_as_placed(group: Any, folder: Path) -> dict[str, Any]:
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    stored = folder / "forget", folder / "retain"
    in_memory = [in_rows(Importance.load(each), line) for each in stored]
    found = {}
    for name, mesh, placements, importances in (
        ("columns", line, [Shard(1)], stored),
        ("replicas", line, [Replicate()], stored),
        ("blocks", square, [Shard(0), Shard(1)], stored),
        ("rows of rows", square, [Shard(0), Shard(0)], stored),
        ("rows, as the importances", line, [Shard(0)], in_memory),
    ):
        found[name] = _apply(placed(make("gpt2"), mesh, placements), folder, importances, group)
    ratio = ImportanceRatio.of(*in_memory)
    found["ratio"] = _apply(placed(make("gpt2"), line, [Shard(0)]), folder, ratio, group)
    ratio.save(folder / "ratio", group=group, progress=False)
    for alone in (ratio, ImportanceRatio(dict(ratio.tensors), ratio.metadata)):
        with pytest.raises(InputError, match="is held by 4 processes; pass group, all of these"):
            alone.save(folder / "of one alone", progress=False)
    with pytest.raises(InputError, match=r"the forget importance of .* is sharded differently from the retain"):
        ImportanceRatio.of(in_memory[0], stored[1])
    columns = placed(make("gpt2"), line, [Shard(1)])
    with pytest.raises(InputError, match="sharded differently from the module"):
        _apply(columns, folder, in_memory, group)
    assert same(whole(columns), whole(make("gpt2")))
    return found


def in_rows(importance: Importance, mesh: Any) -> Importance:
    """The importance with its matrices in memory, each process holding some rows."""
    tensors = {
        name: distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.dim() >= 2 else tensor
        for name, tensor in importance.tensors.items()
    }
    return Importance(tensors, importance.metadata)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("one_thread")
def test_the_subtraction_on_what_each_holds(tmp_path: Path) -> None:
    """Over 3 processes, which divide no dimension here evenly, and over 4 in the ways of tensor parallelism."""
    write_models(tmp_path)
    expected = {}
    for family in FAMILIES:
        folder = tmp_path / family
        expected[family] = _apply(make(family), folder, (folder / "forget", folder / "retain"))
        assert not same(expected[family], whole(make(family)))
    for found in on_ranks(3, _applied, tmp_path):
        assert all(same(found[family], expected[family]) for family in FAMILIES)
        for name, each in found["in memory"].items():  # importances equal but for the order of sums
            assert torch.allclose(each, expected["llama tied"][name], rtol=1e-4, atol=1e-6)
    folder = tmp_path / "gpt2"
    ratio = ImportanceRatio.of(folder / "forget", folder / "retain")
    by_ratio = _apply(make("gpt2"), folder, ratio)
    assert not same(by_ratio, expected["gpt2"])
    for found in on_ranks(4, _applied_as_placed, folder):
        assert same(found.pop("ratio"), by_ratio)
        assert [name for name, each in found.items() if not same(each, expected["gpt2"])] == []
    assert same(dict(ImportanceRatio.load(folder / "ratio").tensors), dict(ratio.tensors))
