"""Importance against torch.autograd.grad in float64, one unpadded sample at a time, on eight model families."""

import copy
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from perta_fast import Importance, InputError, RunError, estimate_importance
from perta_fast.data.batches import Batch
from perta_fast.data.samples import IGNORED, Sample
from perta_fast.models.losses import per_sample_losses
from perta_fast.runs import estimate
from tests.families.configs import GPT2_SIZES, SIZES
from tests.support.children import run_child
from tests.support.models import CHAT_TEMPLATE, FORGET, Job, draw_samples, llama, nudge_, taken, tokenizer, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = draw_samples(11)
BY_FAMILY: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: llama(),
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=8, **SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=4, head_dim=8, **SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(head_dim=8, **SIZES)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)),
    "mixtral": lambda: mixtral(),
}

Tensors = Mapping[str, torch.Tensor]


def mixtral(**changes: Any) -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(num_local_experts=8, num_experts_per_tok=2, **SIZES | changes))


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(7)
    model = BY_FAMILY[family]()
    nudge_(model, 3, 0.05)  # norms and biases start at one and zero, where mistakes may hide
    return model.eval()


def importance(model: Any, data: Any = SAMPLES, estimator: Any = "grad", **settings: Any) -> Importance:
    return estimate_importance(model, data, estimator, progress=False, **settings)


def by_autograd(model: PreTrainedModel, samples: list[Sample]) -> tuple[Tensors, Tensors]:
    """Mean gradient and mean squared gradient of each parameter, in float64."""
    exact = copy.deepcopy(model).double()
    if model.config.model_type == "mixtral":
        exact.set_experts_implementation("eager")  # the others know no float64
    parameters = dict(exact.named_parameters())
    means = {name: torch.zeros_like(each) for name, each in parameters.items()}
    squares = {name: torch.zeros_like(each) for name, each in parameters.items()}
    for sample in samples:
        logits = exact(input_ids=torch.tensor([sample.input_ids])).logits[0].log_softmax(-1)
        places = [place for place, label in enumerate(sample.labels) if place > 0 and label != IGNORED]
        loss = -torch.stack([logits[place - 1, sample.labels[place]] for place in places]).mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                means[name] += gradient / len(samples)
                squares[name] += gradient.square() / len(samples)
    return means, squares


@torch.no_grad()
def saved(model: PreTrainedModel, values: Tensors, folder: Path) -> dict[str, torch.Tensor]:
    """``values`` under the names that transformers gives them on disk: it saves a model made of them."""
    stand_in = copy.deepcopy(model).double()
    for name, parameter in stand_in.named_parameters():
        parameter.copy_(values[name])
    stand_in.save_pretrained(folder)
    names = dict(stand_in.named_buffers())
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name not in names}


def assert_near(found: Tensors, expected: Tensors, tolerance: float = 1e-5) -> None:
    """The same names, and each tensor's error small beside its norm."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        error = (tensor.double() - expected[name].double()).norm()
        assert error <= tolerance * expected[name].double().norm(), name


def assert_same(found: Importance, expected: Importance) -> None:
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in found.tensors)


# The values.


@pytest.mark.parametrize("family", BY_FAMILY)
def test_against_autograd(family: str, tmp_path: Path) -> None:
    """Both estimators, and for the mean gradient batches of 1 and of 8 with padding, which must not matter."""
    model = make(family)
    means, squares = by_autograd(model, SAMPLES)
    means, squares = saved(model, means, tmp_path / "means"), saved(model, squares, tmp_path / "squares")
    alone, together = (importance(model, batch_size=size).tensors for size in (1, 8))
    assert_near(alone, means)
    assert_near(together, means)
    assert_near(together, alone)
    assert_near(importance(model, estimator="empirical-fisher").tensors, squares)


def test_tied_weights_count_once() -> None:
    tied = make("llama tied")
    assert "lm_head.weight" not in importance(tied).tensors
    untied = llama()
    untied.load_state_dict(tied.state_dict())
    apart = importance(untied, SAMPLES[:1]).tensors
    squares = importance(tied, SAMPLES[:1], "empirical-fisher").tensors
    expected = (apart["model.embed_tokens.weight"] + apart["lm_head.weight"]).square()
    assert_near({"both": squares["model.embed_tokens.weight"]}, {"both": expected})


def test_bfloat16_is_accumulated_in_float32() -> None:
    """The same bits as autograd's bfloat16 gradients of each sample, added in float32."""
    model = llama().bfloat16().eval()
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros(each.shape) for name, each in parameters.items()}
    for sample in sorted(SAMPLES, key=lambda sample: -len(sample.input_ids)):
        loss = per_sample_losses(model, Batch.of([sample])).sum()
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            assert gradient.dtype == torch.bfloat16
            sums[name] += gradient
    found = importance(model, batch_size=1).tensors
    assert all(torch.equal(found[name], sums[name] / len(SAMPLES)) for name in sums)


def test_router_loss_takes_no_part() -> None:
    plain, with_router_loss = (
        mixtral(**each) for each in ({}, {"output_router_logits": True, "router_aux_loss_coef": 9.0})
    )
    with_router_loss.load_state_dict(plain.state_dict())
    assert_same(importance(with_router_loss), importance(plain))


@pytest.mark.parametrize("estimator", ["grad", "empirical-fisher"])
def test_experts_that_no_token_reached_have_no_importance(estimator: str) -> None:
    model = mixtral(num_hidden_layers=1).eval()
    sample = Sample((5, 6, 7), (IGNORED, 6, 7))
    chosen: list[torch.Tensor] = []
    router = model.model.layers[0].mlp.gate
    handle = router.register_forward_hook(lambda module, inputs, outputs: chosen.append(outputs[-1]))
    found = importance(model, [sample], estimator).tensors
    handle.remove()
    reached = set(chosen[0][:2].flatten().tolist())  # nothing is learned from the last token's output
    assert 0 < len(reached) < 8
    experts = {name: tensor for name, tensor in found.items() if ".experts." in name}
    assert len(experts) == 8 * 3
    for name, tensor in experts.items():
        assert bool(tensor.any()) == (int(name.split(".experts.")[1].split(".")[0]) in reached), name


@pytest.mark.parametrize("estimator", ["grad", "empirical-fisher"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing(estimator: str) -> None:
    model = make("llama")
    expected = importance(model, estimator=estimator)
    model.gradient_checkpointing_enable()
    assert_same(importance(model.train(), estimator=estimator), expected)


class Bare(nn.Module):
    """A model of no library: an embedding and a head."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(300, 8, sparse=sparse)
        self.head = nn.Linear(8, 300)

    def forward(self, **inputs: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.embedding(inputs["input_ids"])))


@pytest.mark.parametrize("estimator", ["grad", "empirical-fisher"])
def test_sparse_gradients(estimator: str) -> None:
    found, expected = (importance(Bare(sparse), estimator=estimator) for sparse in (True, False))
    assert_near(found.tensors, expected.tensors, 1e-6)
    assert found.tensors["embedding.weight"].layout == torch.strided


def test_frozen_parameters_are_left_out() -> None:
    model = make("llama")
    expected = importance(model).tensors
    frozen = {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    found = importance(model).tensors
    assert found.keys() == expected.keys() - frozen
    assert_near(found, {name: expected[name] for name in found}, 1e-6)


# What it leaves behind.


def test_dropout_is_off_and_modes_are_put_back() -> None:
    torch.manual_seed(2)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5, **GPT2_SIZES))
    expected = importance(model.eval())
    model.train()
    model.transformer.h[1].eval()
    modes = {name: part.training for name, part in model.named_modules()}
    assert_same(importance(model), expected)
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert set(modes.values()) == {True, False}


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_and_hooks_are_put_back(fails: bool) -> None:
    model = make("llama").train()
    kept = {}
    for k, (name, parameter) in enumerate(model.named_parameters()):
        parameter.grad = torch.full_like(parameter, k) if k % 2 else None
        kept[name] = parameter.grad
    if fails:
        with torch.no_grad():
            model.lm_head.weight[7] = float("nan")
        with pytest.raises(RunError):
            importance(model)
    else:
        importance(model)
    for k, (name, parameter) in enumerate(model.named_parameters()):
        assert parameter.grad is kept[name]
        assert parameter.grad is None or bool((parameter.grad == k).all())
        assert not parameter._post_accumulate_grad_hooks
    assert all(part.training for part in model.modules())
    assert torch.is_grad_enabled()


def test_a_gradient_is_freed_before_the_next_one_is_complete() -> None:
    model = make("llama")
    alive: list[int] = []
    parameters = list(model.parameters())
    handles = [
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(each.grad is not None for each in parameters))
        )
        for parameter in parameters
    ]
    importance(model, batch_size=4)
    for handle in handles:
        handle.remove()
    assert len(alive) == 3 * len(parameters)  # one for each parameter and each of three batches
    assert set(alive) == {1}
    assert all(parameter.grad is None for parameter in parameters)


def test_no_grad_around_it_does_not_matter() -> None:
    expected = importance(make("llama"))
    with torch.no_grad():
        assert_same(importance(make("llama")), expected)
        assert not torch.is_grad_enabled()


def test_peak_memory() -> None:
    """At most weights, accumulators, one layer's gradients and activations, in a process of its own."""
    command = [sys.executable, "-m", "tests.importance.peak_memory"]
    root = Path(__file__).parents[2]
    process = run_child(command, cwd=root)
    assert process.returncode == 0, process.stderr
    peak, bound, plain = map(int, process.stdout.split())
    assert peak <= bound
    assert plain > bound  # an ordinary backward pass, which keeps every gradient, is found out


# The data.


def test_forms_of_the_same_data(tmp_path: Path) -> None:
    model, words = make("llama"), tokenizer()
    path = write_lines(tmp_path / "data.jsonl", FORGET)
    from_file = importance(model, path, tokenizer=words)
    for same in (str(path), FORGET, tuple(FORGET), (row for row in FORGET)):
        found = importance(model, same, tokenizer=words)
        assert_same(found, from_file)
        assert found.metadata.label_count == from_file.metadata.label_count
    metadata = from_file.metadata
    assert metadata.data_hash == blake3(path.read_bytes()).hexdigest()
    assert (metadata.sample_count, metadata.truncated_count) == (len(FORGET), 0)
    answers = sum(len(words(f" {row['answer']}")["input_ids"]) + 1 for row in FORGET)
    assert (metadata.label_count, metadata.evaluated_at) == (answers, "live module")
    assert metadata.estimator == "grad"
    # Another tokenizer, other tokens; other rows, another hash.
    assert importance(model, path, tokenizer=tokenizer(CHAT_TEMPLATE)).metadata.label_count != answers
    hashes = {importance(model, rows, tokenizer=words).metadata.data_hash for rows in (FORGET, FORGET[1:])}
    assert len(hashes) == 2


def test_samples_as_tokens() -> None:
    model = make("llama")
    found = importance(model, SAMPLES, "empirical-fisher").metadata
    labels = sum(label != IGNORED for sample in SAMPLES for label in sample.labels[1:])
    assert (found.sample_count, found.label_count, found.estimator) == (11, labels, "empirical-fisher")


@pytest.mark.parametrize(("max_length", "cut"), [(None, 1), (1000, 1), (100, 1), (40, 3)])
def test_cut_samples_are_counted(max_length: int | None, cut: int) -> None:
    """A limit beyond the model's own is the model's own, 128 positions."""
    words = tokenizer()
    rows = [{"text": "author " * count} for count in (3, 10, 11, 200)]
    lengths = [len(words(row["text"])["input_ids"]) for row in rows]
    limit = min(max_length or 128, 128)
    assert sum(length > limit for length in lengths) == cut
    found = importance(make("llama"), rows, tokenizer=words, max_length=max_length).metadata
    assert found.truncated_count == cut
    assert found.label_count == sum(min(length, limit) - 1 for length in lengths)


# Checkpoints.


def test_a_checkpoint_as_the_module_loaded_from_it(job: Job, tmp_path: Path) -> None:
    found = importance(job.base, job.forget, out=tmp_path / "saved")
    module = AutoModelForCausalLM.from_pretrained(job.base, dtype=taken(torch.bfloat16))
    assert_same(found, importance(module, job.forget, tokenizer=tokenizer()))
    assert_same(Importance.load(tmp_path / "saved"), found)
    assert found.metadata.evaluated_at == str(job.base.resolve())
    wide = importance(job.base, job.forget, dtype=torch.float32)
    assert_same(wide, importance(module.float(), job.forget, tokenizer=tokenizer()))


def test_a_checkpoint_whose_names_transformers_changes_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one with the experts of one layer stored joined, as they are in memory, and those of another apart."""
    model = mixtral()
    model.save_pretrained(tmp_path)
    path, joined = tmp_path / "model.safetensors", "model.layers.0.mlp.experts."
    tensors = {name: tensor for name, tensor in load_file(path).items() if ".layers.0." not in name}
    assert any(name.startswith(joined) for name in model.state_dict())
    save_file(tensors | {n: t for n, t in model.state_dict().items() if ".layers.0." in n}, path, {"format": "pt"})
    tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(estimate, "accumulate", None)
    with pytest.raises(
        InputError, match=r"lacks tensor model\.layers\.0\..*experts\.0\.w1\.weight, the name that .*save it anew"
    ):
        importance(tmp_path, FORGET)


def test_a_checkpoint_without_the_prefix_of_its_names_is_taken(tmp_path: Path) -> None:
    """As the first GPT-2 checkpoints, which lack the prefix that the model gives to all names now."""
    GPT2Model(GPT2Config(**GPT2_SIZES)).save_pretrained(tmp_path / "old")
    tokenizer().save_pretrained(tmp_path / "old")
    GPT2LMHeadModel.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    tokenizer().save_pretrained(tmp_path / "new")
    old, new = (importance(tmp_path / name, FORGET) for name in ("old", "new"))
    assert old.tensors.keys() == new.tensors.keys()
    assert all(torch.equal(old.tensors[name], tensor) for name, tensor in new.tensors.items())


# Refusals.


class Unconnected(Bare):
    """Its logits do not depend on its parameters as far as autograd knows."""

    @torch.no_grad()
    def forward(self, **inputs: Any) -> Any:
        return super().forward(**inputs)


class Steep(Bare):
    """A finite loss with a gradient that is not a number."""

    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.logits = output.logits + (self.head.bias * 0).sqrt().sum() * 0
        return output


def with_nan() -> PreTrainedModel:
    model = make("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[299] = float("nan")
    return model


OTHERS = [Sample((4, 5), (4, 5))]
REFUSED: dict[str, tuple[Callable[[], Any], Any, dict[str, Any], type[Exception], str]] = {
    "unknown estimator": (llama, SAMPLES, {"estimator": "fisher"}, InputError, "must be one of grad, emp"),
    "no batch": (llama, SAMPLES, {"batch_size": 0}, InputError, "batch_size is 0"),
    "no length": (llama, FORGET, {"max_length": 0}, InputError, "max_length is 0"),
    "negative length": (llama, FORGET, {"max_length": -1}, InputError, "max_length is -1"),
    "a limit without stream": (llama, SAMPLES, {"device_memory": 1 << 30}, InputError, "is for streamed runs"),
    "device for a module": (llama, SAMPLES, {"device": "cpu"}, InputError, "are for checkpoints"),
    "no samples": (llama, [], {}, InputError, "there are no samples"),
    "records without a tokenizer": (llama, FORGET, {}, InputError, "pass tokenizer="),
    "samples and records": (llama, [*OTHERS, *FORGET], {}, InputError, "sample 0: is not a JSON object"),
    "an object for rows": (llama, {"text": "a"}, {}, InputError, "sample 0: is not a JSON object"),
    "fewer labels than tokens": (llama, [*OTHERS, Sample((4, 5), (4,))], {}, InputError, "1: needs one label"),
    "labels of other tokens": (llama, [Sample((4, 5), (4, 6))], {}, InputError, "sample 0: needs one label"),
    "no labels": (llama, [*OTHERS, Sample((4, 5), (4, IGNORED))], {}, InputError, "sample 1: has no token"),
    "unknown token": (llama, [*OTHERS, Sample((4, 300), (4, 300))], {}, InputError, "1: has tokens from 4 to"),
    "negative token": (llama, [Sample((-1, 4), (IGNORED, 4))], {}, InputError, "has tokens from -1 to 4"),
    "too long": (llama, [Sample((4,) * 129, (4,) * 129)], {}, InputError, "129 tokens, the model takes 128"),
    "meta device": (lambda: llama().to("meta"), SAMPLES, {}, InputError, "is on the meta device"),
    "float64": (lambda: llama().double(), SAMPLES, {}, InputError, "embed_tokens.weight is torch.float64"),
    "all frozen": (lambda: llama().requires_grad_(False), SAMPLES, {}, InputError, "no floating-point"),
    "no parameters": (nn.Module, SAMPLES, {}, InputError, "no floating-point parameter"),
    "no gradient": (Unconnected, SAMPLES, {}, InputError, "loss has no gradient"),
    "loss not finite": (
        with_nan, [*OTHERS * 2, Sample((299, 5, 6), (299, 5, 6)), *OTHERS], {}, RunError, "loss of sample 2 ",
    ),
    "gradient not finite": (Steep, SAMPLES, {}, RunError, "importance of head.bias is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, tmp_path: Path) -> None:
    model, data, settings, kind, reason = REFUSED[case]
    with pytest.raises(kind, match=reason):
        importance(model(), data, out=tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_tokens_of_another_tokenizer_name_the_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [{"text": "a b"}, {"text": "a zyx"}])
    larger = tokenizer()
    larger.add_tokens(["zyx"])
    with pytest.raises(InputError, match=r"data\.jsonl, line 2: has tokens from .* to 300.*own tokenizer"):
        importance(make("llama"), path, tokenizer=larger)


@pytest.mark.parametrize(
    ("device", "reason"), [("tpu9", "none of auto, cpu, cuda or cuda:N"), (torch.device("meta"), "cannot be computed")]
)
def test_devices_that_do_not_serve(device: str | torch.device, reason: str, job: Job) -> None:
    with pytest.raises(InputError, match=rf"device {re.escape(repr(device))}.*{reason}"):
        importance(job.base, job.forget, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(job: Job) -> None:
    with pytest.raises(InputError, match="torch finds no CUDA device"):
        importance(job.base, job.forget, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("estimator", ["grad", "empirical-fisher"])
def test_cuda(estimator: str) -> None:
    expected = importance(make("llama"), estimator=estimator).tensors
    found = importance(make("llama").cuda(), estimator=estimator).tensors
    assert_near({name: tensor.cpu() for name, tensor in found.items()}, expected, 1e-4)
