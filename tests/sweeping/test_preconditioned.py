"""Rule ``preconditioned`` in a sweep: every mu is a curve of its own, scored as what ``unlearn`` writes for it."""

import errno
import inspect
import json
import os
import tempfile
import weakref
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perta_fast import (
    InputError,
    Interrupted,
    Report,
    RunError,
    Sweep,
    apply,
    precondition,
    resume,
    sweep,
    unlearn,
    verify,
)
from perta_fast.models import loading
from perta_fast.runs import making_tuned
from perta_fast.scoring import live_model
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.sweeping import grid_walk
from perta_fast.sweeping import vectors as sweeping_vectors
from perta_fast.sweeping.request import BOUNDS, Request
from tests.checkpoints.test_adapters import make_adapter
from tests.support.checkpoints import fingerprint, read_checkpoint, same_bytes
from tests.support.models import Job, llama, tokenizer, write_job, write_lines
from tests.support.processors import have_instructions
from tests.sweeping.test_choice import ORIGINAL, row, table
from tests.sweeping.test_sweep import TEXTS, Jobs, losses, run, scores, text_jobs  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("one_thread")

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of samples of each pass over the inputs of linear maps."""
    seen: list[int] = []
    see = making_tuned.input_moments

    def counted(module: Any, maps: Any, samples: Any, *more: Any) -> Any:
        seen.append(len(samples))
        return see(module, maps, samples, *more)

    monkeypatch.setattr(making_tuned, "input_moments", counted)
    return seen


def assert_same_checkpoint(first: Path, second: Path) -> None:
    one, other = read_checkpoint(first), read_checkpoint(second)
    assert one.keys() == other.keys() and all(same_bytes(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("stored", "dtype", "at"), [(F32, None, None), (BF16, F32, "base")])
def test_the_scores_of_what_unlearn_writes(
    stored: torch.dtype,
    dtype: torch.dtype | None,
    at: Any,
    text_jobs: Jobs,  # noqa: F811
    tmp_path: Path,
    passes: list[int],
) -> None:
    job = text_jobs(stored)
    found = run(job, mu=[0.5, 20], lams=[3], at=at, dtype=dtype)
    assert passes == [len(TEXTS["retain"])]  # one serves both
    assert [(each.rule, each.mu, each.lam) for each in found.rows[1:]] == [
        ("preconditioned", 0.5, 3),
        ("preconditioned", 20, 3),
    ]
    assert losses(found.rows[1]) != losses(found.rows[2])
    for each in found.rows[1:]:
        out = tmp_path / f"{each.mu:g}"
        how: dict[str, Any] = {"mu": each.mu, "lam": 3, "at": at, "dtype": dtype, "check": False, "progress": False}
        report = unlearn(*job.checkpoints, job.forget, job.retain, **how, out=out)
        assert losses(each) == pytest.approx(scores(out, dtype or stored), rel=1e-6)
        assert report.preconditioned is not None
        (record,) = (one for one in found.preconditioned if one.mu == each.mu)
        assert (record.kept, record.samples, record.seen_at) == (
            report.preconditioned.kept,
            report.preconditioned.samples,
            report.preconditioned.seen_at,
        )


def test_the_checkpoint_of_what_is_chosen(job: Job, tmp_path: Path) -> None:
    found = run(
        job,
        rule=["tv", "preconditioned", "grad"],
        mu=[1, 10],
        lams=[1, 4],
        target_retain_loss=1000,
        out=tmp_path / "out",
        checkpoint=tmp_path / "chosen",
    )
    best = found.best
    assert best is not None
    how: dict[str, Any] = {"rule": best.rule, "lam": best.lam, "check": False, "progress": False}
    how |= {} if best.mu is None else {"mu": best.mu}
    unlearn(*job.checkpoints, job.forget, job.retain, **how, out=tmp_path / "alone")
    assert_same_checkpoint(tmp_path / "chosen", tmp_path / "alone")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["alone", "chosen", "out"]
    assert Sweep.read(tmp_path / "out" / "sweep.json").rows == found.rows


def test_the_report_of_the_checkpoint(job: Job, tmp_path: Path) -> None:
    """It says of θ_f and of the inputs what the report of ``unlearn`` says."""
    run(job, mu=7, lams=[2], target_retain_loss=1000, out=tmp_path / "out", checkpoint=tmp_path / "chosen")
    alone = unlearn(
        *job.checkpoints, job.forget, job.retain, mu=7, lam=2, out=tmp_path / "alone", check=False, progress=False
    )
    report = Report.load(tmp_path / "chosen")
    assert report.preconditioned == alone.preconditioned and report.settings["at"] == "model"
    assert report.inputs.keys() == alone.inputs.keys()
    assert verify(tmp_path / "chosen", progress=False).problems == []


def test_without_out_what_is_made_is_removed(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = run(job, lams=[1])
    assert found.rows[1].rule == "preconditioned" and list(tmp_path.iterdir()) == []


def test_inputs_of_a_float16_checkpoint_are_seen_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``precondition`` sees them, whatever type the settings are scored in."""
    have_instructions(monkeypatch, True)
    job = write_job(tmp_path / "job", torch.float16)
    seen: list[torch.dtype] = []
    load = making_tuned.Making._load

    def watched(self: Any) -> Any:
        subject, skeleton = load(self)
        seen.append(subject.module.dtype)
        return subject, skeleton

    monkeypatch.setattr(making_tuned.Making, "_load", watched)
    assert run(job, lams=[1], out=tmp_path / "out").settings["dtype"] == "float16"
    run(job, lams=[1], stream=True, out=tmp_path / "streamed")
    assert seen == [torch.float32] * 2


@pytest.mark.parametrize(
    ("stop_at", "made"), [((live_model.ScoredModel, "score"), 0), ((grid_walk, "score_versions"), 1)], ids=str
)
def test_what_was_made_is_not_made_again(
    stop_at: tuple[Any, str], made: int, job: Job, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"mu": [1, 10], "lams": [1, 2]}

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(*stop_at, stop)
        with pytest.raises(Interrupted if made else KeyboardInterrupt):
            run(job, **how, out=tmp_path / "out")
    assert len(passes) == made
    found = resume(tmp_path / "out", progress=False) if made else run(job, **how, out=tmp_path / "out")
    assert len(passes) == 1
    assert isinstance(found, Sweep)
    assert list(map(losses, found.rows)) == list(map(losses, run(job, **how).rows))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sweep.json"]


def test_a_failure_while_it_is_made_keeps_what_was_scored(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later run makes every θ_f."""

    def fail(*_: Any) -> None:
        raise RunError("a failure")

    with monkeypatch.context() as patched:
        patched.setattr(making_tuned.Making, "run", fail)
        with pytest.raises(RunError, match="a failure"):
            run(job, lams=[1], mu=[1, 2], out=tmp_path / "out")
    found = resume(tmp_path / "out", progress=False)
    assert [each.mu for each in found.rows] == [None, 1, 2]


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_disk_is_full_while_it_is_made(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(making_tuned.Making, "_write", full_disk)
        with pytest.raises(RunError, match=rf"^{out}: could not be written: .* finish it with: perta resume {out}$"):
            run(job, lams=[1], out=out)
    assert [row.rule for row in resume(out, progress=False).rows] == ["", "preconditioned"]
    assert list(tmp_path.iterdir()) == [out]


def test_no_room_for_temporary_files(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reason = "temporary files cannot hold what rule preconditioned makes: .* Give out, .* or set TMPDIR"
    with monkeypatch.context() as patched, pytest.raises(RunError, match=reason):
        patched.setattr(making_tuned.Making, "_write", full_disk)
        run(job, lams=[1])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    with pytest.raises(RunError, match=reason):
        run(job, lams=[1])
    assert len(run(job, rule="tv", lams=[1]).rows) == 2  # which makes nothing


def test_numbers_of_other_kinds(job: Job) -> None:
    """The record of a sweep is JSON, which has Python's own numbers alone."""
    arguments: dict[str, Any] = {
        name: parameter.default for name, parameter in inspect.signature(sweep).parameters.items()
    }
    roles = ("model", "base", "tuned", "forget", "retain")
    arguments |= dict(zip(roles, (*job.checkpoints, job.forget, job.retain), strict=True))
    for number in (np.int64, np.float32, Fraction, torch.tensor):
        request = Request.of(arguments | {"mu": number(3), "alpha": [number(2), 1], "lams": [number(1)]})
        assert json.loads(json.dumps(asdict(request)))["mus"] == [3.0]
        assert (request.alphas, request.lams) == ([2.0, 1.0], [1.0])
    numbers: dict[str, Any] = {
        "threshold": 0.5,
        "batch_size": 4,
        "max_length": 64,
        "memory": 1 << 30,
        "device_memory": 1,
        "threads": 2,
    }
    numbers |= dict.fromkeys(BOUNDS, 0.25)
    kinds = {name: np.float64 if isinstance(value, float) else np.int64 for name, value in numbers.items()}
    given: dict[str, Any] = {name: kinds[name](value) for name, value in numbers.items()} | {
        "overwrite": np.bool_(True)
    }
    request = json.loads(json.dumps(asdict(Request.of(arguments | given))))
    assert {name: request[name] for name in given} == numbers | {"overwrite": True}
    for name, kind in kinds.items():
        bad, words = ("much", "a number") if kind is np.float64 else (2.5, "a whole number")
        with pytest.raises(InputError, match=f"{name.replace('_', '.')} is {bad!r}, not {words}$"):
            Request.of(arguments | {name: bad})


def test_the_disk_is_too_small(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping_vectors, "vector_size", lambda *_: 1 << 60)
    with pytest.raises(RunError, match=r"needs .* GB of disk space, .* nothing was written"):
        run(job, lams=[1], out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_one_model_at_a_time(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.nn.Module]] = []

    def watched(load: Any) -> Any:
        def watching(*arguments: Any, **settings: Any) -> Any:
            if settings.get("structure") is not None:  # without weights
                return load(*arguments, **settings)
            assert [ref for ref in alive if ref() is not None] == []
            subject = load(*arguments, **settings)
            alive.append(weakref.ref(subject.module))
            return subject

        return watching

    for module in (loading, making_tuned):
        monkeypatch.setattr(module, "load_subject", watched(module.load_subject))
    run(job, lams=[2], mu=[1, 10], max_retain_rise=1000)
    assert len(alive) == 3  # to score lambda 0, to see the inputs, to score the rest


def test_an_adapter_as_tuned(text_jobs: Jobs, tmp_path: Path) -> None:  # noqa: F811
    data = text_jobs(F32)
    adapter = make_adapter(tmp_path, llama, {"target_modules": ["q_proj", "up_proj"]})
    for name in ("model", "base"):
        tokenizer().save_pretrained(tmp_path / name)
    job = Job(tmp_path / "model", tmp_path / "base", adapter, data.forget, data.retain)
    found = run(job, mu=[2, 30], lams=[9])
    for each in found.rows[1:]:
        made, out = tmp_path / f"tuned {each.mu}", tmp_path / f"out {each.mu}"
        precondition(job.base, adapter, job.retain, made, model=job.model, mu=each.mu or 0.0, progress=False)
        apply(job.model, job.base, made, rule="tv", lam=9, out=out, progress=False)
        assert losses(each) == pytest.approx(scores(out, F32), rel=1e-6)


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ({"rule": "fisher", "mu": 1}, "mu is for rule preconditioned; leave it out, or take that rule"),
        ({"rule": ["tv", "grad"], "mu": [1, 2]}, "mu is for rule preconditioned"),
        ({"mu": -1}, r"mu is -1\.0; it must be a number from 0 to 10000"),
        ({"mu": "3"}, r"mu\[0\] is '3', not a number"),
        ({"mu": np.array([[1.0, 2.0]])}, r"mu\[0\] is \[1\.0, 2\.0\], not a number"),
        ({"rule": ["preconditioned", "tv"], "alpha": [1, 2]}, "rule preconditioned, .* has no weights"),
        ({"rule": ["tv", "preconditioned"], "threshold": 0.5}, "rule tv has no weights"),
        ({"mu": [1, float("nan")]}, "mu is nan"),
        ({"mu": []}, "mu is empty"),
        ({"mu": [1, 1.0]}, "rule preconditioned with mu 1 and rule preconditioned with mu 1 are the same"),
        ({"alpha": 2}, "rule preconditioned, which is the default, has no weights"),
        ({"p": 2}, "rule preconditioned, which is the default, has no weights"),
        ({"tuned": "made"}, "made: is preconditioned already"),
        ({"only": "model.embed_tokens.*"}, "let the run change no linear map"),
    ],
)
def test_refusals(chosen: dict[str, Any], reason: str, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job")
    precondition(job.base, job.tuned, job.retain, tmp_path / "made", progress=False)
    arguments: dict[str, Any] = {name: getattr(job, name) for name in ("model", "base", "tuned", "forget", "retain")}
    if "tuned" in chosen:
        chosen = {"tuned": tmp_path / "made"}
    before = fingerprint(tmp_path)
    with pytest.raises(InputError, match=reason):
        sweep(**arguments | {"lams": [1], "progress": False} | chosen)
    assert fingerprint(tmp_path) == before


def mu_row(mu: float, lam: float, forget: float) -> ScoredSetting:
    return replace(row(lam, forget, 0.1, "preconditioned"), mu=mu)


def test_labels_and_what_is_to_be_doubted() -> None:
    rows = [mu_row(mu, lam, mu + lam) for mu in (1.0, 10.0, 100.0) for lam in (1.0, 2.0)]
    found = table(*rows, select="best-forget", limit=0.5)
    assert list(found.curves()) == [f"preconditioned, μ {mu}" for mu in (1, 10, 100)]
    assert found.rows[0] == ORIGINAL and found.label(found.rows[0]) == "original"
    assert found.warnings() == [
        "the chosen lambda, 2, is the largest that was tried; try larger ones too",
        "the chosen mu, 100, is the largest that was tried; try larger ones too",
    ]


def test_what_is_cut_is_said_once(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job")
    write_lines(job.retain, [{"text": "Rivers run to the sea. " * 40}])
    write_lines(job.forget, [{"text": "A door."}])
    found = run(job, rule=["preconditioned", "tv"], mu=[1, 2], lams=[1], max_length=8)
    cut = "1 of 1 retain samples were cut to the length limit"
    assert found.notes.count(f"warning: {cut}") == 1
    closest: dict[str, Any] = {"select": "closest", "gold": job.base, "lams": [-30, -3, 3, 30, 100]}
    run(job, mu=0, max_length=8, **closest, out=tmp_path / "out", checkpoint=tmp_path / "chosen")
    assert Report.load(tmp_path / "chosen").warnings.count(cut) == 1
