"""Estimates of streamed runs, held to what real layers, real walks and real processes take."""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from math import ceil, log2
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from perta_fast import InputError
from perta_fast.cli import main
from perta_fast.files.new_directory import partial_path
from perta_fast.importance import ratio
from perta_fast.importance.gradients import gradients_accumulated_into
from perta_fast.importance.kept_form import KeptForm
from perta_fast.memory import format_size, parse_size
from perta_fast.models.layouts import Run
from perta_fast.streaming.data_pass import DataPass, Means
from perta_fast.streaming.forecast import rates
from perta_fast.streaming.forecast.choice import Budget, choose_schedule
from perta_fast.streaming.forecast.costs import Load
from perta_fast.streaming.forecast.trial import LiveBytes, Trial
from perta_fast.streaming.forecast.walk_costs import WalkEstimate
from perta_fast.streaming.held_arrays import HeldArrays
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.model.structure import Structure
from perta_fast.streaming.schedule import Schedule
from perta_fast.streaming.scratch_files import StepFiles
from perta_fast.streaming.walk import Walk, parameters_of, steps_of
from tests.families.configs import FAMILIES, GPT2_SIZES, SIZES
from tests.families.matrix import build
from tests.support.children import run_child
from tests.support.disks import with_free
from tests.support.models import draw_samples, llama, nudge_, tokenizer, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PLENTY = 1 << 50
SETS = (draw_samples(9, seed=1), draw_samples(14, seed=2))
LENGTHS = [[len(sample.input_ids) for sample in samples] for samples in SETS]


def write(folder: Path, model: PreTrainedModel) -> Path:
    nudge_(model, 3, 0.05)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers."""
    return write(tmp_path_factory.mktemp("costs") / "model", llama(num_hidden_layers=5))


@pytest.fixture
def estimate(deep: Path) -> WalkEstimate:
    return WalkEstimate(Structure.build(deep), Load(LENGTHS), CPU)


@pytest.mark.parametrize("subtract", [True, False])
def test_files_have_the_type_of_the_checkpoint_whatever_it_runs_in(tmp_path: Path, subtract: bool) -> None:
    folder = write(tmp_path / "model", llama().to(torch.bfloat16))
    load = Load(LENGTHS, subtract=subtract, kept=0 if subtract else 8)
    own, wider = (
        WalkEstimate(Structure.build(folder, dtype), load, CPU).costs(Schedule(2))
        for dtype in (torch.bfloat16, torch.float32)
    )
    for name in ("weights_read", "result_read", "result_written"):
        assert getattr(own, name) == getattr(wider, name)
    assert 2 * own.host["weights"] < wider.host["weights"] < 3 * own.host["weights"]  # and the one that is converted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Mixtral", "Qwen2-MoE"])
def test_what_reading_a_layer_takes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensors that are converted are read one after the other; experts that are joined lie there thrice."""
    family = next(family for family in FAMILIES if family.name == name)
    folder = write(tmp_path / "model", build(family, 0).to(torch.bfloat16))
    skeleton = Skeleton.open(folder, CPU, dtype)
    estimate = WalkEstimate(Structure.build(folder, dtype), Load(LENGTHS), CPU)
    for names in skeleton.by_layer:
        with LiveBytes([]) as live:
            skeleton.weights.read(names)
        assert live.peak <= estimate._bytes(names) <= 1.35 * live.peak


@pytest.mark.parametrize("form", [KeptForm(), KeptForm(dtype="bfloat16"), KeptForm(as_ratio=True, dtype="bfloat16")])
@pytest.mark.parametrize("name", ["Llama", "Mixtral", "Qwen2-MoE"])
def test_what_writing_a_part_takes(name: str, form: KeptForm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that are divided are copied, rounded importances are there twice, and arrays of two tensors."""
    monkeypatch.setattr(ratio, "_DOUBLE", 16)
    family = next(family for family in FAMILIES if family.name == name)
    skeleton = Skeleton.open(write(tmp_path / "model", build(family, 0)), CPU, None)
    estimate = WalkEstimate(skeleton, Load(LENGTHS, kept=form.width), CPU)
    parameters = dict(skeleton.model.named_parameters())
    for names in skeleton.by_layer:
        means = {side: {name: torch.ones(parameters[name].shape) for name in names} for side in ratio.SIDES}
        with LiveBytes([mean for of_side in means.values() for mean in of_side.values()]) as live:
            stored = form.stored({side: skeleton.as_stored(of_side) for side, of_side in means.items()})
            runs = {k: [Run(name, 0, each.numel())] for k, (name, each) in enumerate(first(stored).items())}
            for index in (arrays := HeldArrays(runs, list(stored.values()))):
                assert arrays[index][0].dtype == "float32"
        taken = sum(estimate._stored_sums(names))
        assert live.peak <= taken <= 1.4 * live.peak + 1000


def first(table: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return next(iter(table.values()))


def test_the_writing_is_part_of_the_peak(deep: Path) -> None:
    structure = Structure.build(deep)
    for overlap in (False, True):
        schedule = Schedule(1, overlap=overlap)
        plain, rounded = (
            WalkEstimate(structure, Load([[2], [2]], kept=kept), CPU).memory(schedule)[0] for kept in (8, 4)
        )
        assert rounded["sums"] > 1.4 * plain["sums"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_one_parameter_at_a_time_is_pinned(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy stands for the pinned memory; it is as large as the tensor, and counted too."""
    family = next(family for family in FAMILIES if family.name == name)
    folder = write(tmp_path / "model", build(family, 0).to(torch.bfloat16))
    skeleton = replace(Skeleton.open(folder, CPU, dtype), device=GPU)
    estimate = WalkEstimate(Structure.build(folder, dtype), Load(LENGTHS), GPU)
    pinned: list[Tensor] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    for names in skeleton.by_layer:
        pinned.clear()
        with LiveBytes([]) as live:
            values = skeleton.read(names)
        assert [values[name].data_ptr() for name in names] == [tensor.data_ptr() for tensor in pinned]
        assert live.peak <= estimate._walked(names, [], sum(tensor.nbytes for tensor in pinned))


def test_only_what_is_read_ahead_is_pinned(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = replace(Skeleton.open(deep, CPU, None), device=GPU)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pytest.fail("is pinned"))
    held: list[str] = []
    monkeypatch.setattr(Skeleton, "holding", lambda skeleton, values: nullcontext(held.extend(values)))
    with skeleton.in_memory(skeleton.vocabulary):
        assert held == skeleton.vocabulary


class PinnedMemory:
    """As torch allocates it: blocks of powers of two, which are kept for others of their size."""

    def __init__(self) -> None:
        self.total = 0
        self._free: list[int] = []

    def allocate(self, sizes: list[int]) -> list[int]:
        blocks = [2 ** ceil(log2(size)) for size in sizes]
        for block in blocks:
            if block in self._free:
                self._free.remove(block)
            else:
                self.total += block
        return blocks

    def release(self, blocks: list[int]) -> None:
        self._free += blocks


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_pinned_memory_of_a_walk(overlap: bool, squares: bool, deep: Path) -> None:
    structure, schedule = Structure.build(deep), Schedule(2, overlap=overlap, groups=2)
    sizes = {name: parameter.nbytes for name, parameter in structure.model.named_parameters()}
    parts = [[sizes[name] for name in parameters_of(step, structure)] for step in steps_of(5, schedule)]
    memory = PinnedMemory()
    here: list[int] = memory.allocate(parts[0]) if overlap else []
    for part, following in zip(parts, [*parts[1:], []], strict=True):
        here = here if overlap else memory.allocate(part)
        ahead = memory.allocate(following) if overlap else []
        memory.release(here)
        here = ahead
    estimate = WalkEstimate(structure, Load(LENGTHS, squares=squares), GPU)
    weights = [host["weights"] for host, _ in estimate._memory_by_step(schedule)]
    resident = sum(sizes[name] for name in structure.resident)
    assert max(weights[1:]) == resident + memory.total + max(max(part) for part in parts)
    vocabulary = resident + sum(sizes[name] for name in structure.vocabulary)
    read_beside = sum(PinnedMemory().allocate(parts[1])) + max(parts[1]) if squares else 0
    assert weights[0] == vocabulary + read_beside


# One batch in one layer.


def test_live_bytes() -> None:
    known = torch.zeros(100)
    with LiveBytes([known]) as live:
        first = known + 1  # 400 bytes
        second = first * 2  # 800
        first.view(10, 10).t()  # a view takes nothing
        del first
        second.add_(1)
        assert live.peak == 800
        third = second.double()  # 400 and 800
        del second
        _ = third + 1  # 1600
        assert live.peak == 1600


LAYERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "bfloat16": lambda: llama().to(torch.bfloat16),
    "eager": lambda: llama(attn_implementation="eager"),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=8, **SIZES)),
}


def real_layer(skeleton: Skeleton, count: int, tokens: int) -> tuple[int, int]:
    """Bytes alive at most in layer 0, forward and back, on padded samples; bytes that its forward saves."""
    names = skeleton.by_layer[0]
    partial_forward = skeleton.partial_forward
    saved: dict[int, int] = {}
    mask = torch.ones(count, tokens, dtype=torch.int64)
    mask[1:, tokens // 2 :] = 0
    hidden = torch.randn(count, tokens, skeleton.model.config.hidden_size, dtype=skeleton.model.dtype)  # type: ignore[arg-type, union-attr]
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # so that no other storage takes its place
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with partial_forward.installed(), skeleton.in_memory([*skeleton.resident, *names]):
        parameters = dict(skeleton.model.named_parameters())
        sums = {name: torch.zeros(parameters[name].shape) for name in names}
        known = [*skeleton.model.parameters(), *skeleton.model.buffers(), *sums.values()]
        with gradients_accumulated_into(skeleton.model, sums, squared=False):
            with LiveBytes(known) as live:
                given = hidden.clone().requires_grad_()
                result = partial_forward.layer(0, given, mask)
                result.backward(torch.ones_like(result))
            weights = {tensor.untyped_storage().data_ptr() for tensor in known}
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                partial_forward.layer(0, hidden.clone().requires_grad_(), mask)
    return live.peak, sum(size for place, size in saved.items() if place not in weights)


@pytest.mark.parametrize("family", LAYERS)
def test_a_layer_takes_what_a_real_one_takes(family: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", LAYERS[family]())
    skeleton = Skeleton.open(folder, CPU, None)
    peak, saved = real_layer(skeleton, 5, 40)
    for layer in (0, 1):
        cost = Trial(Structure.build(folder), CPU, squares=False).backward(layer, 5, 40)
        assert not cost.bound
        assert saved < cost.bytes
        assert peak <= cost.bytes <= 1.15 * peak


def test_squares_keep_no_weight_gradient(deep: Path) -> None:
    """With one token, the matrices' own gradients are what counts; the fused operation never holds them."""
    structure = Structure.build(deep)
    largest = max(parameter.nbytes for parameter in structure.layers[0].parameters())
    one, other = (Trial(structure, CPU, squares).backward(0, 1, 2) for squares in (False, True))
    assert one.bytes > largest > other.bytes
    assert one.flops == other.flops


def test_code_that_wants_values_is_bounded(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = Structure.build(deep)
    exact = Trial(structure, CPU, squares=False).backward(0, 4, 12)
    kind = type(structure.layers[0].mlp)
    original = kind.forward

    def routed(self: torch.nn.Module, hidden: Tensor) -> Tensor:
        return original(self, hidden) if float(hidden.detach().sum()) > 0 else hidden

    monkeypatch.setattr(kind, "forward", routed)
    bound = Trial(structure, CPU, squares=False).backward(0, 4, 12)
    assert bound.bound
    assert bound.bytes >= exact.bytes


@pytest.mark.parametrize("experts", [None, "eager"])
def test_the_bound_holds_for_experts(experts: str | None, tmp_path: Path) -> None:
    """With a few tokens, the gradients of the experts' matrices are what counts."""
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 96}
    folder = write(tmp_path / "model", MixtralForCausalLM(MixtralConfig(num_local_experts=8, **sizes)))
    skeleton = Skeleton.open(folder, CPU, None)
    if experts is not None:
        skeleton.model.set_experts_implementation(experts)
    bound = Trial(Structure.build(folder), CPU, squares=False).backward(0, 1, 8)
    assert bound.bound
    assert real_layer(skeleton, 1, 8)[0] <= bound.bytes


def test_the_model_is_left_as_it_was(deep: Path) -> None:
    skeleton = Skeleton.open(deep, CPU, None)
    before = [(name, id(each)) for name, each in skeleton.model.named_parameters()]
    buffers = [(name, each.clone()) for name, each in skeleton.model.named_buffers()]
    Trial(skeleton, CPU, squares=True).head(2, 5)
    assert [(name, id(each)) for name, each in skeleton.model.named_parameters()] == before
    for (name, each), (_, now) in zip(buffers, skeleton.model.named_buffers(), strict=True):
        assert torch.equal(each, now), name


# A walk.


def test_arithmetic_is_that_of_the_formula(deep: Path) -> None:
    structure = Structure.build(deep)
    config = structure.model.config
    lengths = [[10] * 6, [10] * 3]
    found = WalkEstimate(structure, Load(lengths), CPU).costs(Schedule(3)).flops
    matrices = sum(p.numel() for layer in structure.layers for p in layer.parameters() if p.dim() == 2)
    head = config.vocab_size * config.hidden_size
    attention = 5 * 10 * config.hidden_size  # of one product, for a token in all layers
    # Forward, again, and two products back; attention has two products forward and five back.
    assert found == 90 * (2 * (4 * matrices + 3 * head) + 2 * (4 + 5) * attention)
    assert WalkEstimate(structure, Load(lengths, squares=True), CPU).costs(Schedule(3)).flops == found


@pytest.mark.parametrize(
    ("schedule", "late", "squares", "tied"),
    [
        (Schedule(4), False, False, False),
        (Schedule(4, every=2), True, False, True),
        (Schedule(3, every=3), False, True, False),
        (Schedule(4, every=9), True, False, False),
        (Schedule(4, groups=2), True, False, True),
        (Schedule(4, groups=2), False, False, False),
        (Schedule(4, every=2, groups=3), True, True, False),
        (Schedule(4), True, True, True),
    ],
    ids=str,
)
def test_scratch_files(schedule: Schedule, late: bool, squares: bool, tied: bool, tmp_path: Path) -> None:
    """late: files that are needed no more go a step after, as when they are flushed behind the walk."""
    folder = write(tmp_path / "model", llama(num_hidden_layers=5, tie_word_embeddings=tied))
    skeleton = Skeleton.open(folder, CPU, None)
    estimator = "empirical-fisher" if squares else "grad"
    scratch = tmp_path / "scratch"
    passes = [
        DataPass(skeleton, samples, range(len(samples)), estimator, schedule, scratch / str(number), lambda count: None)
        for number, samples in enumerate(SETS)
    ]
    sizes, waiting = [], [[StepFiles({}, [], [])]]

    def end_step(done: int, means: list[Means]) -> None:
        waiting.append([each.scratch.end_step() for each in passes])
        sizes.append(sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file()))
        for files in waiting.pop(0) if late else waiting.pop():
            files.remove_discarded()

    Walk(skeleton, passes, schedule).run(end_step)
    load = Load(LENGTHS, squares, subtract=late, kept=0 if late else 8)
    found = WalkEstimate(Structure.build(folder), load, CPU).scratch(schedule)
    if tied and squares:  # a token that a sample holds twice has one row
        assert max(sizes) <= found <= 1.25 * max(sizes)
    else:
        assert found == max(sizes)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("estimator", "batch_size", "tied"), [("grad", 1, "untied"), ("empirical-fisher", 8, "tied")])
def test_peak_memory_of_a_process(estimator: str, batch_size: int, tied: str, tmp_path: Path) -> None:
    """The estimate takes every token to have a label; here half of them have."""
    module = "tests.streaming.forecast.estimated_memory"
    command = [sys.executable, "-m", module, estimator, str(batch_size), tied, str(tmp_path)]
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks go back to the system
    run = run_child(command, env=settings, check=True)
    peak, estimated = map(int, run.stdout.split())
    assert peak <= 1.05 * estimated
    assert estimated <= 1.4 * peak


# The choice.


def needed(estimate: WalkEstimate, schedule: Schedule) -> int:
    return sum(estimate.memory(schedule)[0].values())


@pytest.fixture
def no_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes nothing, so that a budget can be told to the byte."""
    monkeypatch.setattr("perta_fast.streaming.forecast.choice.PeakMemory._sample", lambda self: None)


@pytest.mark.usefixtures("no_baseline")
def test_memory_chooses_batches_and_overlap(estimate: WalkEstimate) -> None:
    for size in (1, 3, 8):
        alone = Schedule(size, overlap=False)
        assert choose_schedule(estimate, 8, Budget(PLENTY, needed(estimate, alone))).schedule == alone
        both = Schedule(size)
        if needed(estimate, both) < needed(estimate, Schedule(size + 1, overlap=False)):
            assert choose_schedule(estimate, 8, Budget(PLENTY, needed(estimate, both))).schedule == both
    less = choose_schedule(estimate, 8, Budget(PLENTY, needed(estimate, Schedule(8, overlap=False)) - 1))
    assert less.schedule.batch_size == 7
    assert any("batches of 8 would not fit" in reason for reason in less.reasons)
    assert choose_schedule(estimate, 8, Budget(PLENTY)).schedule == Schedule(8)


@pytest.mark.usefixtures("no_baseline")
def test_the_least_memory_is_named(estimate: WalkEstimate) -> None:
    least = needed(estimate, Schedule(1, overlap=False))
    with pytest.raises(InputError, match=rf"cannot hold one part of the model: .* {least} bytes .* of which"):
        choose_schedule(estimate, 8, Budget(PLENTY, least - 1))


def test_device_memory(deep: Path) -> None:
    estimate = WalkEstimate(Structure.build(deep), Load(LENGTHS), GPU)
    whole = choose_schedule(estimate, 8, Budget(PLENTY))
    assert whole.costs.device is not None
    assert "activations" not in whole.costs.host
    less = choose_schedule(estimate, 8, Budget(PLENTY, device_memory=whole.costs.device_bytes - 1))
    assert less.costs.device_bytes < whole.costs.device_bytes
    with pytest.raises(InputError, match="device memory of 1 B cannot hold"):
        choose_schedule(estimate, 8, Budget(PLENTY, device_memory=1))


def test_many_processes(deep: Path) -> None:
    """The estimate is for the rank with the most data; the scratch files of all share the disk."""
    lengths = [[9, 2, 7, 4, 4], [6]]
    assert Load(lengths).share(1).lengths == lengths
    dealt = Load(lengths, squares=True, kept=2).share(3)
    assert dealt == Load([[9], [6]], squares=True, kept=2)
    structure = Structure.build(deep)
    estimate = WalkEstimate(structure, Load(LENGTHS).share(2), CPU)
    enough = estimate.result_bytes + 2 * estimate.scratch(Schedule(8))
    assert choose_schedule(estimate, 8, Budget(enough, ranks=2)).schedule == Schedule(8)
    assert choose_schedule(estimate, 8, Budget(enough - 1, ranks=2)).schedule != Schedule(8)


def test_the_disk_chooses_boundaries_and_groups(deep: Path) -> None:
    estimate = WalkEstimate(Structure.build(deep), Load([[100] * 400, [100] * 3600]), CPU)
    result = estimate.result_bytes
    sizes = {every: estimate.scratch(Schedule(8, every)) for every in range(1, 6)}
    for every in (1, 2):
        assert choose_schedule(estimate, 8, Budget(result + sizes[every])).schedule == Schedule(8, every)
    least = min(sizes, key=lambda every: sizes[every])
    grouped = choose_schedule(estimate, 8, Budget(result + sizes[least] - 1))
    grouped.check()
    assert grouped.schedule.groups > 1
    assert grouped.costs.scratch < sizes[least]
    smallest = estimate.scratch(Schedule(8, least, ceil(3600 / 8)))
    short = choose_schedule(estimate, 8, Budget(result + smallest - 1))
    with pytest.raises(InputError, match=f"scratch files of at least {format_size(smallest)}"):
        short.check()


def test_what_is_kept_is_counted_on_its_own_disk(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = Structure.build(deep)
    alone = WalkEstimate(structure, Load(LENGTHS), CPU)
    parameters = sum(parameter.numel() for parameter in structure.model.parameters())
    scratch = alone.scratch(Schedule(8))
    for width in (2, 4, 8):
        estimate = WalkEstimate(structure, Load(LENGTHS, kept=width), CPU)
        kept = estimate.kept_bytes
        assert kept == width * parameters == estimate.result_bytes - alone.result_bytes
        assert choose_schedule(estimate, 8, Budget(estimate.result_bytes + scratch)).schedule == Schedule(8)
        assert choose_schedule(estimate, 8, Budget(estimate.result_bytes + scratch - 1)).schedule != Schedule(8)
        apart = Budget(alone.result_bytes + scratch, kept=kept)
        assert choose_schedule(estimate, 8, apart).schedule == Schedule(8)
        with pytest.raises(InputError, match="the disk of save_importance has"):
            choose_schedule(estimate, 8, replace(apart, kept=kept - 1)).check()
    out, other = tmp_path / "out", tmp_path / "other"
    with_free(1000, monkeypatch, {other: 2000})
    assert Budget.at(out, None, None, kept_at=tmp_path / "kept") == Budget(950)
    assert Budget.at(out, None, None, kept_at=other / "kept") == Budget(950, kept=1900)


def test_what_a_killed_run_left_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(1000, monkeypatch)
    partial_path(tmp_path / "out").mkdir()
    (partial_path(tmp_path / "out") / "scratch").write_bytes(bytes(8192))
    assert Budget.at(tmp_path / "out", None, None) == Budget(int(0.95 * 9192))


# The command line.


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a Llama of 70 B, and nothing else."""
    folder = tmp_path_factory.mktemp("large")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        dtype="bfloat16",
    ).save_pretrained(folder)
    write_lines(folder / "forget.jsonl", [{"text": "a"}] * 40)
    write_lines(folder / "retain.jsonl", [{"text": "a"}] * 360)
    return folder


def dry_run(large: Path, out: Path, *options: str) -> list[str]:
    places = [part for name in ("model", "base", "tuned") for part in (f"--{name}", str(large))]
    data = [part for name in ("forget", "retain") for part in (f"--{name}", str(large / f"{name}.jsonl"))]
    return [
        "unlearn",
        "--rule=fisher",
        *places,
        *data,
        "--lam",
        "1",
        "--out",
        str(out),
        "--stream",
        "--dry-run",
        *options,
    ]


def test_dry_run_of_70_billion(
    large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "_time_product", lambda *_: 1e12)  # of matrices this large it takes seconds
    assert main(dry_run(large, tmp_path / "out", "--max-length", "64")) == 0
    text = capsys.readouterr().out
    for line in ("memory: ", "disk: ", "read ", "arithmetic: ", "time: about ", "schedule: batches of 8"):
        assert f"\n{line}" in text
    assert "40 forget samples of 2560 tokens, 360 retain samples of 23040 tokens" in text
    assert "no tokenizer: each counts --max-length tokens" in text
    assert "141 GB of result" in text  # 70.6 billion parameters in bfloat16
    ratio = ["--save-importance", str(tmp_path / "kept"), "--as", "ratio"]
    assert main(dry_run(large, tmp_path / "out", "--max-length", "64", *ratio)) == 0
    assert "282 GB of result" in capsys.readouterr().out
    in_place = [part for part in dry_run(large, tmp_path / "out", "--max-length", "64") if part != "--out"]
    in_place[in_place.index(str(tmp_path / "out"))] = "--in-place"
    assert main(in_place) == 0  # each importance in a walk of its own, in float32; no room for a result
    text = capsys.readouterr().out
    assert text.count("282 GB of result") == 2 and "141 GB" not in text.replace("read 141 GB", "")
    assert [line for line in text.splitlines() if line.endswith(" importance:")] == [
        "the forget importance:",
        "the retain importance:",
    ]
    assert text.endswith("as by perta apply --in-place, through a journal of at most 192 MiB\n")
    kept = tmp_path / "elsewhere"
    seen: list[Path] = []
    at = Budget.at
    monkeypatch.setattr(Budget, "at", lambda destination, *more: seen.append(destination) or at(destination, *more))
    for more, place in (([], kept), (["--as", "ratio"], large)):
        seen.clear()
        assert main([*in_place, "--save-importance", str(kept), *more]) == 0
        assert seen == [place, place]  # on whose disk they are written
    assert list(tmp_path.iterdir()) == []


def test_dry_run_needs(large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        ((), "has no tokenizer, so the lengths of the samples are not known"),
        (("--max-length", "64", "--memory", "2GiB"), "memory of 2.15 GB cannot hold one part of the model"),
        (("--max-length", "64", "--rule", "tv"), "--dry-run has nothing to estimate for rule tv"),
    ):
        assert main(dry_run(large, tmp_path / "out", *options)) == 2
        assert message in capsys.readouterr().err
    without = [part for part in dry_run(large, tmp_path / "out") if part != "--stream"]
    assert main(without) == 2
    assert "--dry-run is for streamed runs; add --stream" in capsys.readouterr().err


def test_dry_run_of_an_importance(deep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lengths are the tokenizer's."""
    data = write_lines(tmp_path / "data.jsonl", [{"text": "town"}, {"text": "river and town"}])
    tokens = sum(len(tokenizer()(text)["input_ids"]) for text in ("town", "river and town"))
    command = ["importance", "--model", deep, "--data", data, "--out", tmp_path / "out", "--stream", "--dry-run"]
    assert main(list(map(str, command))) == 0
    text = capsys.readouterr().out
    assert f"2 given samples of {tokens} tokens\n" in text
    assert "0 B to subtract" in text
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GiB", 12 << 30), ("500MB", 500_000_000), ("1.5 GB", 1_500_000_000), ("7", 7), ("2 kib", 2048)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "12GX", "1e9", "0.1 B", "nan"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(
        InputError, match=r"is not a size; write it like 12GiB|is less than one byte; give a larger size"
    ):
        parse_size(text)
