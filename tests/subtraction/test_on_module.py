"""The subtraction on a live module: the parameters that loading the output of ``apply`` gives, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from perta_fast import Importance, ImportanceRatio, InputError, apply, apply_to_module_, estimate_importance
from perta_fast.models import stored_names
from tests.families.configs import FAMILIES
from tests.families.matrix import build, write
from tests.support.checkpoints import draw, read_checkpoint, same_bytes, write_checkpoint, write_importance
from tests.support.models import Job, draw_samples, write_job

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = ("tv", "grad", "fisher", "empirical-fisher")
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path)


def importances(job: Job, folder: Path, rule: str) -> list[Path]:
    """Forget and retain importance at ``base``, saved."""
    if rule == "tv":
        return []
    estimator: Any = "empirical-fisher" if rule == "empirical-fisher" else "grad"
    made = [folder / "forget", folder / "retain"]
    for path, data in zip(made, (job.forget, job.retain), strict=True):
        estimate_importance(job.base, data, estimator, out=path, progress=False)
    return made


def assert_same_parameters(found: nn.Module, expected: nn.Module) -> None:
    pairs = zip(found.named_parameters(), expected.named_parameters(), strict=True)
    for (name, parameter), (other, wanted) in pairs:
        assert name == other
        assert same_bytes(parameter.detach(), wanted.detach()), name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_as_the_output_of_apply(dtype: torch.dtype, tied: bool, rule: str, tmp_path: Path) -> None:
    job = write_job(tmp_path, dtype, tie_word_embeddings=tied)
    made = importances(job, tmp_path, rule)
    apply(*job.checkpoints, *made, rule=rule, lam=1.5, out=tmp_path / "out", progress=False)
    module, before = load(job.model), load(job.model)
    changed = apply_to_module_(module, job.base, job.tuned, *made, rule=rule, lam=1.5)
    assert changed == len(list(module.parameters()))
    assert_same_parameters(module, load(tmp_path / "out"))
    assert not torch.equal(module.lm_head.weight, before.lm_head.weight)
    assert (module.lm_head.weight is module.model.embed_tokens.weight) == tied


def test_settings_reach_the_formula(job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"rule": "grad", "lam": -0.5, "p": 0.5, "alpha": 3.0, "threshold": 0.2}
    made = importances(job, tmp_path, "grad")
    apply(*job.checkpoints, *made, **settings, out=tmp_path / "out", progress=False)
    for backend in ("auto", "reference", "cpp"):
        module = load(job.model)
        caplog.clear()
        apply_to_module_(module, job.base, job.tuned, *made, **settings, backend=backend)
        assert_same_parameters(module, load(tmp_path / "out"))
        assert "lambda -0.5 is less than 0: the task vector is added" in caplog.text


def test_importance_in_memory_as_on_disk(job: Job, tmp_path: Path) -> None:
    made = importances(job, tmp_path, "fisher")
    in_memory = [estimate_importance(job.base, data, progress=False) for data in (job.forget, job.retain)]
    loaded = [Importance.load(path) for path in made]
    modules = []
    for given in (made, in_memory, loaded):
        modules.append(load(job.model))
        apply_to_module_(modules[-1], job.base, job.tuned, *given, rule="fisher")
    assert_same_parameters(modules[1], modules[0])
    assert_same_parameters(modules[2], modules[0])


def test_what_the_importance_does_not_cover_stays(job: Job) -> None:
    module, before = load(job.model), load(job.model)
    at = load(job.base)
    frozen = {EMBED, NORM}
    for name in frozen:
        at.get_parameter(name).requires_grad_(False)
    made = [estimate_importance(at, draw_samples(4, seed=k), progress=False) for k in (1, 2)]
    apply_to_module_(module, job.base, job.tuned, *made, rule="grad")
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)) == (name in frozen), name


def test_gradients_modes_and_identities_stay(job: Job) -> None:
    module = load(job.model).train()
    module.lm_head.weight.requires_grad_(False)
    gradient = module.model.norm.weight.grad = torch.ones_like(module.model.norm.weight)
    parameters = dict(module.named_parameters())
    apply_to_module_(module, job.base, job.tuned, rule="tv")
    assert dict(module.named_parameters()) == parameters
    assert module.training and module.model.norm.weight.grad is gradient
    assert not module.lm_head.weight.requires_grad and module.model.norm.weight.requires_grad


def test_autograd_knows_that_the_weights_have_changed(job: Job) -> None:
    module = load(job.model)
    loss = module(input_ids=torch.tensor([[4, 5, 6]])).logits.float().logsumexp(-1).sum()
    apply_to_module_(module, job.base, job.tuned, rule="tv")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Refusals, each before anything has changed.


def names_and_shapes(job: Job) -> dict[str, torch.Tensor]:
    return {name: torch.rand(each.shape) for name, each in load(job.model).named_parameters()}


def nan_in(tensor: torch.Tensor) -> torch.Tensor:
    """The same with its last value not a number."""
    damaged = tensor.detach().clone()
    damaged.view(-1)[-1] = float("nan")
    return damaged


CHECKPOINTS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor | None], str]] = {
    "missing": (NORM, lambda tensor: None, rf"tuned: lacks tensor {NORM}, which the module has"),
    "another shape": (
        NORM,
        lambda tensor: tensor[1:].clone(),
        rf"tensor {NORM}: shape \[32\] in the module, \[31\] in .*tuned",
    ),
    "another shape of the same size": (
        HEAD,
        lambda tensor: tensor.T.contiguous(),
        rf"tensor {HEAD}: shape \[300, 32\] in the module, \[32, 300\] in .*tuned",
    ),
    "not floating point": (NORM, lambda tensor: tensor.to(torch.int32), rf"tensor {NORM} is I32"),
    "float64": (NORM, lambda tensor: tensor.double(), rf"tensor {NORM} is F64"),
    "NaN": (NORM, nan_in, rf"tensor {NORM} has NaN or infinite values in .*tuned"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints_that_do_not_fit(case: str, job: Job, tmp_path: Path) -> None:
    name, change, reason = CHECKPOINTS[case]
    tensors = read_checkpoint(job.tuned)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    tuned = write_checkpoint(tmp_path / "tuned", tensors)
    assert_refused(load(job.model), job, tuned, [], "tv", reason)


IMPORTANCES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "NaN": (lambda t: t | {NORM: nan_in(t[NORM])}, rf"tensor {NORM} has NaN or infinite values in the importance"),
    "infinity": (lambda t: t | {NORM: t[NORM] / 0}, rf"tensor {NORM} has NaN or infinite values"),
    "another shape": (lambda t: t | {NORM: draw((31,))}, rf"tensor {NORM}: shape \[32\] .* \[31\] in the importance"),
    "one tensor fewer": (
        lambda t: {name: each for name, each in t.items() if name != NORM},
        rf"tensor {NORM} is in one importance and not in the other",
    ),
    "a tensor more": (lambda t: t | {"a": draw((2,))}, "the importance has tensor a, which the module lacks"),
    "of another model": (lambda t: {"a": draw((2,))}, "the importance has tensor a, which the module lacks"),
}


@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "on disk"])
@pytest.mark.parametrize("number", [0, 1], ids=["forget", "retain"])
@pytest.mark.parametrize("case", IMPORTANCES)
def test_importances_that_do_not_fit(case: str, number: int, saved: bool, job: Job, tmp_path: Path) -> None:
    change, reason = IMPORTANCES[case]
    tensors = [names_and_shapes(job), names_and_shapes(job)]
    tensors[number] = change(tensors[number])
    given: list[Any] = [write_importance(tmp_path / str(k), each, "grad") for k, each in enumerate(tensors)]
    if not saved:
        given = [Importance(each, Importance.load(path).metadata) for each, path in zip(tensors, given, strict=True)]
    assert_refused(load(job.model), job, job.tuned, given, "fisher", reason)


def test_importance_of_another_model_altogether(job: Job, tmp_path: Path) -> None:
    """Both cover nothing of the module: the same as doing nothing, had it not been refused."""
    made = [write_importance(tmp_path / name, {"a": draw((2,))}) for name in ("forget", "retain")]
    assert_refused(load(job.model), job, job.tuned, made, "grad", "has tensor a, which the module lacks")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda module: module.double(), r"is torch\.float64; it must be"),
        (lambda module: module.to("meta"), "is on the meta device"),
        (lambda module: setattr(module, "lm_head", strided(module.lm_head)), f"{HEAD} is not contiguous"),
        (lambda module: module.register_parameter("more", nn.Parameter(torch.ones(2))), "lacks tensor more, which"),
    ],
)
def test_modules_that_do_not_fit(change: Callable[[nn.Module], Any], reason: str, job: Job) -> None:
    module = load(job.model)
    change(module)
    assert_refused(module, job, job.tuned, [], "tv", reason)


def strided(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().T.contiguous().T)
    return linear


@pytest.mark.parametrize("rule", ["tv", "fisher"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "DeepSeek-V2", "GPT-OSS"])
def test_experts_that_transformers_has_joined(name: str, rule: str, tmp_path: Path) -> None:
    """A checkpoint keeps most of them apart, under other names."""
    family = next(each for each in FAMILIES if each.name == name)
    paths = [write(build(family, seed), tmp_path / str(seed)) for seed in (1, 2, 3)]
    made: list[Path] = []
    for seed in () if rule == "tv" else (4, 5):
        made.append(tmp_path / f"importance-{seed}")
        estimate_importance(paths[1], draw_samples(3, seed=seed), out=made[-1], progress=False)
    apply(*paths, *made, rule=rule, lam=1.5, out=tmp_path / "out", progress=False)
    module, before = load(paths[0]), load(paths[0])
    assert apply_to_module_(module, *paths[1:], *made, rule=rule, lam=1.5) >= len(list(module.parameters()))
    assert_same_parameters(module, load(tmp_path / "out"))
    joined = [each for each, _ in module.named_parameters() if each.endswith("experts.gate_up_proj")]
    assert joined
    assert not any(torch.equal(module.get_parameter(each), before.get_parameter(each)) for each in joined)


def test_what_is_stored_in_another_order_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """No family is known to do so."""

    def reversed_(module: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: each.flip(0) for name, each in tensors.items()}

    monkeypatch.setattr(stored_names, "as_stored", reversed_)
    assert_refused(load(job.model), job, job.tuned, [], "tv", "parameter .* are stored in another order")


@pytest.mark.parametrize(
    ("given", "settings", "reason"),
    [
        ([], {}, "rule fisher needs forget_importance"),
        (["forget"], {}, "rule fisher needs retain_importance"),
        (["forget", "retain"], {"rule": "tv"}, "rule tv takes no importance"),
        (["forget", "retain"], {"rule": "empirical-fisher"}, "forget_importance: holds estimator grad, rule empirical"),
        (["forget", "retain"], {"lam": float("nan")}, "lam is nan"),
        (["forget", "retain"], {"lam": None}, "lam is None"),
        (["forget", "retain"], {"common_rows": "no"}, "common_rows is 'no'"),
        (["forget", "absent"], {}, "absent: no such directory"),
    ],
)
def test_settings_that_do_not_fit(
    given: list[str], settings: dict[str, Any], reason: str, job: Job, tmp_path: Path
) -> None:
    for name in ("forget", "retain"):
        write_importance(tmp_path / name, names_and_shapes(job), "grad")
    with pytest.raises(InputError, match=reason):
        apply_to_module_(load(job.model), job.base, job.tuned, *(tmp_path / name for name in given), **settings)


def assert_refused(module: nn.Module, job: Job, tuned: Path, given: list[Any], rule: str, reason: str) -> None:
    before = {name: each.detach().clone() for name, each in module.named_parameters()}
    with pytest.raises(InputError, match=reason):
        apply_to_module_(module, job.base, tuned, *given, rule=rule)
    for name, parameter in module.named_parameters():
        assert parameter.is_meta or same_bytes(parameter.detach(), before[name])


@pytest.mark.parametrize("rule", ["grad", "fisher"])
def test_by_a_ratio_as_the_output_of_apply(rule: str, job: Job, tmp_path: Path) -> None:
    """From its files, made when it is asked for, in memory, and from the directory of both importances."""
    pair = importances(job, tmp_path / "both", rule)
    made = ImportanceRatio.of(*pair)
    made.save(tmp_path / "ratio")
    how: dict[str, Any] = {"rule": rule, "lam": 1.5, "alpha": 4.0, "threshold": 0.1}
    apply(*job.checkpoints, importance=tmp_path / "ratio", **how, out=tmp_path / "out", progress=False)
    expected = load(tmp_path / "out")
    in_memory = ImportanceRatio({name: made.tensors[name] for name in made.tensors}, made.metadata)
    for given in (tmp_path / "ratio", ImportanceRatio.load(tmp_path / "ratio"), made, in_memory):
        module = load(job.model)
        changed = apply_to_module_(module, job.base, job.tuned, importance=given, **how)
        assert changed == len(list(module.parameters()))
        assert_same_parameters(module, expected)
    module, by_pair = load(job.model), load(job.model)
    apply_to_module_(module, job.base, job.tuned, importance=tmp_path / "both", **how)
    apply_to_module_(by_pair, job.base, job.tuned, *pair, **how)
    assert_same_parameters(module, by_pair)


def test_what_is_no_ratio_is_refused(job: Job, tmp_path: Path) -> None:
    pair = importances(job, tmp_path, "grad")
    made = ImportanceRatio.of(*pair)
    before, module = load(job.model), load(job.model)

    def refused(message: str, *given: Any, **settings: Any) -> None:
        with pytest.raises(InputError, match=message):
            apply_to_module_(module, job.base, job.tuned, *given, **settings)
        assert_same_parameters(module, before)

    tensors = {name: made.tensors[name] for name in made.tensors}
    for value in (-1.0, float("nan")):
        wrong = tensors[NORM].clone()
        wrong[3] = value
        bad = ImportanceRatio(tensors | {NORM: wrong}, made.metadata)
        refused(f"tensor {NORM} has values that are NaN or less than 0 in the ratio", importance=bad)
    refused("importance takes the place of", *pair, importance=made)
    refused("forget_importance is the ratio of two importances", made, pair[1])
    refused("importance is of one data set", importance=Importance.load(pair[0]))
    refused("rule tv takes no importance", importance=made, rule="tv")
    refused("ratio: holds estimator grad, rule empirical-fisher needs", importance=made, rule="empirical-fisher")
