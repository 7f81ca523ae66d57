"""The exact per-sample Fisher: the operation against a matrix product, whole models against a backward pass.

The limit of the operation is one matrix product of the same FLOPs, which does not tell the samples apart. The limit
of a whole model is a plain forward and backward pass over the same batch. Peers compute the exact per-sample Fisher
of every parameter, as ours does, unless their note says otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import perta_fast as pf
from bench.harness.contest import Outcome, Unavailable, alternate, replay, replayed, unavailable
from bench.harness.tables import Row
from bench.inputs.arrays import timed
from bench.inputs.random_llama import LARGE, SMALL, random_llama
from perta_fast.data.batches import Batch
from perta_fast.data.samples import Sample
from perta_fast.models.losses import per_sample_losses

Fisher = dict[str, torch.Tensor]

BACKENDS = {"cpu": "cpp", "cuda": "triton"}
# Samples, tokens, width of the linear map.
SHAPES = {
    "cpu": ((32, 128, 512), (64, 48, 512), (128, 16, 512), (8, 256, 2048)),
    "cuda": ((16, 256, 4096), (64, 64, 4096), (256, 16, 4096)),
}
OPERATION = {
    "one matrix product": "limit",
    "torch, sample by sample": "reference",
    "torch, all gradients at once": "peer",
    "BackPACK": "peer",
    "ours": "ours",
}
# Samples and tokens of the whole model's batch.
BATCHES = {"cpu": ((32, 128), (64, 48), (128, 16)), "cuda": ((32, 128), (16, 256))}
MODEL = {
    "training backward": "limit",
    "batch-of-one loop": "peer",
    "torch.func vmap": "peer",
    "Opacus": "peer",
    "ours": "ours",
}


def operation_group(device: str, shape: tuple[int, int, int]) -> str:
    """The name of the table for one shape of the operation."""
    count, tokens, width = shape
    kind = "float32" if device == "cpu" else "bfloat16"
    return f"fisher, {device}: {count} samples of {tokens} tokens, {width} x {width}, {kind}"


def model_group(device: str, batch: tuple[int, int]) -> str:
    """The name of the table for one batch of the whole model."""
    return f"fisher of a model, {device}: {batch[0]} samples of {batch[1]} tokens"


def one_product(activations: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    """The gradient of the batch, as an ordinary backward pass computes it."""
    return deltas.flatten(0, 1).T @ activations.flatten(0, 1)


def all_at_once(activations: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    """The sum of squares of all samples' gradients, which are all in memory at once."""
    return torch.einsum("nto,nti->noi", deltas.float(), activations.float()).square_().sum(0)


def by_backpack(activations: torch.Tensor, deltas: torch.Tensor) -> Callable[[], object]:
    """BackPACK's SumGradSquared on one nn.Linear; it computes the ordinary gradient too."""
    try:
        from backpack import backpack, extend
        from backpack.extensions import SumGradSquared
    except ImportError:
        return unavailable("BackPACK: not installed")
    width = activations.shape[-1]
    layer = extend(nn.Linear(width, width, bias=False, device=activations.device, dtype=activations.dtype))

    def run() -> object:
        layer.zero_grad(set_to_none=True)
        with torch.enable_grad(), backpack(SumGradSquared()):
            (layer(activations) * deltas).sum().backward()
        return layer.weight.sum_grad_squared

    return run


def contest_of_operation(device: str, shape: tuple[int, int, int], rounds: int) -> dict[str, Outcome]:
    """Measure all contenders on one shape."""
    count, tokens, width = shape
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    activations, deltas = (
        torch.randn(count, tokens, width, device=device, generator=generator).to(dtype) for _ in range(2)
    )
    fisher = torch.zeros(width, width, device=device)

    def accumulate(backend: str) -> object:
        return pf.ops.accumulate_squared_gradients_(fisher, activations, deltas, backend=backend)

    works: dict[str, Callable[[], object]] = {
        "one matrix product": lambda: one_product(activations, deltas),
        "torch, sample by sample": lambda: accumulate("reference"),
        "torch, all gradients at once": lambda: all_at_once(activations, deltas),
        "BackPACK": by_backpack(activations, deltas),
        "ours": lambda: accumulate(BACKENDS[device]),
    }
    with torch.no_grad():
        return alternate({name: timed(work, device) for name, work in works.items()}, rounds)


@dataclasses.dataclass
class Subject:
    """A random Llama, one batch for it, and what the contenders do with them."""

    model: nn.Module
    samples: list[Sample]
    batch: Batch
    device: str

    @classmethod
    def make(cls, device: str, count: int, tokens: int) -> Subject:
        """22 M parameters in float32 on a CPU, 1 B in bfloat16 on a GPU."""
        size = LARGE if device == "cuda" else SMALL
        model = random_llama(size, tokens, device).eval()
        rows = torch.randint(size.vocabulary, (count, tokens)).tolist()
        samples = [Sample(tuple(row), tuple(row)) for row in rows]
        return cls(model, samples, Batch.of(samples, device), device)

    def training_backward(self) -> object:
        """Do what a training step does before the optimizer."""
        self.model.zero_grad(set_to_none=True)
        per_sample_losses(self.model, self.batch).sum().backward()
        return None

    def loop(self) -> Fisher:
        """One forward and backward pass per sample; the squares are added up, as in usual scripts."""
        fisher = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.model.named_parameters()}
        for sample in self.samples:
            self.model.zero_grad(set_to_none=True)
            per_sample_losses(self.model, Batch.of([sample], self.device)).sum().backward()
            for name, parameter in self.model.named_parameters():
                assert parameter.grad is not None
                fisher[name].addcmul_(parameter.grad, parameter.grad)
        return fisher

    def vmap(self) -> Fisher:
        """torch.func's vmap of grad, on eight samples at a time so that their gradients fit into memory."""
        parameters = {name: parameter.detach() for name, parameter in self.model.named_parameters()}

        def loss(weights: Fisher, ids: torch.Tensor) -> torch.Tensor:
            arguments = {"input_ids": ids[None], "use_cache": False}
            logits = torch.func.functional_call(self.model, weights, (), arguments).logits[0, :-1]
            return nn.functional.cross_entropy(logits.float(), ids[1:])

        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
        fisher = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in parameters.items()}
        for ids in self.batch.input_ids.split(8):
            for name, gradients in per_sample(parameters, ids).items():
                fisher[name].add_(gradients.float().square_().sum(0))
        return fisher

    def opacus(self) -> Fisher:
        """Opacus' hooks; the gradients of all samples are in memory, and squared afterwards."""
        try:
            from opacus import GradSampleModule
        except ImportError as error:
            raise Unavailable("Opacus: not installed") from error
        wrapped = GradSampleModule(self.model.train(), loss_reduction="sum", strict=False)  # the model has no dropout
        try:
            per_sample_losses(wrapped, self.batch).sum().backward()
            parameters: Iterable[tuple[str, Any]] = self.model.named_parameters()
            return {name: parameter.grad_sample.float().square().sum(0) for name, parameter in parameters}
        finally:
            wrapped.to_standard_module()
            self.model.eval()

    def ours(self) -> object:
        """The public function, with its plan, one batched pass, the mean and its checks."""
        size = len(self.samples)
        return pf.estimate_importance(self.model, self.samples, "empirical-fisher", batch_size=size, progress=False)


def contest_of_model(device: str, batch: tuple[int, int], rounds: int) -> dict[str, Outcome]:
    """Measure all contenders on one batch."""
    subject = Subject.make(device, *batch)
    works = {
        "training backward": subject.training_backward,
        "batch-of-one loop": subject.loop,
        "torch.func vmap": subject.vmap,
        "Opacus": subject.opacus,
        "ours": subject.ours,
    }
    return alternate({name: timed(work, device) for name, work in works.items()}, rounds)


class Outcomes:
    """Outcomes by group; each group is measured once, when it is first asked for."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self._by_group: dict[str, dict[str, Outcome]] = {}

    def of(self, group: str, contest: Callable[..., dict[str, Outcome]], size: tuple[int, ...]) -> dict[str, Outcome]:
        """The outcomes of ``group``, measured by ``contest`` at ``size``."""
        if group not in self._by_group:
            self._by_group[group] = contest(self.device, size, self.rounds)
        return self._by_group[group]


@pytest.fixture(scope="module")
def outcomes(device: str, rounds: int) -> Outcomes:
    """The outcomes of this file."""
    return Outcomes(device, rounds)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the sizes that are listed for the chosen device."""
    device = metafunc.config.getoption("--bench-device")
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", SHAPES[device], ids=str)
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", BATCHES[device], ids=str)


@replayed
@pytest.mark.parametrize("contender", OPERATION)
def bench_operation(
    shape: tuple[int, int, int], contender: str, outcomes: Outcomes, board: list[Row], benchmark: Any
) -> None:
    """Report one contender on one linear map."""
    group = operation_group(outcomes.device, shape)
    outcome = outcomes.of(group, contest_of_operation, shape)[contender]
    count, tokens, width = shape
    flops = 2 * count * tokens * width * width
    row = replay(benchmark, outcome, group=group, contender=contender, role=OPERATION[contender], flops=flops)
    board.append(row)


@replayed
@pytest.mark.parametrize("contender", MODEL)
def bench_model(batch: tuple[int, int], contender: str, outcomes: Outcomes, board: list[Row], benchmark: Any) -> None:
    """Report one contender on a whole model."""
    group = model_group(outcomes.device, batch)
    outcome = outcomes.of(group, contest_of_model, batch)[contender]
    board.append(replay(benchmark, outcome, group=group, contender=contender, role=MODEL[contender]))
