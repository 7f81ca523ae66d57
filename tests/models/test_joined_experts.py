"""Experts joined in one checkpoint and apart in another: the same bits as if all were in the form of the model."""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from perta_fast import (
    Importance,
    InputError,
    RunError,
    apply,
    apply_to_module_,
    estimate_importance,
    resume,
    sweep,
    unlearn,
    verify,
)
from perta_fast.checkpoints.advice import conversion_command
from perta_fast.models.stored_names import LoadedGroup
from perta_fast.records.report import Report
from perta_fast.reporting.weight_distribution import Distribution, distribution
from perta_fast.streaming.write_behind import WriteBehind
from perta_fast.subtraction import parts
from perta_fast.subtraction.in_place import Segment  # type: ignore[attr-defined]
from tests.families.configs import FAMILIES as ALL_FAMILIES
from tests.families.configs import Family
from tests.families.matrix import build
from tests.support.adapters import run_advice
from tests.support.checkpoints import read_checkpoint, same_bytes, write_checkpoint
from tests.support.models import FORGET, RETAIN, draw_samples, tokenizer, write_lines

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]

BY_NAME = {family.name: family for family in ALL_FAMILIES}
FAMILIES = ["Mixtral", "Qwen2-MoE", "Qwen3-MoE", "DeepSeek-V3, yarn"]
ROLES = {"model": 1, "base": 2, "tuned": 3}
FORMS = sorted(itertools.product(("apart", "joined"), repeat=3), key=lambda forms: len(set(forms)))  # equal ones first
MIXED = [("apart", "joined", "apart"), ("joined", "apart", "joined"), ("apart", "joined", "joined")]
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
Paths = dict[str, dict[str, Path]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Paths]:
    """By form and role: model, base and tuned in both forms, in more than one shard; a named family is made once."""

    @cache
    def make(family: str | Family, dtype: torch.dtype) -> Path:
        made = tmp_path_factory.mktemp("made")
        for role, seed in ROLES.items():
            model = build(BY_NAME[family] if isinstance(family, str) else family, seed).to(dtype)
            for form in ("apart", "joined"):
                path = made / form / role
                model.save_pretrained(path, max_shard_size="20KB", save_original_format=form == "apart")
                tokenizer().save_pretrained(path)
        return made

    def copied(folder: Path, family: str | Family = "Qwen3-MoE", dtype: torch.dtype = torch.float32) -> Paths:
        made = (make if isinstance(family, str) else make.__wrapped__)(family, dtype)
        shutil.copytree(made, folder, dirs_exist_ok=True)
        return {form: {role: folder / form / role for role in ROLES} for form in ("apart", "joined")}

    return copied


def chosen(paths: Paths, forms: tuple[str, ...]) -> list[Path]:
    return [paths[form][role] for form, role in zip(forms, ROLES, strict=True)]


def data(folder: Path) -> list[Path]:
    return [write_lines(folder / "forget.jsonl", FORGET), write_lines(folder / "retain.jsonl", RETAIN)]


def load(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path)
    return model


def assert_same(first: Path, second: Path) -> None:
    expected, got = read_checkpoint(first), read_checkpoint(second)
    assert expected
    assert list(expected) == list(got)
    assert [name for name in expected if not same_bytes(expected[name], got[name])] == []


def assert_same_model(first: PreTrainedModel, second: PreTrainedModel) -> None:
    expected, got = first.state_dict(), second.state_dict()
    assert expected.keys() == got.keys()
    assert [name for name in expected if not same_bytes(expected[name], got[name])] == []


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in FAMILIES), *((family, torch.bfloat16) for family in FAMILIES[2:])],
    ids=str,
)
def test_all_forms(family: str, dtype: torch.dtype, written: Callable[..., Paths], tmp_path: Path) -> None:
    paths = written(tmp_path, family, dtype)
    assert any(name.endswith("experts.gate_up_proj") for name in read_checkpoint(paths["joined"]["model"]))
    for forms in FORMS:
        out = tmp_path / "-".join(forms)
        apply(*chosen(paths, forms), rule="tv", lam=0.7, out=out, progress=False)
        assert_same(tmp_path / "-".join(3 * forms[:1]), out)
        assert not verify(out, full=True).problems
    assert_same_model(load(tmp_path / "apart-apart-apart"), load(tmp_path / "joined-joined-joined"))
    before, after = (read_checkpoint(path) for path in (paths["apart"]["model"], tmp_path / "apart-apart-apart"))
    assert not any(torch.equal(before[name], after[name]) for name in before if ".experts." in name)


@pytest.mark.parametrize("forms", MIXED, ids="-".join)
def test_chunks_that_begin_within_an_expert(
    forms: tuple[str, ...], written: Callable[..., Paths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = written(tmp_path)
    monkeypatch.setattr("perta_fast.subtraction.compute.CHUNK", 100)
    for name, of in (("expected", 3 * forms[:1]), ("out", forms)):
        apply(*chosen(paths, of), rule="tv", lam=0.7, out=tmp_path / name, threads=3, progress=False)
    assert_same(tmp_path / "expected", tmp_path / "out")


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
@pytest.mark.parametrize("family", ["Mixtral", "DeepSeek-V3, yarn"])
def test_importances(family: str, stream: bool, written: Callable[..., Paths], tmp_path: Path) -> None:
    paths = written(tmp_path, family)
    made: dict[str, list[Path]] = {}
    for form in paths:
        made[form] = [tmp_path / f"{form}-{number}" for number in range(2)]
        for path, rows in zip(made[form], data(tmp_path), strict=True):
            estimate_importance(paths[form]["base"], rows, "grad", out=path, stream=stream, progress=False)
    how: dict[str, Any] = {"rule": "fisher", "lam": 0.7, "progress": False}
    for form in paths:
        apply(*chosen(paths, (form,) * 3), *made[form], out=tmp_path / form / "expected", **how)
    for forms in (*MIXED, ("joined",) * 3, ("apart",) * 3):
        for of in itertools.product(made, repeat=2):
            out = tmp_path / "-".join((*forms, *of))
            kept = [made[form][number] for number, form in enumerate(of)]
            apply(*chosen(paths, forms), *kept, out=out, **how)
            assert_same(tmp_path / forms[0] / "expected", out)
    assert not verify(tmp_path / "apart-joined-apart-joined-apart", full=True).problems
    reports = [Report.load(tmp_path / name) for name in ("apart-joined-apart-joined-apart", "apart/expected")]
    first, second = (distribution(report, progress=False) for report in reports)
    assert isinstance(first, Distribution)
    assert isinstance(second, Distribution)
    assert (first.counts == second.counts).all()
    in_place = tmp_path / "in-place"
    shutil.copytree(paths["joined"]["model"], in_place)
    apply(in_place, paths["apart"]["base"], paths["joined"]["tuned"], *made["apart"], in_place=True, **how)
    assert_same(tmp_path / "joined" / "expected", in_place)


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_unlearning(stream: bool, written: Callable[..., Paths], tmp_path: Path) -> None:
    paths, rows = written(tmp_path, "Qwen2-MoE"), data(tmp_path)
    how: dict[str, Any] = {"rule": "fisher", "lam": 0.7, "stream": stream, "check": False, "progress": False}
    for form in paths:
        unlearn(*chosen(paths, (form,) * 3), *rows, out=tmp_path / form / "expected", **how)
    for at, forms in itertools.product(("base", "model"), MIXED):
        expected = tmp_path / f"expected-{at}-{forms[0]}"
        if not expected.exists():
            unlearn(*chosen(paths, 3 * forms[:1]), *rows, at=at, out=expected, **how)
        out = tmp_path / "-".join((at, *forms))
        unlearn(*chosen(paths, forms), *rows, at=at, out=out, save_importance=tmp_path / f"kept-{out.name}", **how)
        assert_same(expected, out)
        assert not verify(out, full=True).problems
    assert_same_model(load(tmp_path / "expected-base-apart"), load(tmp_path / "expected-base-joined"))


def stopping(patch: pytest.MonkeyPatch, owner: Any, method: str, call: int) -> None:
    """Let a method fail at one of its calls."""
    real, calls = getattr(owner, method), itertools.count(1)

    def stop(*arguments: Any, **settings: Any) -> Any:
        if next(calls) == call:
            raise RunError("no more")
        return real(*arguments, **settings)

    patch.setattr(owner, method, stop)


WAYS = {
    "directory": (parts.Part, "note", 3),
    "in place": (Segment, "apply", 1),
    "streamed": (WriteBehind, "_record", 6),
}


@pytest.mark.parametrize("forms", MIXED[:1], ids="-".join)
@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_goes_on(
    way: str, forms: tuple[str, ...], written: Callable[..., Paths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, rows = written(tmp_path), data(tmp_path)
    inputs, expected, out = chosen(paths, forms), tmp_path / "expected", tmp_path / "out"

    def run(**where: Any) -> None:
        if way == "streamed":
            unlearn(*inputs, *rows, rule="fisher", lam=0.7, stream=True, progress=False, **where)
        else:
            apply(*inputs, rule="tv", lam=0.7, progress=False, **where)

    run(out=expected)
    with monkeypatch.context() as patch, pytest.raises(RunError, match="no more"):
        stopping(patch, *WAYS[way])
        run(**({"in_place": True} if way == "in place" else {"out": out}))
    out = inputs[0] if way == "in place" else out
    report = resume(out, progress=False)
    assert isinstance(report, Report)
    assert report.resumed == 1
    assert_same(expected, out)


@pytest.mark.parametrize("own", ["built", "apart", "joined"])
def test_a_live_module(own: str, written: Callable[..., Paths], tmp_path: Path) -> None:
    paths = written(tmp_path)

    def module(of: str = own) -> PreTrainedModel:
        return build(BY_NAME["Qwen3-MoE"], ROLES["model"]) if of == "built" else load(paths[of]["model"])

    importances: dict[str, list[Importance]] = {}
    for form in ("apart", "joined"):
        live = load(paths[form]["model"])
        importances[form] = [estimate_importance(live, draw_samples(4, seed=k), "grad", progress=False) for k in (0, 1)]
    kept = {form: [tmp_path / f"{form}-{number}" for number in range(2)] for form in importances}
    for form, folders in kept.items():
        for importance, folder in zip(importances[form], folders, strict=True):
            Importance(importance.tensors, importance.metadata).save(folder)
    expected = module("apart")
    apply_to_module_(expected, paths["apart"]["base"], paths["apart"]["tuned"], *kept["apart"], rule="fisher", lam=0.7)
    for base, tuned in itertools.product(paths, repeat=2):
        given: Any
        for given in (*importances.values(), *kept.values(), (importances["apart"][0], kept["joined"][1])):
            changed = module()
            apply_to_module_(changed, paths[base]["base"], paths[tuned]["tuned"], *given, rule="fisher", lam=0.7)
            assert_same_model(expected, changed)
    assert not torch.equal(expected.state_dict()[JOINED], module().state_dict()[JOINED])


JOINED = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("forms", MIXED[:1], ids="-".join)
def test_a_sweep(forms: tuple[str, ...], written: Callable[..., Paths], tmp_path: Path) -> None:
    paths, rows = written(tmp_path), data(tmp_path)
    how: dict[str, Any] = {"rule": "fisher", "lams": [0.5, 1.0], "progress": False}
    expected = sweep(*chosen(paths, ("apart",) * 3), *rows, **how)
    found = sweep(
        *chosen(paths, forms), *rows, out=tmp_path / "sweep", select="closest", gold=paths["apart"]["base"], **how
    )
    assert [(row.forget_loss, row.changed) for row in found.rows] == [
        (row.forget_loss, row.changed) for row in expected.rows
    ]


@pytest.mark.parametrize(("model", "base"), [("apart", "joined"), ("joined", "apart"), ("joined", "joined")])
def test_adapters_of_experts(model: str, base: str, written: Callable[..., Paths], tmp_path: Path) -> None:
    paths = written(tmp_path)
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    tuned = get_peft_model(load(paths["apart"]["base"]), LoraConfig(r=2, task_type="CAUSAL_LM", **targets))
    torch.manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    tuned.save_pretrained(tmp_path / "adapter")
    for name, pair in (("expected", ("apart", "apart")), ("out", (model, base))):
        inputs = paths[pair[0]]["model"], paths[pair[1]]["base"], tmp_path / "adapter"
        apply(*inputs, rule="tv", lam=0.7, out=tmp_path / name, progress=False)
    assert_same_model(load(tmp_path / "expected"), load(tmp_path / "out"))
    assert read_checkpoint(tmp_path / "out").keys() == read_checkpoint(paths[model]["model"]).keys()
    assert not verify(tmp_path / "out", full=True).problems
    live = load(paths[model]["model"])
    apply_to_module_(live, paths[base]["base"], tmp_path / "adapter", rule="tv", lam=0.7)
    assert_same_model(load(tmp_path / "expected"), live)


def changed(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    copy = path.with_name(f"{path.name}-changed")
    tensors = read_checkpoint(path)
    change(tensors)
    write_checkpoint(copy, tensors)
    shutil.copy(path / "config.json", copy)
    return copy


@pytest.mark.parametrize("lost", [("up_proj",), ("down_proj",), ("gate_proj", "up_proj", "down_proj")], ids="-".join)
@pytest.mark.parametrize("role", ["model", "base", "tuned"])
def test_a_missing_expert_is_named(
    role: str, lost: tuple[str, ...], written: Callable[..., Paths], tmp_path: Path
) -> None:
    paths = written(tmp_path)
    inputs = {name: paths["apart" if name == role else "joined"][name] for name in ROLES}

    def lose(tensors: dict[str, torch.Tensor]) -> None:
        for name in lost:
            del tensors[EXPERT.replace("up_proj", name)]

    inputs[role] = changed(paths["apart"][role], lose)
    with pytest.raises(
        InputError, match=rf"{role}-changed: lacks tensors? .*layers\.1\.mlp\.experts\.2\.({'|'.join(lost)})\.weight"
    ):
        apply(*inputs.values(), rule="tv", lam=1, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_one_expert_more_is_refused(written: Callable[..., Paths], tmp_path: Path) -> None:
    paths = written(tmp_path)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if ".experts.3." in name:
                tensors[name.replace(".experts.3.", ".experts.4.")] = tensors[name].clone()

    base = changed(paths["apart"]["base"], add)
    with pytest.raises(InputError, match=r"base-changed: .* cannot be made of 5 of .*its config\.json calls for \[4,"):
        apply(paths["joined"]["model"], base, paths["joined"]["tuned"], rule="tv", lam=1, out=tmp_path / "out")


@pytest.mark.parametrize("layers", [(1,), (0, 1)], ids=str)
def test_two_tensors_for_one_place_are_refused(
    layers: tuple[int, ...], written: Callable[..., Paths], tmp_path: Path
) -> None:
    paths = written(tmp_path)
    names = [f"model.layers.{layer}.mlp.experts.{name}" for layer in layers for name in ("gate_up_proj", "down_proj")]
    other = read_checkpoint(paths["joined"]["base"])
    both = changed(paths["apart"]["base"], lambda tensors: tensors.update({name: other[name] for name in names}))
    lacks = "has tensors .*experts.*, which .*model lacks"
    reasons = {"apart": lacks, "joined": lacks if len(layers) == 2 else "to one place; remove the one"}
    for model, reason in reasons.items():
        with pytest.raises(InputError, match=reason):
            apply(paths[model]["model"], both, paths[model]["tuned"], rule="tv", lam=1, out=tmp_path / "out")


def test_both_forms_in_one_checkpoint(written: Callable[..., Paths], tmp_path: Path) -> None:
    """The experts of one layer joined, those of the other apart."""
    paths = written(tmp_path)
    other = read_checkpoint(paths["joined"]["base"])

    def join(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1.mlp.experts." in name]:
            del tensors[name]
        tensors.update({name: tensor for name, tensor in other.items() if ".layers.1.mlp.experts." in name})

    base = changed(paths["apart"]["base"], join)
    for form, by_role in paths.items():
        for number, of in enumerate((by_role["base"], base)):
            inputs = by_role["model"], of, by_role["tuned"]
            apply(*inputs, rule="tv", lam=0.7, out=tmp_path / f"{form}-{number}", progress=False)
        assert_same(tmp_path / f"{form}-0", tmp_path / f"{form}-1")
    inputs = base, paths["joined"]["model"], paths["apart"]["tuned"]
    apply(*inputs, rule="tv", lam=0.7, out=tmp_path / "out", progress=False)
    apply(paths["apart"]["base"], *inputs[1:], rule="tv", lam=0.7, out=tmp_path / "expected", progress=False)
    assert_same_model(load(tmp_path / "expected"), load(tmp_path / "out"))


def test_tied_embeddings(written: Callable[..., Paths], tmp_path: Path) -> None:
    """A matrix that one of them stores under its other name, beside experts in another form."""
    base = BY_NAME["Qwen3-MoE"]
    tied = replace(base, settings=base.settings | {"tie_word_embeddings": True})
    paths = written(tmp_path, tied)

    def under_the_other_name(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    other = changed(paths["joined"]["base"], under_the_other_name)
    for number, of in enumerate((paths["apart"]["base"], paths["joined"]["base"], other)):
        inputs = paths["apart"]["model"], of, paths["apart"]["tuned"]
        apply(*inputs, rule="tv", lam=0.7, out=tmp_path / str(number), progress=False)
        assert_same(tmp_path / "0", tmp_path / str(number))


def test_types_that_differ_within_a_layer_are_refused(written: Callable[..., Paths], tmp_path: Path) -> None:
    paths = written(tmp_path)
    base = changed(paths["apart"]["base"], lambda tensors: tensors.update({EXPERT: tensors[EXPERT].bfloat16()}))
    with pytest.raises(InputError, match=r"experts\.2\.up_proj\.weight is BF16, but they are one tensor"):
        apply(paths["joined"]["model"], base, paths["joined"]["tuned"], rule="tv", lam=1, out=tmp_path / "out")


def test_experts_of_another_size_are_refused(written: Callable[..., Paths], tmp_path: Path) -> None:
    paths = written(tmp_path)

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[JOINED] = tensors[JOINED][:, :-2].contiguous()

    tuned = changed(paths["joined"]["tuned"], cut)
    with pytest.raises(InputError, match=r"experts\.gate_up_proj has shape \[4, 32, 32\] in .*, \[4, 30, 32\] in "):
        apply(paths["apart"]["model"], paths["apart"]["base"], tuned, rule="tv", lam=1, out=tmp_path / "out")


@pytest.mark.slow
def test_another_order_is_refused_with_a_command_that_helps(
    written: Callable[..., Paths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As experts that are stored transposed."""
    paths = written(tmp_path)
    convert = LoadedGroup.convert

    def transposed(group: LoadedGroup, model: Any, read: Any) -> dict[str, torch.Tensor]:
        made = convert(group, model, read)
        return {name: tensor if group.converter is None else tensor.flip(1) for name, tensor in made.items()}

    monkeypatch.setattr(LoadedGroup, "convert", transposed)
    with pytest.raises(InputError, match="in another order") as refused:
        apply(*chosen(paths, ("joined", "apart", "joined")), rule="tv", lam=1, out=tmp_path / "out", progress=False)
    command = conversion_command(paths["apart"]["base"], save=", save_original_format=False")
    assert str(refused.value).endswith(command)
    run_advice(command)
    made, joined = (
        read_checkpoint(paths["apart"]["base"].with_name("base-safetensors")),
        read_checkpoint(paths["joined"]["base"]),
    )
    assert made.keys() == joined.keys()
    assert all(same_bytes(made[name], tensor) for name, tensor in joined.items())


def test_names_without_the_prefix_and_joined(written: Callable[..., Paths], tmp_path: Path) -> None:
    """The whole kind at once: names of a base model, apart, against those in memory."""
    paths = written(tmp_path)
    folder = paths["apart"]["base"]
    plain = {name.removeprefix("model."): tensor for name, tensor in read_checkpoint(folder).items()}
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    for model in paths:
        for number, base in enumerate(("joined", "apart")):
            inputs = paths[model]["model"], paths[base]["base"], paths["apart"]["tuned"]
            apply(*inputs, rule="tv", lam=0.7, out=tmp_path / f"{model}-{number}", progress=False)
        assert_same(tmp_path / f"{model}-0", tmp_path / f"{model}-1")
    assert load_file(folder / "model.safetensors").keys() == plain.keys()
