"""A path that no file can have is bad input of every function that takes one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import perta_fast as pf
from perta_fast.demo import run_demo
from perta_fast.reporting import write_report
from perta_fast.runs.inspect import inspect
from tests.support.models import Job, llama

pytestmark = pytest.mark.usefixtures("one_thread")

IMPORTANCES = ("forget_importance", "retain_importance")
CHECKPOINTS = ("model", "base", "tuned")


@pytest.fixture(scope="module")
def good(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Arguments that are right, by name."""
    folder = tmp_path_factory.mktemp("good")
    values: dict[str, Any] = dict(zip(CHECKPOINTS, job.checkpoints, strict=True))
    values |= {"forget": job.forget, "retain": job.retain, "progress": False}
    for role in ("forget", "retain"):
        values[f"{role}_importance"] = folder / role
        pf.estimate_importance(job.base, values[role], out=folder / role, progress=False)
    pf.apply(*job.checkpoints, rule="tv", out=folder / "run", progress=False)
    return values | {"run": folder / "run"}


def call(function: Callable[..., object], good: dict[str, Any], names: tuple[str, ...], **changed: Any) -> None:
    function(**{name: good[name] for name in (*names, "progress")} | changed)


# function, arguments that are right, what else it needs, arguments that are wrong in turn
UNLEARNING = (*CHECKPOINTS, "forget", "retain")
CASES: list[tuple[Callable[..., object], tuple[str, ...], dict[str, Any], tuple[str, ...]]] = [
    (pf.apply, (*CHECKPOINTS, *IMPORTANCES), {"out": "o"}, (*CHECKPOINTS, *IMPORTANCES, "out")),
    (pf.apply, CHECKPOINTS, {"rule": "tv", "in_place": True}, CHECKPOINTS),
    (pf.unlearn, UNLEARNING, {"out": "o", "rule": "fisher"}, (*UNLEARNING, "out", "save_importance")),
    (pf.unlearn, UNLEARNING, {"out": "o"}, (*UNLEARNING, "out", "save_tuned")),
    (
        pf.unlearn,
        UNLEARNING,
        {"out": "o", "rule": "fisher", "stream": True, "lam": 1.0},
        (*UNLEARNING, "out", "save_importance"),
    ),
    (pf.sweep, UNLEARNING, {"out": "o", "lams": [1.0]}, (*UNLEARNING, "out", "gold", *IMPORTANCES)),
    (pf.sweep, UNLEARNING, {"out": "o", "lams": [1.0], "max_retain_increase": 9.0}, ("checkpoint",)),
    (pf.tune, ("base", "forget"), {"out": "o"}, ("base", "forget", "out")),
    (pf.evaluate, ("forget", "retain"), {"model_or_path": "m", "holdout": "h"}, ("forget", "reference", "out")),
    (pf.evaluate, (), {"model_or_path": "m", "suite": "tofu"}, ("data",)),
]


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
@pytest.mark.parametrize(
    ("function", "names", "others", "wrong"), [(*case[:3], role) for case in CASES for role in case[3]]
)
def test_functions_of_paths(
    function: Callable[..., object],
    names: tuple[str, ...],
    others: dict[str, Any],
    wrong: str,
    name: str,
    good: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pf.InputError, match=r"a(\\x00|\\ud800)b"):
        call(function, good, names, **others | {wrong: f"{name}.json" if wrong == "out" else name})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_others(name: str, good: dict[str, Any], tmp_path: Path) -> None:
    importance, report = pf.Importance.load(good["forget_importance"]), pf.Report.load(good["run"])
    page, wrong = tmp_path / "page.html", tmp_path / name
    module = llama()
    for action in (
        lambda: pf.verify(wrong),
        lambda: pf.resume(wrong),
        lambda: inspect(wrong).text(),
        lambda: importance.save(wrong),
        lambda: pf.Importance.load(wrong),
        lambda: report.save(wrong),
        lambda: pf.Report.load(wrong),
        lambda: pf.Report.read(wrong),
        lambda: run_demo(wrong, fast=True),
        lambda: pf.estimate_importance(wrong, good["forget"], progress=False),
        lambda: pf.estimate_importance(good["base"], wrong, progress=False),
        lambda: pf.estimate_importance(good["base"], good["forget"], out=wrong, progress=False),
        lambda: pf.evaluate(wrong, forget=good["forget"], progress=False),
        lambda: pf.apply_to_module_(module, wrong, good["tuned"], rule="tv"),
        lambda: pf.apply_to_module_(module, good["base"], wrong, rule="tv"),
        lambda: pf.apply_to_module_(module, good["base"], good["tuned"], wrong, good["retain_importance"]),
        lambda: write_report(wrong, page),
        lambda: write_report(good["run"], tmp_path / f"{name}.html"),
        lambda: write_report(good["run"], page, png=wrong),
        lambda: write_report(good["run"], page, sweeps=[wrong]),
        lambda: write_report(good["run"], page, evaluations=[wrong]),
        lambda: write_report(good["run"], page, prompts=wrong, show_text=True),
    ):
        with pytest.raises(pf.InputError, match=r"a(\\x00|\\ud800)b"):
            action()
    assert list(tmp_path.iterdir()) == []
