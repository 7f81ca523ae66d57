"""A live module is measured by one call at a time; a second one is refused, and nothing of the module changes."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from perta_fast import Event, Importance, InputError, apply_to_module_, estimate_importance, evaluate
from tests.support.models import Job, draw_samples, llama, tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = draw_samples(6)
REASON = "is being measured by another call"


class Wrapped(nn.Module):
    """Another module with the same parameters."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


def estimated(module: nn.Module, estimator: Any = "grad", progress: Any = False) -> Importance:
    return estimate_importance(module, SAMPLES, estimator, batch_size=2, progress=progress)


def state(module: nn.Module) -> list[Any]:
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]
    of_parameters = [len(parameter._post_accumulate_grad_hooks or ()) for parameter in module.parameters()]
    gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in module.parameters()]
    return [[part.training for part in module.modules()], hooks, of_parameters, gradients]


@pytest.mark.parametrize("estimator", ["grad", "empirical-fisher"])
@pytest.mark.parametrize("second", ["grad", "empirical-fisher", "wrapped", "evaluate", "apply"])
def test_within_a_callback(second: str, estimator: str, job: Job) -> None:
    expected = estimated(llama(), estimator)
    module = llama().train()
    calls: dict[str, Callable[[], object]] = {
        "wrapped": lambda: estimated(Wrapped(module)),
        "evaluate": lambda: evaluate(module, forget=job.forget, tokenizer=tokenizer(), progress=False),
        "apply": lambda: apply_to_module_(module, job.base, job.tuned, rule="tv"),
    }
    refused = []

    def again(_: Event) -> None:
        with pytest.raises(InputError, match=REASON):
            calls.get(second, lambda: estimated(module, second))()
        refused.append(second)

    before = state(module)
    found = estimated(module, estimator, progress=again)
    assert refused
    assert state(module) == before
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor)


def test_in_two_threads() -> None:
    module, other = llama().train(), llama()
    entered, leave = threading.Event(), threading.Event()
    results: list[Importance] = []

    def wait(_: Event) -> None:
        entered.set()
        leave.wait()

    first = threading.Thread(target=lambda: results.append(estimated(module, progress=wait)))
    first.start()
    entered.wait()
    try:
        with pytest.raises(InputError, match=REASON):
            estimated(module)
        estimated(other)  # a module of its own parameters
    finally:
        leave.set()
        first.join()
    assert all(part.training for part in module.modules())
    again = estimated(module)
    for name, tensor in results[0].tensors.items():
        assert torch.equal(tensor, again.tensors[name])


def test_after_an_error_the_module_is_free() -> None:
    module = llama()

    def fail(_: Event) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        estimated(module, progress=fail)
    assert estimated(module).metadata.sample_count == len(SAMPLES)
