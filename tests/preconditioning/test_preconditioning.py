"""``perta precondition``: moments and solution held to plain torch, outputs to peft, transformers and ``unlearn``."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import perta_fast as pf
from perta_fast import cli
from perta_fast.data.rows import read_data
from perta_fast.data.samples import Sample
from perta_fast.models.loading import Subject, samples_for
from perta_fast.preconditioning import input_moments as moments_room
from perta_fast.preconditioning.input_moments import input_moments
from perta_fast.preconditioning.solve import preconditioned
from perta_fast.streaming.linear_inputs import layer_moments
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.scratch_files import ScratchFiles
from perta_fast.tuning.adapter import linear_maps
from tests.families.configs import FAMILIES
from tests.families.matrix import build, write
from tests.support.checkpoints import fingerprint, read_checkpoint
from tests.support.models import RETAIN, Job, draw_samples, llama, nudge_, taken, tokenizer, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def precondition(job: Job, out: Path, **settings: Any) -> pf.Preconditioning:
    inputs: dict[str, Any] = {"base": job.base, "tuned": job.tuned, "retain": job.retain, "out": out}
    return pf.precondition(**inputs | {"progress": False} | settings)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return write_job(tmp_path / "job", F32)


@torch.no_grad()
def moments_by_hand(model: Any, samples: list[Sample]) -> dict[str, Tensor]:
    """One sample at a time, float64, no sharing."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Any:
        def see(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].reshape(-1, given[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + rows.T @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return see

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in linear_maps(model, adapted=False).items()]
    for sample in samples:
        model(input_ids=torch.tensor([sample.input_ids]))
    for handle in handles:
        handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def by_inverse(direction: Tensor, moment: Tensor, mu: float) -> Tensor:
    moment = moment.double()
    kept = torch.eye(len(moment), dtype=torch.float64) + mu * moment / moment.diagonal().mean()
    solution: Tensor = direction.double() @ torch.linalg.inv(kept)
    return solution


MODELS: dict[str, Callable[[], Any]] = {
    "Llama": llama,
    "Llama, tied, bfloat16": lambda: llama(tie_word_embeddings=True).to(BF16),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "Qwen3-MoE": lambda: build(next(family for family in FAMILIES if family.name == "Qwen3-MoE"), 1),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_moments(name: str, batch_size: int) -> None:
    model, samples = MODELS[name](), draw_samples(17, vocabulary=100)
    model.train()
    maps = linear_maps(model, adapted=False)
    found = input_moments(model, maps, samples, batch_size)
    assert model.training
    model.eval()
    expected = moments_by_hand(model, samples)
    assert found.keys() == maps.keys()
    for layer, moment in found.items():
        assert moment.dtype == F32
        torch.testing.assert_close(moment.double(), expected[layer], rtol=1e-5, atol=1e-6)


def test_maps_with_one_input_share_its_moment() -> None:
    model = llama()
    found = input_moments(model, linear_maps(model), draw_samples(3))
    layer = "model.layers.0."
    q, k, v, o = (found[f"{layer}self_attn.{name}_proj"] for name in "qkvo")
    gate, up, down = (found[f"{layer}mlp.{name}_proj"] for name in ("gate", "up", "down"))
    assert q is k is v
    assert gate is up
    assert len({id(moment) for moment in (q, o, gate, down)}) == 4


def test_more_moments_than_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_room, "available_bytes", lambda: 4 * 40 * 40)
    model = llama()
    with pytest.raises(pf.InputError, match=r"take another 20\.7 kB of memory, but 6\.4 kB are free"):
        input_moments(model, linear_maps(model), draw_samples(3))


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (9, 5)])
@pytest.mark.parametrize("mu", [0.0, 1e-3, 10.0, 1e4])
def test_the_solution_is_that_by_the_inverse(shape: tuple[int, int], mu: float) -> None:
    torch.manual_seed(0)
    direction, inputs = torch.randn(shape), torch.randn(20, shape[1])
    moment = inputs.T @ inputs / 20
    found = preconditioned(direction, moment, mu)
    assert found.dtype == F32
    torch.testing.assert_close(found.double(), by_inverse(direction, moment, mu), rtol=1e-6, atol=1e-7)


def test_what_no_input_has_is_kept_and_what_all_have_is_not() -> None:
    moment = torch.diag(torch.tensor([4.0, 0.0]))
    assert preconditioned(torch.tensor([[1.0, 1.0]]), moment, 10.0).tolist() == [[pytest.approx(1 / 21), 1.0]]
    assert preconditioned(torch.tensor([[1.0, 2.0]]), torch.zeros(2, 2), 10.0).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    job = write_job(tmp_path, dtype)
    before = fingerprint(job.base, job.tuned)
    record = precondition(job, tmp_path / "out", mu=3.0)
    assert fingerprint(job.base, job.tuned) == before
    base, tuned, found = (read_checkpoint(path) for path in (job.base, job.tuned, tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=F32 if dtype == F16 else taken(dtype))
    moments = input_moments(model, linear_maps(model), samples_of(job, model))
    assert len(moments) == 14
    assert found.keys() == base.keys()
    before_squared = after_squared = 0.0
    for name, tensor in found.items():
        assert tensor.dtype == F32
        layer = name.removesuffix(".weight")
        if layer not in moments:
            assert torch.equal(tensor, base[name].float())
            continue
        vector = tuned[name].float() - base[name].float()
        expected = by_inverse(vector, moments[layer], 3.0)
        torch.testing.assert_close((tensor - base[name].float()).double(), expected, rtol=1e-3, atol=1e-6)
        before_squared += float(vector.square().sum())
        after_squared += float(expected.square().sum())
    assert record.kept == pytest.approx((after_squared / before_squared) ** 0.5, rel=1e-4)
    assert 0 < record.kept < 1
    assert record.linear_maps == 14
    written = json.loads((tmp_path / "out/perta_precondition.json").read_text())
    assert (written["settings"]["mu"], written["retain"]["samples"]) == (3.0, 7)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def samples_of(job: Job, model: Any) -> list[Sample]:
    rows, _ = read_data(job.retain, None)
    return samples_for(Subject(model, tokenizer(), str(job.base)), rows, None)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_an_adapter_has_another_a(dtype: torch.dtype, tmp_path: Path) -> None:
    job = write_job(tmp_path, dtype)
    pf.tune(job.base, job.forget, tmp_path / "adapter", rank=3, epochs=2, lr=1e-2, progress=False)
    record = pf.precondition(job.base, tmp_path / "adapter", job.retain, tmp_path / "out", progress=False)
    old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    assert old.keys() == new.keys()
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=F32 if dtype == F16 else taken(dtype))
    moments = input_moments(model, linear_maps(model), samples_of(job, model))
    for name, tensor in new.items():
        if ".lora_B." in name:
            assert torch.equal(tensor, old[name])
            continue
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        expected = by_inverse(old[name], moments[layer], 10.0)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)
    assert 0 < record.kept < 1
    for name in ("adapter_config.json", "perta_tune.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    peft.PeftModel.from_pretrained(model, tmp_path / "out")


def test_adapter_and_merged_checkpoint_give_one_task_vector(tmp_path: Path) -> None:
    job = write_job(tmp_path, F32)
    pf.tune(job.base, job.forget, tmp_path / "adapter", rank=3, epochs=3, lr=1e-2, progress=False)
    merged = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(job.base), tmp_path / "adapter"
    ).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    kept = []
    for name in ("adapter", "merged"):
        record = pf.precondition(job.base, tmp_path / name, job.retain, tmp_path / f"{name}-out", progress=False)
        kept.append(record.kept)
    assert kept[0] == pytest.approx(kept[1], rel=1e-3)
    results = [
        pf.apply(job.model, job.base, tmp_path / f"{name}-out", rule="tv", lam=2.0, out=tmp_path / name / "o",
                 progress=False)
        for name in ("adapter", "merged")
    ]  # fmt: skip
    assert results[0].counts["subtracted"] == results[1].counts["subtracted"]
    first, second = (read_checkpoint(tmp_path / name / "o") for name in ("adapter", "merged"))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=1e-5)


def test_a_gpt2_keeps_its_transposed_matrices(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=0, bos_token_id=0)
    ).eval()
    retain = write_job(tmp_path / "job", F32).retain
    for name in ("base", "tuned"):
        if name == "tuned":
            nudge_(model, 3)
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    job = Job(tmp_path / "base", tmp_path / "base", tmp_path / "tuned", retain, retain)
    precondition(job, tmp_path / "out")
    base, tuned, found = (read_checkpoint(path) for path in (job.base, job.tuned, tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(job.base)
    moments = input_moments(loaded, linear_maps(loaded), samples_of(job, loaded))
    name = "transformer.h.0.mlp.c_proj"
    expected = by_inverse((tuned[f"{name}.weight"] - base[f"{name}.weight"]).T, moments[name], 10.0).T
    torch.testing.assert_close(
        (found[f"{name}.weight"] - base[f"{name}.weight"]).double(), expected, rtol=1e-3, atol=1e-6
    )
    assert torch.equal(found["transformer.wte.weight"], base["transformer.wte.weight"])


def test_the_result_changes_retained_rows_less(tmp_path: Path, job: Job) -> None:
    """At the strength at which both take steps of one size, the preconditioned one moves retained outputs less."""
    record = precondition(job, tmp_path / "out", mu=100.0)
    moved = []
    for tuned, lam in ((job.tuned, 1.0), (tmp_path / "out", 1 / record.kept)):
        out = tmp_path / f"result-{lam}"
        pf.apply(job.base, job.base, tuned, rule="tv", lam=lam, out=out, only=["*_proj*"], progress=False)
        before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (job.base, out))
        samples = samples_of(job, before)
        with torch.no_grad():
            moved.append(
                sum(
                    float((after(ids).logits - before(ids).logits).norm())
                    for sample in samples
                    for ids in [torch.tensor([sample.input_ids])]
                )
            )
    assert moved[1] < 0.7 * moved[0]


def test_only_the_record_of_theta_f_comes_along(tmp_path: Path, job: Job) -> None:
    (job.base / "perta_tune.json").write_text("of the base")
    precondition(job, tmp_path / "without")
    assert not (tmp_path / "without/perta_tune.json").exists()
    (job.tuned / "perta_tune.json").write_text("of theta_f")
    precondition(job, tmp_path / "with")
    assert (tmp_path / "with/perta_tune.json").read_text() == "of theta_f"


def test_unlearn_takes_the_result_and_verifies(tmp_path: Path, job: Job) -> None:
    precondition(job, tmp_path / "out")
    report = pf.unlearn(
        job.model, job.base, tmp_path / "out", job.forget, job.retain, rule="tv", lam=3.0, out=tmp_path / "unlearned",
        progress=False,
    )  # fmt: skip
    assert report.counts["subtracted"] > 0
    assert not pf.verify(tmp_path / "unlearned", full=True, progress=False).problems


def test_apply_says_by_which_rule_the_result_is_subtracted(tmp_path: Path, job: Job) -> None:
    precondition(job, tmp_path / "out")
    with pytest.raises(pf.InputError, match=r"out is preconditioned: subtract it with rule tv$"):
        pf.apply(job.model, job.base, tmp_path / "out", lam=8.0, out=tmp_path / "unlearned")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mu": ({"mu": -1.0}, "mu is -1.0; it must be a number from 0 to 10000"),
    "mu nan": ({"mu": math.nan}, "mu is nan"),
    "batch": ({"batch_size": 0}, "batch_size is 0"),
    "a limit without stream": ({"memory": 1 << 30}, "memory is for streamed runs; give stream too"),
    "no retain": ({"retain": "gone.jsonl"}, "gone.jsonl"),
    "no tuned": ({"tuned": "gone"}, "gone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments(case: str, job: Job, tmp_path: Path) -> None:
    changed, message = REFUSED[case]
    with pytest.raises(pf.InputError, match=message):
        precondition(job, tmp_path / "out", **changed)
    assert not (tmp_path / "out").exists()


def test_the_base_itself_has_no_task_vector(job: Job, tmp_path: Path) -> None:
    with pytest.raises(pf.InputError, match="it is the same checkpoint as base, so the task vector is zero"):
        precondition(job, tmp_path / "out", tuned=job.base)
    assert not (tmp_path / "out").exists()


def test_a_tuned_of_another_shape(job: Job, tmp_path: Path) -> None:
    other = write_job(tmp_path / "other", F32, intermediate_size=80)
    with pytest.raises(pf.InputError, match=r"down_proj.weight: shape \[32, 72\] in .*, \[32, 80\] in"):
        precondition(job, tmp_path / "out", tuned=other.tuned)
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_not_finite(job: Job, tmp_path: Path) -> None:
    weight = "model.layers.1.mlp.up_proj.weight"
    shard = next(path for path in job.base.glob("*.safetensors") if weight in load_file(path))
    tensors = load_file(shard)
    save_file(tensors | {weight: tensors[weight] * math.nan}, shard, {"format": "pt"})
    with pytest.raises(pf.PertaError, match=r"an input of model\.layers\.1\.mlp\.down_proj is not finite"):
        precondition(job, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_more_than_linear_maps(job: Job, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(job.base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    nudge_(adapted, 3)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(pf.InputError, match=r"embed_tokens.*which is not plain LoRA of a linear map"):
        precondition(job, tmp_path / "out", tuned=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


def test_command_line(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["precondition", f"--base={job.base}", f"--tuned={job.tuned}", f"--retain={job.retain}"]
    assert cli.main([*arguments, f"--out={tmp_path / 'out'}", "--mu=2"]) == 0
    printed = capsys.readouterr().out
    assert "of the norm of the task vector of 14 linear maps is left, by the inputs of 7 samples and mu 2" in printed
    assert f"written to {tmp_path / 'out'}" in printed
    assert cli.main([*arguments, f"--out={tmp_path / 'out'}"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*arguments, f"--out={tmp_path / 'out'}", "--overwrite", "--quiet"]) == 0
    assert cli.main([*arguments, f"--out={job.base}", "--overwrite"]) == 2
    assert cli.main([*arguments, "--out=x", "--show-labels=1"]) == 0


def test_an_interrupt_leaves_nothing(job: Job, tmp_path: Path) -> None:
    def stop(event: pf.Event) -> None:
        if event.phase == "inputs of linear maps" and event.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precondition(job, tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_streamed_moments_are_the_same_bits(family: str, tmp_path: Path) -> None:
    model = build(next(row for row in FAMILIES if row.name == family), 1)
    model.save_pretrained(tmp_path / "model")
    samples = draw_samples(17, vocabulary=100)
    skeleton = Skeleton.open(tmp_path / "model", torch.device("cpu"), None)
    maps, steps = linear_maps(skeleton.model, adapted=False), []
    found: dict[str, Tensor] = {}
    for moments in layer_moments(skeleton, maps, samples, 4, ScratchFiles(tmp_path / "scratch"), steps.append):
        found |= moments
    assert sum(steps) == 17 * (len(skeleton.layers) + 1)
    expected = input_moments(model, linear_maps(model, adapted=False), samples, 4)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("adapted", [False, True])
def test_streamed_it_has_the_same_values(adapted: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", dtype)
    if adapted:
        pf.tune(job.base, job.forget, tmp_path / "adapter", rank=3, epochs=2, lr=1e-2, progress=False)
        job = Job(job.model, job.base, tmp_path / "adapter", job.forget, job.retain)
    whole, streamed = (
        precondition(job, tmp_path / name, model=job.model, stream=name == "streamed") for name in ("whole", "streamed")
    )
    if adapted:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()
    else:
        one, other = (read_checkpoint(tmp_path / name) for name in ("whole", "streamed"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert (tmp_path / "whole/config.json").read_bytes() == (tmp_path / "streamed/config.json").read_bytes()
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "streamed").dtype == F32
    assert streamed.kept == pytest.approx(whole.kept, rel=1e-6)
    assert not (tmp_path / "streamed/scratch").exists()


@pytest.mark.parametrize("name", ["Mixtral", "GPT-2", "Gemma 3 (text)", "DeepSeek-V2"])
def test_streamed_checkpoints_of_families(name: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    base, tuned = (write(build(family, seed), tmp_path / str(seed)) for seed in (1, 2))
    retain = write_lines(tmp_path / "retain.jsonl", RETAIN)
    for name in ("whole", "streamed"):
        pf.precondition(base, tuned, retain, tmp_path / name, stream=name == "streamed", progress=False)
    one, other = (read_checkpoint(tmp_path / name) for name in ("whole", "streamed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_theta_f_that_is_not_finite(adapted: bool, stream: bool, job: Job, tmp_path: Path) -> None:
    tuned, weight = job.tuned, "model.layers.1.mlp.up_proj.weight"
    if adapted:
        tuned, weight = tmp_path / "job/adapter", "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
        pf.tune(job.base, job.forget, tuned, rank=2, epochs=1, progress=False)
    shard = next(path for path in tuned.glob("*.safetensors") if weight in load_file(path))
    tensors = load_file(shard)
    tensors[weight][0, 0] = math.inf
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(pf.InputError, match=rf"tensor {weight}.* has NaN or infinite values"):
        precondition(job, tmp_path / "out", tuned=tuned, stream=stream)
    assert not (tmp_path / "out").exists()


def test_dense_layers_and_shared_experts_of_mixtures_are_changed(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "DeepSeek-V3, yarn")
    base, tuned = (write(build(family, seed), tmp_path / str(seed)) for seed in (1, 2))
    pf.precondition(base, tuned, write_lines(tmp_path / "r.jsonl", RETAIN), tmp_path / "out", progress=False)
    old, new = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    for name in old:
        if "shared_experts" in name or ".layers.0.mlp.down_proj" in name:
            assert not torch.equal(old[name].float(), new[name]), name
    assert any("shared_experts" in name for name in old)


@pytest.mark.parametrize("stream", [False, True])
def test_a_vocabulary_that_tuning_has_grown(stream: bool, job: Job, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(job.tuned)
    model.resize_token_embeddings(len(model.get_input_embeddings().weight) + 10)
    model.save_pretrained(tmp_path / "job/grown")
    tokenizer().save_pretrained(tmp_path / "job/grown")
    precondition(job, tmp_path / "plain")
    precondition(job, tmp_path / "grown", tuned=tmp_path / "job/grown", stream=stream)
    one, other = read_checkpoint(tmp_path / "plain"), read_checkpoint(tmp_path / "grown")
    assert all(torch.equal(one[name], other[name]) for name in one)
