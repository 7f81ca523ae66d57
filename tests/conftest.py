"""What every test shares: no network, Triton interpreted where there is no GPU, small checkpoints made once.

Hypothesis draws the same examples each time. In a soak it draws new ones, and prints how to draw one again.
"""

import gc
import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported anywhere

from perta_fast import memory
from perta_fast.streaming.forecast import rates
from perta_fast.streaming.forecast.trial import Cost, Trial
from perta_fast.streaming.model.structure import Structure
from tests.support.models import Job, write_job

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("soak", print_blob=True, deadline=None)
settings.load_profile("soak" if os.environ.get("PERTA_SOAK") == "1" else "fixed")


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """model, base and tuned in bfloat16 shards, with forget and retain data; shared, so never written to."""
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="session")
def thawed() -> Iterator[None]:
    """At the end: triton counts then what it has lost."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def frozen(thawed: None) -> None:
    """Libraries and commands collect garbage: they need not walk each time through all that stays, such as modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For matrices this small, threads only wait for each other, long if the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A test leaves the environment as it was: making a BOFT adapter changes its compilers (peft 0.21.2)."""
    before = os.environ.copy()
    yield
    if os.environ.copy() != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True, scope="session")
def seldom_sampled() -> Iterator[None]:
    """A run looks at its memory all the time; the threads of one that takes milliseconds would wait for that."""
    with patch.object(memory, "_INTERVAL", 0.5):
        yield


@pytest.fixture(autouse=True, scope="session")
def quick_forecasts() -> Iterator[None]:
    """Before a streamed run the disk is measured, here by a small file, and the model's parts are tried, here once."""
    tried: dict[object, dict[tuple[str, int, int, int], Cost]] = {}
    original = Trial.__init__

    def begin(trial: Trial, structure: Structure, device: torch.device, squares: bool) -> None:
        original(trial, structure, device, squares)
        model: Any = structure.model
        code = [type(module).forward for module in model.modules()]
        shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
        config = model.config.to_dict() | {"_name_or_path": None}
        key = str((model, code, config, model.config._attn_implementation, shapes, model.dtype, device, squares))
        trial._known = tried.setdefault(key, {})

    with (
        patch.object(rates, "_SIZE", 1 << 20),
        patch.object(rates, "_LONG", 0.005),
        patch.object(Trial, "__init__", begin),
    ):
        yield
