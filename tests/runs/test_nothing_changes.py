"""A task vector that is zero: every way in says so before any work, and ``allow_zero`` makes the copy."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perta_fast import apply_to_module_, cli, sweep, unlearn
from perta_fast.errors import InputError
from perta_fast.importance.store import Importance
from perta_fast.models import loading
from perta_fast.records.report import Report
from perta_fast.runs.apply import apply
from perta_fast.runs.inspect import inspect
from perta_fast.subtraction import task_vector
from tests.checkpoints.test_adapters import make_adapter, rename
from tests.support.checkpoints import draw, fingerprint, read_checkpoint, same_bytes, write_checkpoint, write_importance
from tests.support.inputs import BF16, F16, F32
from tests.support.models import Job, llama, write_job

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]

TENSORS = {"one": draw((40, 3), seed=1), "two": draw((7,), seed=2), "three": draw((0, 3))}
CHANGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "the same bytes": lambda tensors: tensors,
    "the same values in another type": lambda tensors: {name: tensor.half() for name, tensor in tensors.items()},
    "zeros of another sign": lambda tensors: {
        name: torch.where(tensor == 0, -tensor, tensor) for name, tensor in tensors.items()
    },
}


@pytest.fixture(autouse=True)
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the middle of small tensors is looked at as that of large ones is."""
    monkeypatch.setattr(task_vector, "_SAMPLE", 5)
    monkeypatch.setattr(task_vector, "_CHUNK", 16)


def write(folder: Path, base: dict[str, Tensor], tuned: dict[str, Tensor], shards: int = 1) -> tuple[Path, Path, Path]:
    """model, base and tuned."""
    tensors = {"model": TENSORS, "base": base, "tuned": tuned}
    model, base_path, tuned_path = (write_checkpoint(folder / role, of, shards) for role, of in tensors.items())
    return model, base_path, tuned_path


def half(zeros: bool = True) -> dict[str, Tensor]:
    """Values that float16 and bfloat16 both have, some of them zero."""
    return {name: (tensor * 4).round() / 4 * (tensor > 0 if zeros else 1) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("in_place", [False, True])
def test_equal_checkpoints_are_refused_and_nothing_is_left(change: str, in_place: bool, tmp_path: Path) -> None:
    paths = write(tmp_path, half(), CHANGES[change](half()), shards=2)
    before = fingerprint(tmp_path)
    where: dict[str, Any] = {"in_place": True} if in_place else {"out": tmp_path / "out"}
    with pytest.raises(
        InputError,
        match=r"tuned: nothing would change: it has the same values as .*base, so the task vector is zero.*allow_zero",
    ):
        apply(*paths, rule="tv", **where)
    assert fingerprint(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "base", "tuned"}
    report = apply(*paths, rule="tv", allow_zero=True, **where)
    assert report.warnings == [
        "no value of the model has changed: the task vector is zero wherever the run subtracts it"
    ]
    assert "no value of the model has changed" in report.summary()
    for name, tensor in read_checkpoint(tmp_path / ("model" if in_place else "out")).items():
        assert same_bytes(tensor, TENSORS[name])


@pytest.mark.parametrize("place", range(0, 120, 7))
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_one_element_that_differs_is_found_wherever_it_is(place: int, dtype: torch.dtype, tmp_path: Path) -> None:
    tuned = {name: tensor.to(dtype) for name, tensor in half(zeros=False).items()}
    tuned["one"].view(-1)[place] += 0.25
    paths = write(tmp_path, half(zeros=False), tuned)
    assert apply(*paths, rule="tv", out=tmp_path / "out").counts["subtracted"] == 1


@pytest.mark.parametrize("link", ["the same path", "hard", "soft"])
def test_one_checkpoint_under_two_names(link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base, tuned = write(tmp_path, half(), half())
    shutil.rmtree(tuned)
    if link == "soft":
        tuned.symlink_to(base)
    elif link == "hard":
        tuned.mkdir()
        (tuned / "model.safetensors").hardlink_to(base / "model.safetensors")
    else:
        tuned = base
    monkeypatch.delattr(task_vector, "_differ")  # nothing is read for it
    with pytest.raises(InputError, match="is the same checkpoint as base" if link != "hard" else "has the same values"):
        apply(model, base, tuned, rule="tv", out=tmp_path / "out")


def test_only_what_the_importances_cover_counts(tmp_path: Path) -> None:
    paths = write(tmp_path, TENSORS, TENSORS | {"two": draw((7,), seed=9)})
    importances = [write_importance(tmp_path / role, {"one": TENSORS["one"]}) for role in ("forget", "retain")]
    with pytest.raises(InputError, match=r"has the same values as .* in all tensors that the importances cover"):
        apply(*paths, *importances, rule="grad", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    apply(*paths, *importances, rule="grad", out=tmp_path / "out", allow_zero=True)


def test_the_model_as_its_own_base_is_no_fault(tmp_path: Path) -> None:
    model, _, tuned = write(tmp_path, TENSORS, half())
    assert apply(model, model, tuned, rule="tv", out=tmp_path / "out").counts["subtracted"] == 2


def zero_factors(folder: Path, which: str) -> Path:
    adapter = make_adapter(folder, llama, {"target_modules": ["q_proj", "down_proj"]})
    rename(adapter, lambda tensors: {n: t * 0 if f"lora_{which}" in n else t for n, t in tensors.items()})
    return adapter


@pytest.mark.parametrize("which", ["A", "B"])
def test_an_adapter_that_was_not_trained(which: str, tmp_path: Path) -> None:
    adapter = zero_factors(tmp_path, which)
    paths = (tmp_path / "model", tmp_path / "base", adapter)
    for where in ({"out": tmp_path / "out"}, {"in_place": True}):
        before = fingerprint(tmp_path)
        with pytest.raises(InputError, match="adapter: nothing would change: factors A or B are all zero"):
            apply(*paths, rule="tv", **where)  # type: ignore[arg-type]
        assert fingerprint(tmp_path) == before
    module = llama()
    with pytest.raises(InputError, match="the task vector is zero in all parameters"):
        apply_to_module_(module, tmp_path / "base", adapter, rule="tv")
    assert "these add nothing" in inspect(adapter).text()
    apply(*paths, rule="tv", out=tmp_path / "out", allow_zero=True)
    found, model = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "model")
    assert all(same_bytes(found[name], model[name]) for name in model)


def test_an_adapter_that_was_trained_is_not_said_to_add_nothing(tmp_path: Path) -> None:
    assert "add nothing" not in inspect(make_adapter(tmp_path, llama, {"target_modules": ["q_proj"]})).text()


def test_a_live_module(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    base = write_checkpoint(tmp_path / "base", state)
    with pytest.raises(InputError, match="the task vector is zero in all parameters"):
        apply_to_module_(module, base, base, rule="tv")
    assert apply_to_module_(module, base, base, rule="tv", allow_zero=True) == 2
    assert all(same_bytes(tensor, state[name]) for name, tensor in module.state_dict().items())
    importance = {"weight": torch.ones(2, 3)}
    tuned = write_checkpoint(tmp_path / "tuned", state | {"bias": state["bias"] + 1})
    importances = [Importance.load(write_importance(tmp_path / role, importance)) for role in ("forget", "retain")]
    with pytest.raises(InputError, match="the task vector is zero in all parameters"):
        apply_to_module_(module, base, tuned, *importances, rule="grad")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("rule", ["tv", "fisher"])
def test_unlearn_says_so_before_it_loads_the_model(
    stream: bool, rule: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(loading, "load_subject")
    with pytest.raises(InputError, match="is the same checkpoint as base"):
        unlearn(
            job.model,
            job.base,
            job.base,
            job.forget,
            job.retain,
            rule=rule,
            stream=stream,
            out=tmp_path / "out",
            lam=1.0,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stream", [False, True])
def test_unlearn_makes_the_copy_that_is_asked_for(stream: bool, tmp_path: Path) -> None:
    job = write_job(tmp_path)
    unlearn(
        *(job.model, job.base, job.base, job.forget, job.retain),
        stream=stream,
        out=tmp_path / "out",
        allow_zero=True,
        lam=1.0,
        rule="fisher",
    )
    found, model = read_checkpoint(tmp_path / "out"), read_checkpoint(job.model)
    assert all(same_bytes(found[name], model[name]) for name in model)


def test_a_sweep_says_so_before_it_loads_the_model(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(loading, "load_subject")
    with pytest.raises(InputError, match=r"tuned on the forget data$"):
        sweep(job.model, job.base, job.base, job.forget, job.retain, lams=[1.0])


def test_the_command_ends_with_2(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["apply", "--model", job.model, "--base", job.base, "--tuned", job.base, "--rule", "tv", "--lam", "1"]
    command += ["--out", tmp_path / "out"]
    assert cli.main([*map(str, command)]) == 2
    assert "--allow-zero" in capsys.readouterr().err
    assert cli.main([*map(str, command), "--allow-zero"]) == 0
    assert "warning: no value of the model has changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lam", "dtype", "reason"), [(0.0, F32, "lambda is 0"), (1e-9, BF16, "all steps round to zero")]
)
def test_other_runs_that_change_nothing_say_why(lam: float, dtype: torch.dtype, reason: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", {"one": torch.ones(4, 5, dtype=dtype)})
    base = write_checkpoint(tmp_path / "base", {"one": draw((4, 5))})
    tuned = write_checkpoint(tmp_path / "tuned", {"one": draw((4, 5), seed=3)})
    apply(model, base, tuned, rule="tv", lam=lam, out=tmp_path / "out")
    (warning,) = Report.load(tmp_path / "out").warnings
    assert reason in warning
