"""Per-sample Fisher from batches: against autograd one sample at a time, for models and for awkward modules."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune, weight_norm
from torch.utils.checkpoint import checkpoint
from transformers import (
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from perta_fast.data.batches import Batch
from perta_fast.data.samples import Sample
from perta_fast.errors import RunError
from perta_fast.importance import per_sample_modules
from perta_fast.importance.batch_shape import BatchShape, Layout, UnexpectedCall
from perta_fast.importance.gradients import Accumulated, accumulate
from perta_fast.importance.per_sample import plan_for, probe_inputs
from perta_fast.importance.per_sample_modules import EmbeddingFisher, LinearFisher, LoopFisher, Target
from perta_fast.models.losses import per_sample_losses
from perta_fast.rules import Estimator
from perta_fast.streaming.forecast.trial import LiveBytes
from tests.families.configs import SIZES
from tests.support.models import draw_samples, llama, nudge_

SAMPLES = draw_samples(9, longest=14)
FEWER = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
# Families that test_estimate.py leaves out.
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES),
    "gemma2": Gemma2Config(head_dim=8, **SIZES),
    "gemma3": Gemma3TextConfig(head_dim=8, **SIZES),
    "phi3": Phi3Config(**SIZES),
    "gpt-neox": GPTNeoXConfig(**FEWER),
    "olmo2": Olmo2Config(**SIZES),
    "falcon": FalconConfig(
        **{name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    ),
    "qwen3 moe": Qwen3MoeConfig(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, **SIZES),
    "deepseek v3": DeepseekV3Config(
        n_routed_experts=8,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        n_group=2,
        topk_group=1,
        **SIZES | {"num_key_value_heads": 4},
    ),
}


def loop(model: nn.Module, samples: list[Sample] = SAMPLES) -> dict[str, Tensor]:
    """Squares of each sample's own gradient, by plain autograd, averaged."""
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    means = {name: torch.zeros_like(each, dtype=torch.float64) for name, each in parameters.items()}
    model.eval()
    for sample in samples:
        model.zero_grad()
        per_sample_losses(model, Batch.of([sample])).sum().backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                means[name] += parameter.grad.to_dense().double().square() / len(samples)
    model.zero_grad()
    return means


def fused(model: nn.Module, batch_size: int = 4) -> Accumulated:
    return accumulate(model, SAMPLES, "empirical-fisher", batch_size, progress=False)


def assert_equals_loop(model: nn.Module, *, one_by_one: tuple[str, ...] = ()) -> None:
    """Every parameter agrees, and only those named took a pass for each sample."""
    found = fused(model)
    assert tuple(found.one_by_one) == one_by_one
    expected = loop(model)
    assert found.means.keys() == expected.keys()
    for name, mean in found.means.items():
        assert (mean - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("family", CONFIGS)
def test_families(family: str) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).float()
    nudge_(model, 3, 0.05)
    assert_equals_loop(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [False, True])
def test_attention_and_tied_weights(attention: str, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied, attn_implementation=attention)
    nudge_(model, 3, 0.05)
    assert_equals_loop(model)


def test_the_mean_gradient_comes_from_the_same_pass() -> None:
    model = llama(tie_word_embeddings=True)
    nudge_(model, 3, 0.05)
    expected = accumulate(model, SAMPLES, "grad", 4, progress=False).means
    targets = {name: Target(torch.zeros_like(mean), torch.zeros_like(mean)) for name, mean in expected.items()}
    plan = plan_for(model, SAMPLES, targets)
    with plan.installed(model), plan.batch([len(sample.input_ids) for sample in SAMPLES]):
        per_sample_losses(model, Batch.of(SAMPLES)).sum().backward()
    for name, target in targets.items():
        assert target.gradient is not None
        wanted = expected[name] * len(SAMPLES)
        assert (target.gradient - wanted).norm() <= 1e-5 * wanted.norm(), name


class Small(nn.Module):
    """A model of a few modules; subclasses say what happens between embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(300, 12)
        self.head = nn.Linear(12, 300)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.head(self.middle(self.embed(input_ids))))

    def middle(self, hidden: Tensor) -> Tensor:
        return hidden


class CalledTwice(Small):
    """One linear map and one norm, each used by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.norm = nn.Linear(12, 12), nn.LayerNorm(12)

    def middle(self, hidden: Tensor) -> Tensor:
        for _ in range(2):
            hidden = hidden + self.map(self.norm(hidden)).tanh()
        return hidden


class SharedByTwo(Small):
    """Two linear maps with one weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight

    def middle(self, hidden: Tensor) -> Tensor:
        return self.second(self.first(hidden).tanh())


class OfItsOwn(Small):
    """A parameter beside parts that have their own, and one that the forward reads from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(12))
        self.map = nn.Linear(12, 12)

    def middle(self, hidden: Tensor) -> Tensor:
        return self.map(hidden * self.gain)


class Mixing(nn.Module):
    """A matrix and a vector used in no usual way, on (N, T, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.randn(12, 12)), nn.Parameter(torch.randn(12))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.einsum("ntd,de->nte", hidden.cumsum(1), self.matrix).tanh() * self.vector


class Strange(Small):
    """A module that no ModuleFisher knows by its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = Mixing()

    def middle(self, hidden: Tensor) -> Tensor:
        return self.mixing(hidden)


class Transposed(Small):
    """A linear map on (T, N, d), whose rows cannot be told apart by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(12, 12, bias=False)

    def middle(self, hidden: Tensor) -> Tensor:
        return self.map(hidden.transpose(0, 1)).transpose(0, 1)


class Flat(Small):
    """Linear maps and a norm on (N * T, d), and on (N, T, heads, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.heads = nn.Linear(12, 12), nn.Linear(3, 3)
        self.norm, self.head_norm = nn.LayerNorm(12), nn.RMSNorm(3)

    def middle(self, hidden: Tensor) -> Tensor:
        rows = self.norm(self.flat(hidden.flatten(0, 1))).view(hidden.shape)
        return self.head_norm(self.heads(rows.view(*hidden.shape[:2], 4, 3))).flatten(2)


class Gated(nn.Module):
    """A scale on rows of any number."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(width))
        self.gains: list[Tensor] = []

    def forward(self, rows: Tensor) -> Tensor:
        return rows * (self.gains[0] if self.gains else self.gain)


class RowsOfHeads(Small):
    """A scale on (N * T * heads, d), whose first dimension is no batch, as in linear attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = Gated()

    def middle(self, hidden: Tensor) -> Tensor:
        return self.gated(hidden.reshape(-1, 3)).view(hidden.shape)


class Unused(Small):
    """A part that no forward pass reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(12, 12, bias=False)


class PaddingVector(Small):
    """An embedding with a vector that takes no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 12, padding_idx=SAMPLES[0].input_ids[0])


class SparseEmbedding(Small):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 12, sparse=True)


class Checkpointed(CalledTwice):
    """Activations computed again in the backward pass."""

    reentrant = False

    def middle(self, hidden: Tensor) -> Tensor:
        result = checkpoint(super().middle, hidden, use_reentrant=self.reentrant)
        assert isinstance(result, Tensor)
        return result


class CheckpointedTheOldWay(Checkpointed):
    """The same, by a backward pass within the backward pass."""

    reentrant = True


class HeadByHand(Small):
    """The embedding's weight as the head, without a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=functional.linear(self.embed(input_ids).cumsum(1), self.embed.weight))


class UsedByHand(Small):
    """A matrix and a scale that are used by their modules and by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.norm = nn.Linear(12, 12), nn.LayerNorm(12)

    def middle(self, hidden: Tensor) -> Tensor:
        return self.map(self.norm(hidden)).tanh() @ self.map.weight * self.norm.weight


class UsedByHandInCheckpoint(UsedByHand):
    """The same, in a part whose activations are computed again the old way."""

    def middle(self, hidden: Tensor) -> Tensor:
        result = checkpoint(super().middle, hidden, use_reentrant=True)
        assert isinstance(result, Tensor)
        return result


class UsedByHook(Small):
    """A scale that a hook of its own module uses again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.norm.register_forward_hook(lambda _module, _arguments, result: result * self.norm.weight)

    def middle(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)


class CalledDirectly(Small):
    """A linear map that is called a second time by its forward, which calls no hook."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(12, 12, bias=False)

    def middle(self, hidden: Tensor) -> Tensor:
        return self.map.forward(self.map(hidden).tanh())


class Listed(Small):
    """A module that reads its vector from a list, where no copy can be put in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = Gated(12)
        self.gated.gains = [self.gated.gain]

    def middle(self, hidden: Tensor) -> Tensor:
        return self.gated(hidden)


class Made(Small):
    """Weights that hooks make of other parameters: a pruned linear map, a pruned norm, a map in polar form."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.norm = nn.Linear(12, 12, bias=False), nn.LayerNorm(12)
        prune.random_unstructured(self.map, "weight", 0.3)
        prune.random_unstructured(self.norm, "weight", 0.3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # there is a new way, and this one is still in use
            self.polar = weight_norm(nn.Linear(12, 12, bias=False))

    def middle(self, hidden: Tensor) -> Tensor:
        return self.polar(self.map(self.norm(hidden)).tanh())


class PrunedEmbedding(Small):
    """A table that a hook makes of another one."""

    def __init__(self) -> None:
        super().__init__()
        prune.random_unstructured(self.embed, "weight", 0.3)


class HeadsFirst(Small):
    """A linear map on (N, heads, T, d): where a batch has as many tokens as heads, its sizes do not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 3, bias=False)

    def middle(self, hidden: Tensor) -> Tensor:
        heads = hidden.unflatten(-1, (4, 3)).transpose(1, 2).contiguous()
        return self.map(heads).transpose(1, 2).flatten(2)


class Shared(nn.Module):
    """A scale on (N, T, d), and a table that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.randn(4, 3))

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        return (hidden.unflatten(-1, (4, 3)) * self.gains * table[:, None]).flatten(2)


class SharedTable(Small):
    """A module that is given as many rows of a table as a batch has samples."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Shared()

    def middle(self, hidden: Tensor) -> Tensor:
        return self.shared(hidden, torch.arange(1.0, 5.0))


class Steps(Small):
    """A recurrent map, called for each token on (N, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(12, 12)

    def middle(self, hidden: Tensor) -> Tensor:
        states = [torch.zeros_like(hidden[:, 0])]
        for token in hidden.unbind(1):
            states.append(self.map(states[-1] + token).tanh())
        return torch.stack(states[1:], 1)


@pytest.mark.parametrize(
    ("kind", "one_by_one"),
    [
        (Small, ()),
        (CalledTwice, ()),
        (SharedByTwo, ()),
        (OfItsOwn, ("gain",)),
        (Strange, ()),
        (Transposed, ("map.weight",)),
        (Flat, ()),
        (RowsOfHeads, ("gated.gain",)),
        (Unused, ("idle.weight",)),
        (PaddingVector, ()),
        (SparseEmbedding, ()),
        (Checkpointed, ()),
        (CheckpointedTheOldWay, ()),
        (HeadByHand, ("embed.weight",)),
        (UsedByHand, ("map.weight", "norm.weight")),
        (UsedByHandInCheckpoint, ("map.weight", "norm.weight")),
        (UsedByHook, ("norm.weight",)),
        (CalledDirectly, ("map.weight",)),
        (Listed, ("gated.gain",)),
        (Made, ("map.weight_orig", "norm.weight_orig", "polar.weight_g", "polar.weight_v")),
        (PrunedEmbedding, ("embed.weight_orig",)),
        (SharedTable, ()),
        (Steps, ()),
    ],
)
def test_modules(kind: type[Small], one_by_one: tuple[str, ...]) -> None:
    assert_equals_loop(kind(), one_by_one=one_by_one)


def test_as_many_tokens_as_heads() -> None:
    model, samples = HeadsFirst(), [Sample(ids, ids) for ids in ((1, 2, 3, 4), (5, 6, 7), (8, 9))]
    found, expected = accumulate(model, samples, "empirical-fisher", 3, progress=False), loop(model, samples)
    assert not found.one_by_one
    for name, mean in found.means.items():
        assert (mean - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


class Experts(Small):
    """Linear maps and norms, each on the tokens that choose it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.RMSNorm(12), nn.Linear(12, 12)) for _ in range(4))

    def middle(self, hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, 1)
        chosen = self.choose(rows)
        result = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            of_expert = (chosen == number).nonzero()[:, 0]
            result = result.index_add(0, of_expert, expert(rows[of_expert]))
        return result.view_as(hidden)

    def choose(self, rows: Tensor) -> Tensor:
        return rows[:, :4].argmax(-1)


class ExpertsAsProbed(Experts):
    """The first expert gets as many tokens as a probe has samples, in both probes; the second all others."""

    def choose(self, rows: Tensor) -> Tensor:
        first = {35: 5, 34: 17}.get(len(rows), len(rows) // 3)
        return (torch.arange(len(rows)) >= first).long()


def test_an_expert_gets_as_many_tokens_as_a_probe_has_samples() -> None:
    model = Experts()
    every = tuple(name for name, _ in model.named_parameters() if name.startswith("experts"))
    counts = []
    for seed in range(300):
        torch.manual_seed(seed)
        model.embed.weight.data.normal_()
        ids = probe_inputs(SAMPLES)[0]
        counts.append(model.choose(model.embed(ids).flatten(0, 1)).bincount(minlength=4).tolist())
        if 5 in counts[-1]:
            break
    assert 5 in counts[-1]
    assert_equals_loop(model, one_by_one=every)


def test_a_call_unlike_those_of_the_probes() -> None:
    model = ExpertsAsProbed()
    with pytest.raises(RunError, match=r"^module experts\.0\.0 is called otherwise .* set batch_size to 1$"):
        fused(model)
    found, expected = fused(model, batch_size=1), loop(model)
    assert "experts.0.1.weight" not in found.one_by_one
    for name, mean in found.means.items():
        assert (mean - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("estimator", ["grad", "empirical-fisher"])
def test_layers_checkpoint_when_told_to(estimator: Estimator, reentrant: bool) -> None:
    model = llama()
    expected = accumulate(model, SAMPLES, estimator, len(SAMPLES), progress=False).means
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    modes = {part: part.training for part in model.modules()}
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    means = accumulate(model, SAMPLES, estimator, len(SAMPLES), progress=False).means
    assert calls.count(True) >= (1 if reentrant else 2)  # the old way's first pass keeps no graph
    assert len(calls) == (2 if estimator == "grad" else 4)  # two more for the probes
    assert {part: part.training for part in model.modules()} == modes
    for name, mean in means.items():
        assert (mean - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


def test_dropout_stays_off_under_checkpointing() -> None:
    model = llama(attention_dropout=0.5)
    expected = fused(model).means
    model.gradient_checkpointing_enable()
    for name, mean in fused(model).means.items():
        assert torch.equal(mean, expected[name]), name


def test_weights_tied_by_hand() -> None:
    model = CalledTwice()
    model.head.weight = model.embed.weight  # named as the embedding's; no method says which module is the head
    assert_equals_loop(model)


def test_frozen_parameters_are_left_alone() -> None:
    model = CalledTwice()
    model.map.weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    assert_equals_loop(model)
    assert not model.map.weight.requires_grad and not model.head.bias.requires_grad
    assert model.map.bias.requires_grad


def test_batches_change_nothing() -> None:
    model = llama()
    whole = fused(model, 9).means
    for batch_size in (1, 2, 5):
        for name, mean in fused(model, batch_size).means.items():
            assert (mean - whole[name]).norm() <= 1e-5 * whole[name].norm(), name


def test_the_model_is_left_as_it_was() -> None:
    model = llama().train()
    forwards = {name: part.__dict__.get("forward") for name, part in model.named_modules()}
    parameters = {name: (each, each.requires_grad, each.clone()) for name, each in model.named_parameters()}
    fused(model)
    assert {name: part.__dict__.get("forward") for name, part in model.named_modules()} == forwards
    for name, each in model.named_parameters():
        before, asked, values = parameters[name]
        assert each is before and each.requires_grad == asked and torch.equal(each, values) and each.grad is None
    assert model.training


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    model = llama()
    monkeypatch.setattr(per_sample_modules, "accumulate_squared_gradients_", fail)
    with pytest.raises(KeyboardInterrupt):
        fused(model)
    monkeypatch.undo()
    assert all(each.requires_grad for each in model.parameters())
    assert not any("forward" in part.__dict__ for part in model.modules())
    assert_equals_loop(model)


def test_bfloat16_is_near_float32() -> None:
    model = llama()
    nudge_(model, 3, 0.05)
    model.bfloat16()
    found, expected = fused(model).means, loop(model.float())
    for name, mean in found.items():
        assert mean.dtype == torch.float32
        assert (mean - expected[name]).norm() <= 0.05 * expected[name].norm(), name


def test_no_gradient_of_a_sample_is_stored() -> None:
    """The largest tensor made beside activations is no (N, d_out, d_in) array."""
    model = llama()
    largest = max(parameter.numel() for parameter in model.parameters())
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                seen.append(result.numel())
            return result

    with Watch():
        fused(model, batch_size=9)
    logits = len(SAMPLES) * max(len(sample.input_ids) for sample in SAMPLES) * 300
    assert max(seen) <= max(logits, largest)
    assert len(SAMPLES) * largest > logits  # so a stored gradient a sample would show


def test_a_module_called_for_each_sample_keeps_no_second_gradient() -> None:
    module = nn.Bilinear(64, 64, 64, bias=False)
    sums = Target(torch.zeros_like(module.weight), torch.zeros_like(module.weight))
    fisher = LoopFisher(module, {"weight": sums})
    fisher.batch = BatchShape(3, 2, torch.tensor([2, 2, 2]))
    hidden = torch.randn(3, 2, 64)
    known = (module.weight, hidden, sums.fisher, sums.gradient)
    with fisher.installed(), LiveBytes(tensor for tensor in known if tensor is not None) as live:
        module(hidden, hidden).sum().backward()
    assert live.peak < 1.5 * module.weight.nbytes
    gradients = torch.einsum("nti,ntj->nij", hidden, hidden)[:, None].expand(-1, 64, -1, -1)
    torch.testing.assert_close(sums.gradient, gradients.sum(0))
    torch.testing.assert_close(sums.fisher, gradients.square().sum(0))


def test_shapes_that_no_rule_understands() -> None:
    shape = BatchShape(3, 5, torch.tensor([5, 2, 1]))
    rows, lengths = shape.by_sample(torch.zeros(3, 5, 7), Layout.TOKENS)
    assert rows.shape == (3, 5, 7) and lengths is not None and lengths.tolist() == [5, 2, 1]
    rows, lengths = shape.by_sample(torch.zeros(3, 5, 2, 7), Layout.TOKENS)
    assert rows.shape == (3, 10, 7) and lengths is not None and lengths.tolist() == [10, 4, 2]
    rows, lengths = shape.by_sample(torch.zeros(15, 7), Layout.FLAT)
    assert rows.shape == (3, 5, 7) and lengths is not None and lengths.tolist() == [5, 2, 1]
    assert shape.by_sample(torch.zeros(3, 7), Layout.SAMPLES)[0].shape == (3, 1, 7)
    assert shape.by_sample(torch.zeros(3, 5, 2, 7), Layout.SAMPLES)[1] is None
    for odd in ((5, 3, 7), (4, 7), (7,)):
        assert shape.layouts(torch.zeros(odd)) == []
        for layout in Layout:
            with pytest.raises(UnexpectedCall):
                shape.by_sample(torch.zeros(odd), layout)


def test_all_rows_of_a_single_sample_are_its_own() -> None:
    shape = BatchShape(1, 5, torch.tensor([5]))
    for layout in Layout:
        assert shape.by_sample(torch.zeros(4, 2, 7), layout)[0].shape == (1, 8, 7)


def test_a_model_with_flex_attention_is_probed_as_one_without() -> None:
    model, samples = llama(), draw_samples(3)

    def kinds() -> list[tuple[str, str]]:
        targets = {name: Target.unused() for name, _ in model.named_parameters()}
        plan = plan_for(model, samples, targets)
        assert not plan.one_by_one
        return [(fisher.name, type(fisher).__name__) for fisher in plan.modules]

    expected = kinds()
    model.set_attn_implementation("flex_attention")
    assert kinds() == expected and model.config._attn_implementation == "flex_attention"


def test_rules_are_the_expected_ones() -> None:
    model = llama()
    targets = {name: Target(torch.zeros_like(each), None) for name, each in model.named_parameters()}
    kinds = {type(fisher) for fisher in plan_for(model, SAMPLES, targets).modules}
    assert LinearFisher in kinds and EmbeddingFisher in kinds and LoopFisher not in kinds
