"""One row of the matrix: a small random checkpoint, its importance in memory, streamed, and by autograd."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from perta_fast import Importance, estimate_importance
from perta_fast.data.samples import IGNORED, Sample
from perta_fast.rules import ESTIMATORS
from tests.families.configs import VOCABULARY, Family
from tests.support.models import draw_samples, nudge_, tokenizer

Tensors = Mapping[str, Tensor]

EVEN = [
    Sample(tuple(range(k, k + 9)), (IGNORED,) * 3 + tuple(range(k + 3, k + 9))) for k in range(0, VOCABULARY - 9, 42)
]
DATA = {"even": EVEN, "ragged": draw_samples(7)}  # without padding in any batch, and with


@dataclass(frozen=True)
class Compared:
    """One estimator on one data set, in memory and streamed."""

    estimator: str
    data: str
    memory: Importance
    stream: Importance

    @property
    def differences(self) -> dict[str, float]:
        """Norm of the difference beside the norm in memory, of each tensor in which a bit differs."""
        found = {}
        for name, expected in self.memory.tensors.items():
            error = float((self.stream.tensors[name] - expected).norm())
            if error:
                found[name] = error / float(expected.norm())
        return found


@dataclass(frozen=True)
class Row:
    """All of a family's numbers. ``tied``: the matrix that is both embedding and head."""

    family: Family
    folder: Path
    model: PreTrainedModel
    tied: str | None
    compared: list[Compared]

    @property
    def largest(self) -> float:
        """The largest difference between streamed and in memory."""
        return max(max(each.differences.values(), default=0.0) for each in self.compared)


def build(family: Family, seed: int) -> PreTrainedModel:
    """A random model; the same weights at first for all seeds, moved a little as tuning would."""
    torch.manual_seed(7)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(family.configuration())
    nudge_(model, seed, 0.05)  # norms and biases start at one and zero, where mistakes may hide
    return model.eval()


def write(model: PreTrainedModel, folder: Path) -> Path:
    """Save a model with a tokenizer."""
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer().save_pretrained(folder)
    return folder


def measure(family: Family, folder: Path, attention: str | None = None) -> Row:
    """Write the family's checkpoint and estimate its importance in every way.

    attention: the implementation that the configuration asks for; None lets transformers choose.
    """
    model = build(family, 3)
    path = write(model, folder / "model")
    if attention is not None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"attn_implementation": attention}))
    compared = []
    for estimator in ESTIMATORS:
        for name, samples in DATA.items():
            settings = {"batch_size": 4, "progress": False}
            memory = estimate_importance(path, samples, estimator, **settings)  # type: ignore[arg-type]
            out = folder / f"{estimator}-{name}"
            stream = estimate_importance(path, samples, estimator, out=out, stream=True, **settings)  # type: ignore[arg-type]
            compared.append(Compared(estimator, name, memory, stream))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = next(name for name, each in model.named_parameters() if each is head) if embedding is head else None
    return Row(family, path, model, tied, compared)


def by_autograd(model: PreTrainedModel, samples: Sequence[Sample], folder: Path) -> dict[str, Tensors]:
    """Both estimators in float64, one sample at a time, under the names that ``save_pretrained`` gives."""
    exact = copy.deepcopy(model).double()
    if exact._can_set_experts_implementation():
        exact.set_experts_implementation("eager")  # the others know no float64
    parameters = dict(exact.named_parameters())
    sums = {each: {name: torch.zeros_like(p) for name, p in parameters.items()} for each in ESTIMATORS}
    for sample in samples:
        logits = exact(input_ids=torch.tensor([sample.input_ids])).logits[0].log_softmax(-1)
        places = [place for place, label in enumerate(sample.labels) if place > 0 and label != IGNORED]
        loss = -torch.stack([logits[place - 1, sample.labels[place]] for place in places]).mean()
        found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        for name, gradient in zip(parameters, found, strict=True):
            sums["grad"][name] += gradient / len(samples)
            sums["empirical-fisher"][name] += gradient.square() / len(samples)
    result = {}
    for estimator, values in sums.items():
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
        exact.save_pretrained(folder / estimator)
        result[estimator] = load_file(folder / estimator / "model.safetensors")
    return result
