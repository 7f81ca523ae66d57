"""What ``unlearn`` keeps of the importances: both or their ratio, in both types; in memory, streamed, in place."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import ImportanceRatio, InputError, Interrupted, Report, apply, resume, unlearn, verify
from perta_fast.importance.kept_form import KeptForm
from perta_fast.records.recipe import read_recipe
from perta_fast.streaming.write_behind import WriteBehind
from perta_fast.subtraction import to_directory
from tests.distributed.launch import on_ranks
from tests.support.checkpoints import read_checkpoint, same_bytes
from tests.support.children import perta
from tests.support.models import Job

pytestmark = pytest.mark.usefixtures("one_thread")

RATIO: dict[str, Any] = {"save_as": "ratio"}
FORMS: dict[str, dict[str, Any]] = {
    "ratio": RATIO,
    "wide ratio": {"save_as": "ratio", "importance_dtype": "float32"},
    "narrow pair": {"save_as": "pair", "importance_dtype": "bfloat16"},
}


def run(job: Job, out: Path | None, **settings: Any) -> Report:
    given = {"lam": 1.5, "rule": "fisher", "check": False, "progress": False, "out": out} | settings
    return unlearn(*job.checkpoints, job.forget, job.retain, **given)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("model*.safetensors")}


@pytest.mark.parametrize("form", FORMS)
def test_the_run_subtracts_with_what_it_keeps(form: str, job: Job, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    report = run(job, tmp_path / "out", save_importance=kept, **FORMS[form])
    apply(*job.checkpoints, importance=kept, rule="fisher", lam=1.5, out=tmp_path / "again", progress=False)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "again")
    result = verify(tmp_path / "out", full=True, progress=False)
    assert not result.problems and not result.unchecked and result.recomputed == len(report.tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "kept", "out"]  # nothing else is left
    run(job, tmp_path / "plain", save_importance=tmp_path / "pair")
    assert report.importance == Report.load(tmp_path / "plain").importance
    pair = [tmp_path / "pair" / side for side in ("forget", "retain")]
    if form == "narrow pair":
        for side, path in zip(("forget", "retain"), pair, strict=True):
            for name, tensor in read_checkpoint(path).items():
                assert same_bytes(read_checkpoint(kept / side)[name], tensor.bfloat16())
    else:
        ImportanceRatio.of(*pair, dtype=FORMS[form].get("importance_dtype", "bfloat16")).save(tmp_path / "ratio")
        assert files(kept) == files(tmp_path / "ratio")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", ["fisher", "empirical-fisher"])
def test_streamed_as_in_memory(form: str, rule: str, job: Job, tmp_path: Path) -> None:
    for way in (False, True):
        places = {"out": tmp_path / f"out {way}", "save_importance": tmp_path / f"kept {way}"}
        run(job, rule=rule, stream=way, **FORMS[form], **places)
    assert weights_of(tmp_path / "out False") == weights_of(tmp_path / "out True")
    assert files(tmp_path / "kept False") == files(tmp_path / "kept True")
    result = verify(tmp_path / "out True", full=True, progress=False)
    assert not result.problems and not result.unchecked


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stream", [False, True])
def test_in_place(form: str, stream: bool, job: Job, tmp_path: Path) -> None:
    run(job, tmp_path / "out", save_importance=tmp_path / "kept", **FORMS[form])
    job = replace(job, model=Path(shutil.copytree(job.model, tmp_path / "model")))
    run(job, None, in_place=True, stream=stream, save_importance=tmp_path / "other", **FORMS[form])
    assert weights_of(tmp_path / "model") == weights_of(tmp_path / "out")
    assert files(tmp_path / "kept") == files(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "model", "other", "out"]


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_directory_nothing_is_rounded(stream: bool, job: Job, tmp_path: Path) -> None:
    """Temporary files hold both importances in float32: a result does not depend on how the run was done."""
    run(job, tmp_path / "out", stream=stream)
    run(job, tmp_path / "kept out", save_importance=tmp_path / "kept")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "kept out")


@pytest.mark.parametrize("stage", ["subtraction", "walk", "end"])
@pytest.mark.parametrize("form", ["ratio", "narrow pair"])
def test_a_run_that_was_stopped_is_resumed(
    stage: str, form: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = stage != "subtraction"
    run(job, tmp_path / "whole", save_importance=tmp_path / "kept whole", **FORMS[form])
    steps = []
    complete = WriteBehind._complete

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def interrupted(*arguments: Any) -> None:
        steps.append(arguments[1])
        if len(steps) == 6:
            raise KeyboardInterrupt
        complete(*arguments)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        if stage == "walk":
            patched.setattr(WriteBehind, "_complete", interrupted)
        else:
            patched.setattr(to_directory, "describe_output", interrupt)
        run(job, tmp_path / "out", stream=streamed, save_importance=tmp_path / "kept", **FORMS[form])
    report = resume(tmp_path / "out", progress=False)
    assert isinstance(report, Report) and report.resumed == 1
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
    assert files(tmp_path / "kept") == files(tmp_path / "kept whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "kept whole", "out", "whole"]


def test_the_strength_is_searched_for_with_the_ratio(job: Job, tmp_path: Path) -> None:
    report = run(job, tmp_path / "out", lam=None, max_retain_rise=1.0, save_importance=tmp_path / "kept", **RATIO)
    assert report.choice is not None and report.lam == report.choice.after.lam
    assert not verify(tmp_path / "out", full=True, progress=False).problems


def _on_a_rank(group: Any, job: Job, folder: Path) -> Report:
    how: dict[str, Any] = {"batch_size": 1, "group": group}
    run(job, folder / "out", save_importance=folder / "kept", **RATIO, **how)
    return run(job, folder / "stream", stream=True, save_importance=folder / "streamed", **RATIO, **how)


def test_by_two_processes(job: Job, tmp_path: Path) -> None:
    outcomes = on_ranks(2, _on_a_rank, job, tmp_path)
    assert all(isinstance(report, Report) for report in outcomes), outcomes
    for out in ("out", "stream"):
        result = verify(tmp_path / out, full=True, progress=False)
        assert not result.problems and not result.unchecked
    assert {path.name for path in tmp_path.iterdir()} >= {"out", "kept", "stream", "streamed"}
    alone = tmp_path / "alone"
    run(job, alone, save_importance=tmp_path / "kept alone", batch_size=1, **RATIO)
    expected, found = (ImportanceRatio.load(tmp_path / name).tensors for name in ("kept alone", "kept"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():  # sums in another order may round to a neighbour
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=2**-6, atol=1e-6)


def test_the_command(job: Job, tmp_path: Path) -> None:
    pairs = zip(("model", "base", "tuned", "forget", "retain"), [*job.checkpoints, job.forget, job.retain], strict=True)
    inputs = [word for name, path in pairs for word in (f"--{name}", path)]
    words = ["unlearn", *inputs, "--rule", "fisher", "--lam", 1.5, "--no-check", "--out", tmp_path / "out"]
    done = perta(*words, "--save-importance", tmp_path / "kept", "--as", "ratio")
    assert done.returncode == 0, done.stderr
    run(job, tmp_path / "other", save_importance=tmp_path / "kept other", **RATIO)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "other")
    recipe = Report.load(tmp_path / "out").recipe
    assert recipe["as"] == "ratio"
    again = read_recipe(tmp_path / "out" / "perta_report.json").settings  # where the kept importances are not repeated
    assert not again.keys() & {"as", "save-importance", "importance-dtype"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_as": "ratio"}, "save_as says how importances are kept; give save_importance too"),
        ({"importance_dtype": "bfloat16"}, "importance_dtype says how importances are kept"),
        ({"save_as": "both", "save_importance": "kept"}, "save_as is 'both'; it must be pair or ratio"),
        ({"importance_dtype": "float16", "save_importance": "kept"}, "'float16'; it must be float32 or bfloat16"),
        ({"save_as": "ratio", "save_importance": "kept", "rule": "tv"}, "rule tv takes no importance"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str, job: Job, tmp_path: Path) -> None:
    settings = {name: tmp_path / value if name == "save_importance" else value for name, value in settings.items()}
    with pytest.raises(InputError, match=message):
        run(job, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_the_forms() -> None:
    assert KeptForm.of(None, None) == KeptForm(as_ratio=False, dtype="float32")
    assert KeptForm.of("ratio", None) == KeptForm(as_ratio=True, dtype="bfloat16")
    for form in (KeptForm(), KeptForm(as_ratio=True, dtype="float32")):
        assert KeptForm.of(form.name, form.dtype) == form
