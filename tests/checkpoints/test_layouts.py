"""Directories that are not laid out as save_pretrained does: taken as transformers loads them, or named with advice."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from perta_fast import estimate_importance, evaluate, sweep, tune, unlearn
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.errors import InputError
from perta_fast.models.loading import load_subject
from perta_fast.runs.apply import apply
from perta_fast.runs.inspect import inspect
from perta_fast.runs.verify import verify
from tests.checkpoints.test_adapters import make_adapter
from tests.support.adapters import run_advice
from tests.support.checkpoints import draw, fingerprint, read_checkpoint, same_bytes, write_checkpoint
from tests.support.children import run_child
from tests.support.models import Job, llama, tokenizer, write_job

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]

INDEX = "model.safetensors.index.json"
QUERY, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Float32, in several shards."""
    return write_job(tmp_path / "job", torch.float32)


def weight_map(folder: Path) -> dict[str, str]:
    content: dict[str, dict[str, str]] = json.loads((folder / INDEX).read_text())
    return content["weight_map"]


def overlay(
    folder: Path, name: str = "zz-patch.safetensors", names: tuple[str, ...] = (QUERY, NORM)
) -> dict[str, Tensor]:
    """Put new values of some tensors into a shard of their own; the old ones stay where they are."""
    content = json.loads((folder / INDEX).read_text())
    new = {tensor: draw(tuple(read_checkpoint(folder)[tensor].shape), seed=len(tensor)) for tensor in names}
    save_file(new, folder / name, {"format": "pt"})
    content["weight_map"] |= dict.fromkeys(names, name)
    (folder / INDEX).write_text(json.dumps(content))
    return new


def loaded(folder: Path) -> dict[str, Tensor]:
    """What transformers loads."""
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


def expected(job: Job) -> dict[str, Tensor]:
    theta, theta_0, theta_f = map(loaded, job.checkpoints)
    return {name: theta[name] - (theta_f[name] - theta_0[name]) for name in theta}


def assert_loads_as(folder: Path, tensors: dict[str, Tensor]) -> None:
    found = loaded(folder)
    assert not [name for name in tensors if not same_bytes(found[name], tensors[name])]


@pytest.mark.parametrize("roles", [("model",), ("base",), ("tuned",), ("model", "base", "tuned")])
def test_what_the_index_says_counts(roles: tuple[str, ...], job: Job, tmp_path: Path) -> None:
    for role in roles:
        new = overlay(getattr(job, role))
        assert all(same_bytes(loaded(getattr(job, role))[name], new[name]) for name in new)
        assert all(same_bytes(Checkpoint.open(getattr(job, role)).tensor(name), new[name]) for name in new)
    right = expected(job)
    report = apply(*job.checkpoints, rule="tv", out=tmp_path / "out")
    assert_loads_as(tmp_path / "out", right)
    assert len(report.tensors) == len(right)
    assert not verify(tmp_path / "out", full=True, progress=False).problems


@pytest.mark.parametrize("stream", [None, False, True])
def test_old_copies_do_not_stay_in_the_output(stream: bool | None, job: Job, tmp_path: Path) -> None:
    before = {name: shard for name, shard in weight_map(job.model).items() if name in (QUERY, NORM)}
    overlay(job.model)
    if stream is None:
        report = apply(*job.checkpoints, rule="tv", out=tmp_path / "out")
    else:
        report = unlearn(
            *job.checkpoints, job.forget, job.retain, stream=stream, out=tmp_path / "out", lam=1.0, rule="fisher"
        )
    for name, shard in before.items():
        assert load_file(job.model / shard)[name].any()
        assert not load_file(tmp_path / "out" / shard)[name].any()
        assert f"old copies of tensors in {shard}" in report.other_weights
    theta = loaded(job.model)
    assert loaded(tmp_path / "out").keys() == theta.keys()
    assert not verify(tmp_path / "out", full=True, progress=False).problems


def test_a_shard_of_old_copies_alone_becomes_zeros(tmp_path: Path) -> None:
    tensors = {"a": draw((3, 5)), "b": draw((2,), seed=1)}
    paths = [write_checkpoint(tmp_path / role, tensors, 2) for role in ("model", "base", "tuned")]
    save_file({"a": draw((3, 5), seed=4)}, paths[2] / "model-00001-of-00002.safetensors")
    new = draw((3, 5), seed=7)
    save_file({"a": new}, paths[0] / "model-00003-of-00002.safetensors")
    content = json.loads((paths[0] / INDEX).read_text())
    content["weight_map"]["a"] = "model-00003-of-00002.safetensors"
    content["weight_map"]["c"] = "model-00001-of-00002.safetensors"
    save_file(load_file(paths[0] / "model-00001-of-00002.safetensors") | {"c": torch.arange(2)},
              paths[0] / "model-00001-of-00002.safetensors")  # fmt: skip
    (paths[0] / INDEX).write_text(json.dumps(content))
    for threads in (1, 3):
        apply(*paths, rule="tv", out=tmp_path / "out", threads=threads, overwrite=True)
        first = load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")
        assert not first["a"].any()
        assert torch.equal(first["c"], torch.arange(2))
        step = load_file(paths[2] / "model-00001-of-00002.safetensors")["a"] - tensors["a"]
        assert same_bytes(load_file(tmp_path / "out" / "model-00003-of-00002.safetensors")["a"], new - step)


def test_in_place_old_copies_are_named(job: Job, tmp_path: Path) -> None:
    overlay(job.model)
    before = fingerprint(job.model)
    with pytest.raises(InputError, match=r"old copies of tensors in model-0000.*pass leave_others"):
        apply(*job.checkpoints, rule="tv", in_place=True)
    assert fingerprint(job.model) == before
    apply(*job.checkpoints, rule="tv", out=tmp_path / "out")
    right = loaded(tmp_path / "out")
    apply(*job.checkpoints, rule="tv", in_place=True, leave_others=True)
    assert_loads_as(job.model, right)


def test_an_index_against_the_order_of_shards_is_refused_with_advice(job: Job, tmp_path: Path) -> None:
    """Transformers loads the last one that it reads, whatever the index says."""
    new = overlay(job.model, "a-patch.safetensors")
    seen = loaded(job.model)
    assert not same_bytes(seen[QUERY], new[QUERY])
    with pytest.raises(
        InputError, match=r"but into a-patch\.safetensors; transformers would load the one here"
    ) as caught:
        apply(*job.checkpoints, rule="tv", out=tmp_path / "out")
    run_advice(str(caught.value).rpartition("save what transformers loads with: ")[2])
    saved = job.model.with_name("model-safetensors")
    assert_loads_as(saved, seen)
    apply(saved, job.base, job.tuned, rule="tv", out=tmp_path / "out")


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def leave_out(weights: dict[str, str]) -> None:
    del weights[QUERY]


def put_elsewhere(weights: dict[str, str]) -> None:
    weights[QUERY] = next(shard for shard in weights.values() if shard != weights[QUERY])


def with_a_dot(weights: dict[str, str]) -> None:
    weights.update({name: f"./{shard}" for name, shard in weights.items()})


@pytest.mark.parametrize("change", [leave_out, put_elsewhere, with_a_dot])
@pytest.mark.parametrize("roles", [("model",), ("base", "tuned")])
@pytest.mark.parametrize("in_place", [False, True])
def test_an_index_that_transformers_takes(
    change: Callable[[dict[str, str]], object], roles: tuple[str, ...], in_place: bool, job: Job, tmp_path: Path
) -> None:
    right = expected(job)
    for role in roles:
        change_index(getattr(job, role), change)
    assert expected(job).keys() == right.keys()
    assert all(same_bytes(tensor, right[name]) for name, tensor in expected(job).items())
    target = {"in_place": True} if in_place else {"out": tmp_path / "out"}
    apply(*job.checkpoints, rule="tv", **target)
    output = job.model if in_place else tmp_path / "out"
    assert_loads_as(output, right)
    assert not verify(output, progress=False, full=not in_place).problems


def assert_saved_anew(job: Job, role: str, refusal: str, right: dict[str, Tensor], out: Path) -> None:
    """The command of the message saves a checkpoint that is taken in place of that of ``role``."""
    with pytest.raises(InputError, match=refusal) as caught:
        apply(*job.checkpoints, rule="tv", out=out)
    run_advice(str(caught.value).rpartition(" with: ")[2])
    saved = getattr(job, role).with_name(f"{role}-safetensors")
    apply(*(saved if path == getattr(job, role) else path for path in job.checkpoints), rule="tv", out=out)
    assert_loads_as(out, right)


def test_a_name_that_no_shard_holds_is_refused_with_advice(job: Job, tmp_path: Path) -> None:
    right = expected(job)
    change_index(job.tuned, lambda weights: weights.update({"model.old.weight": weights[QUERY]}))
    refusal = r"puts tensor model\.old\.weight into .* which does not hold it.* save what transformers loads with: "
    assert_saved_anew(job, "tuned", refusal, right, tmp_path / "out")


def test_shards_in_a_directory_of_their_own_are_refused_with_advice(job: Job, tmp_path: Path) -> None:
    right = expected(job)
    (job.model / "sub").mkdir()
    for shard in set(weight_map(job.model).values()):
        (job.model / shard).rename(job.model / "sub" / shard)
    change_index(job.model, lambda weights: weights.update({name: f"sub/{weights[name]}" for name in weights}))
    refusal = "is not the name of a safetensors file beside it; if you trust it, save what transformers loads with: "
    assert_saved_anew(job, "model", refusal, right, tmp_path / "out")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_variant_is_named_with_the_command_that_saves_it(sharded: bool, job: Job, tmp_path: Path) -> None:
    right = expected(job)
    model = AutoModelForCausalLM.from_pretrained(job.tuned, dtype="auto")
    shutil.rmtree(job.tuned)
    model.save_pretrained(job.tuned, variant="fp16", max_shard_size="20KB" if sharded else "1GB")
    tokenizer().save_pretrained(job.tuned)
    assert (job.tuned / "model.safetensors.index.fp16.json").exists() == sharded
    assert_saved_anew(job, "tuned", "save this variant as a model of its own with: ", right, tmp_path / "out")


def test_shards_of_fsdp_are_named_with_the_command_that_joins_them(job: Job, tmp_path: Path) -> None:
    right = expected(job)
    training = tmp_path / "checkpoint-7"
    state = loaded(job.tuned)
    distributed_checkpoint.save({"model": state}, checkpoint_id=training / "pytorch_model_fsdp_0", no_dist=True)
    distributed_checkpoint.save({"step": torch.ones(1)}, checkpoint_id=training / "optimizer_0", no_dist=True)
    with pytest.raises(InputError, match=r"give one of these, as .*/pytorch_model_fsdp_0"):
        apply(job.model, job.base, training, rule="tv", out=tmp_path / "out")
    folder = training / "pytorch_model_fsdp_0"
    with pytest.raises(InputError, match="join them with: ") as caught:
        apply(job.model, job.base, folder, rule="tv", out=tmp_path / "out")
    command = re.findall(r"join them with: (.*) \(pip install", str(caught.value))[0]
    program, *arguments = shlex.split(command)
    assert program == "accelerate"
    run_child([sys.executable, "-m", "accelerate.commands.accelerate_cli", *arguments], check=True)
    joined = Path(f"{folder}-merged")
    shutil.copy(job.tuned / "config.json", joined)
    apply(job.model, job.base, joined, rule="tv", out=tmp_path / "out")
    assert_loads_as(tmp_path / "out", right)


OTHER_PROGRAMS = {
    "a checkpoint of a DeepSpeed training": ("zero_to_fp32.py", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    "a checkpoint of Megatron": ("latest_checkpointed_iteration.txt", "mp_rank_00_000"),
    "a checkpoint of NeMo": ("model.nemo",),
    "weights of TensorFlow or JAX": ("tf_model.h5", "flax_model.msgpack"),
    "which is for running a model": ("model.onnx", "model-Q4_K_M.gguf"),
}


@pytest.mark.parametrize(
    ("program", "name"), [(what, name) for what, names in OTHER_PROGRAMS.items() for name in names]
)
def test_formats_of_other_programs_are_named(program: str, name: str, tmp_path: Path) -> None:
    for other in (name, "config.json", "training_args.bin"):
        (tmp_path / other).write_text("{}")
    with pytest.raises(InputError, match=f"{name}, {program}"):
        Checkpoint.open(tmp_path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 123456\n".format("ab" * 32)


@pytest.mark.parametrize("name", ["model-00001-of-00005.safetensors", INDEX, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_pointer_of_git_lfs_is_named(name: str, in_place: bool, job: Job, tmp_path: Path) -> None:
    (job.model / name).write_text(POINTER)
    before = fingerprint(job.model)
    with pytest.raises(InputError, match=r"is a pointer of git-lfs; .* git -C .* lfs pull") as caught:
        apply(*job.checkpoints, rule="tv", **({"in_place": True} if in_place else {"out": tmp_path / "out"}))
    assert str(caught.value).startswith(str(job.model / name))
    assert fingerprint(job.model) == before
    assert not (tmp_path / "out").exists()


def test_a_picture_may_be_a_pointer(job: Job, tmp_path: Path) -> None:
    (job.model / "figure.png").write_text(POINTER)
    apply(*job.checkpoints, rule="tv", out=tmp_path / "out")


@pytest.mark.parametrize("roles", [("model",), ("base",), ("tuned",), ("model", "base", "tuned")])
@pytest.mark.parametrize("in_place", [False, True])
def test_shards_without_an_index(roles: tuple[str, ...], in_place: bool, job: Job, tmp_path: Path) -> None:
    right = expected(job)
    index = (job.model / INDEX).read_bytes()
    for role in roles:
        (getattr(job, role) / INDEX).unlink()
    if in_place:
        apply(*job.checkpoints, rule="tv", in_place=True)
        assert not list(job.model.glob("*.index.json")) or "model" not in roles
        (job.model / INDEX).write_bytes(index)
        assert_loads_as(job.model, right)
        return
    apply(*job.checkpoints, rule="tv", out=tmp_path / "out")
    assert_loads_as(tmp_path / "out", right)
    assert weight_map(tmp_path / "out") == json.loads(index)["weight_map"]
    assert not verify(tmp_path / "out", full=True, progress=False).problems
    assert "checkpoint" in inspect(job.model).text()


@pytest.mark.parametrize("stream", [False, True])
def test_without_an_index_a_run_is_the_same(stream: bool, job: Job, tmp_path: Path) -> None:
    how: dict[str, Any] = {"lam": 1.0, "stream": stream, "progress": False}
    unlearn(*job.checkpoints, job.forget, job.retain, out=tmp_path / "expected", **{"rule": "fisher"} | how)
    for path in job.checkpoints:
        (path / INDEX).unlink()
    before = {path: sorted(path.iterdir()) for path in job.checkpoints}
    unlearn(*job.checkpoints, job.forget, job.retain, out=tmp_path / "out", **{"rule": "fisher"} | how)
    assert_loads_as(tmp_path / "out", loaded(tmp_path / "expected"))
    assert before == {path: sorted(path.iterdir()) for path in job.checkpoints}


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_model_without_an_index_loads_as_with_one(dtype: torch.dtype | None, job: Job) -> None:
    GenerationConfig(eos_token_id=[0, 7], max_length=99).save_pretrained(job.model)
    right = load_subject(job.model, "cpu", dtype).module
    (job.model / INDEX).unlink()
    found = load_subject(job.model, "cpu", dtype).module
    expected_state, state = right.state_dict(), found.state_dict()
    assert state.keys() == expected_state.keys() and right.training == found.training
    assert all(same_bytes(state[name], expected_state[name]) for name in state)
    for name in ("generation_config", "config"):
        assert getattr(found, name).to_dict() == getattr(right, name).to_dict()
    assert found.name_or_path == right.name_or_path and found.config.name_or_path == right.config.name_or_path


def test_the_other_commands_do_without_an_index(job: Job, tmp_path: Path) -> None:
    written = []
    for _ in ("with", "without"):
        folder = tmp_path / str(len(written))
        how: dict[str, Any] = {"progress": False}
        estimate_importance(job.base, job.forget, "grad", out=folder / "importance", **how)
        scores = evaluate(job.model, forget=job.forget, device="cpu", **how)
        swept = sweep(*job.checkpoints, job.forget, job.retain, rule="tv", lams=[0.5], **how)
        tune(job.base, job.forget, out=folder / "adapter", epochs=1, **how)
        importance = read_checkpoint(folder / "importance")
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        named = json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        rows = [(row.forget, row.retain) for row in swept.rows]
        written.append((importance, adapter, rows, scores, named))
        for path in job.checkpoints:
            (path / INDEX).unlink(missing_ok=True)
    (importance, adapter, rows, scores, named), (first, second, *others) = written
    assert importance.keys() == first.keys() and all(same_bytes(importance[name], first[name]) for name in first)
    assert adapter.keys() == second.keys() and all(same_bytes(adapter[name], second[name]) for name in second)
    assert others[0] == rows and others[2] == named
    assert others[1].metrics == scores.metrics


def drop(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def repeat(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(second) | dict([next(iter(load_file(first).items()))]), second)


def add(folder: Path) -> None:
    save_file({"other": draw((2,))}, folder / "model-00001-of-00009.safetensors")


INCOMPLETE: dict[str, tuple[Callable[[Path], None], str]] = {
    "one is missing": (drop, "nor exactly the shards of one set; fetch it again"),
    "two sets": (add, "nor exactly the shards of one set; fetch it again"),
    "a name in two": (repeat, "and there is no model.safetensors.index.json that says which one counts"),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_other_shards_without_an_index_are_refused(case: str, job: Job, tmp_path: Path) -> None:
    damage, reason = INCOMPLETE[case]
    (job.tuned / INDEX).unlink()
    damage(job.tuned)
    with pytest.raises(InputError, match=reason):
        apply(*job.checkpoints, rule="tv", out=tmp_path / "out")


def test_a_pickled_adapter_is_named_with_the_command_that_converts_it(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, llama, {"target_modules": ["q_proj", "down_proj"]})
    apply(tmp_path / "model", tmp_path / "base", adapter, rule="tv", out=tmp_path / "expected")
    path = adapter / "adapter_model.safetensors"
    torch.save(load_file(path), adapter / "adapter_model.bin")
    path.unlink()
    with pytest.raises(InputError, match=r"holds adapter_model.bin, which is never loaded here") as caught:
        apply(tmp_path / "model", tmp_path / "base", adapter, rule="tv", out=tmp_path / "out")
    run_advice(str(caught.value).rpartition("convert it with: ")[2])
    apply(tmp_path / "model", tmp_path / "base", adapter, rule="tv", out=tmp_path / "out")
    assert read_checkpoint(tmp_path / "out").keys() == read_checkpoint(tmp_path / "expected").keys()
    for name, tensor in read_checkpoint(tmp_path / "expected").items():
        assert same_bytes(read_checkpoint(tmp_path / "out")[name], tensor)


@pytest.mark.parametrize("below", ["checkpoint-12", "snapshots/0123abcd"])
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_weights_one_directory_down_are_named(below: str, kind: str, tmp_path: Path) -> None:
    make_adapter(tmp_path, llama, {"target_modules": ["q_proj"]})
    shutil.copytree(tmp_path / kind, tmp_path / "run" / below)
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    with pytest.raises(InputError, match="directories in it hold weights: give one of these, as") as caught:
        apply(tmp_path / "model", tmp_path / "base", tmp_path / "run", rule="tv", out=tmp_path / "out")
    (named,) = re.findall(r"give one of these, as (.*)", str(caught.value))
    assert Path(named) == tmp_path / "run" / below
    apply(tmp_path / "model", tmp_path / "base", named, rule="tv", out=tmp_path / "out")


@pytest.mark.parametrize("name", ["consolidated.safetensors", "consolidated.00.pth", "weights.pt"])
def test_weights_of_another_name_are_named(name: str, tmp_path: Path) -> None:
    for other in (name, "config.json", "training_args.bin"):
        (tmp_path / other).write_text("{}")
    with pytest.raises(InputError, match=rf"holds neither .*, but {name}; is this a model as transformers saves it"):
        Checkpoint.open(tmp_path)


def test_an_adapter_without_its_settings_is_named(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, llama, {"target_modules": ["q_proj"]})
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"holds adapter_model.safetensors without the adapter_config.json"):
        apply(tmp_path / "model", tmp_path / "base", adapter, rule="tv", out=tmp_path / "out")


def test_an_adapter_beside_shards_without_an_index_is_not_taken_for_tuned(job: Job, tmp_path: Path) -> None:
    right = expected(job)
    (job.tuned / INDEX).unlink()
    (job.tuned / "adapter_config.json").write_text("{}")
    report = apply(*job.checkpoints, rule="tv", out=tmp_path / "out")
    assert_loads_as(tmp_path / "out", right)
    assert "the adapter was not read" in report.warnings[0]


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "pytorch_model.bin"])
def test_other_weights_one_directory_down_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"give one of these, as .*/checkpoint-5$"):
        Checkpoint.open(tmp_path)
