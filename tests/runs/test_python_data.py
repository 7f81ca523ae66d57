"""Runs on rows given in Python: the bits of a run on a file, a record that is honest, and what a later run says."""

import json
from pathlib import Path
from typing import Any

import pytest

import perta_fast as pf
from perta_fast.cli import main
from perta_fast.data.rows import load_rows
from perta_fast.data.samples import encode
from perta_fast.errors import InputError, Interrupted
from perta_fast.records.report import Report
from perta_fast.subtraction import to_directory
from perta_fast.sweeping import measuring
from tests.support.models import FORGET, RETAIN, Job, tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
WAYS: dict[str, dict[str, Any]] = {
    "by default": {"lam": 2.0},
    "searched": {},
    "fisher": {"rule": "fisher", "lam": 1.0},
    "tv": {"rule": "tv", "lam": 1.0},
    "streamed": {"rule": "grad", "lam": 1.0, "stream": True},
    "default, streamed": {"lam": 2.0, "stream": True},
}


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


@pytest.mark.parametrize("way", WAYS)
def test_the_bits_and_the_record_of_rows(way: str, job: Job, tmp_path: Path) -> None:
    chosen = WAYS[way] | {"progress": False}
    of_files = pf.unlearn(*job.checkpoints, job.forget, job.retain, out=tmp_path / "file", **chosen)
    of_rows = pf.unlearn(*job.checkpoints, FORGET, iter(RETAIN), out=tmp_path / "rows", **chosen)
    assert weights(tmp_path / "file") == weights(tmp_path / "rows")
    for role, record in of_rows.data.items():
        assert record == {**of_files.data[role], "path": ""}  # the hash is that of the file with these rows
        assert of_rows.recipe[role] == f"python:{record['blake3']}"
    if of_rows.check is not None:
        assert of_files.check is not None and of_rows.check.data == of_files.check.data
        assert "--forget FORGET.jsonl --retain RETAIN.jsonl" in of_rows.check.command
    assert Report.load(tmp_path / "rows").data == of_rows.data
    verified = pf.verify(tmp_path / "rows", progress=False)
    assert not verified.problems
    assert "forget data: rows given in Python, which are not kept" in verified.unchecked


def test_tokens_give_the_bits_of_their_rows(job: Job, tmp_path: Path) -> None:
    samples = {role: encode(load_rows(getattr(job, role)), tokenizer(), 128) for role in ("forget", "retain")}
    for name, data in {"file": (job.forget, job.retain), "tokens": (samples["forget"], samples["retain"])}.items():
        for rule in ("fisher", "preconditioned"):
            out = tmp_path / f"{name}-{rule}"
            report = pf.unlearn(*job.checkpoints, *data, rule=rule, lam=1.0, out=out, progress=False)
            assert report.check is not None and report.check.is_whole
    for rule in ("fisher", "preconditioned"):
        assert weights(tmp_path / f"file-{rule}") == weights(tmp_path / f"tokens-{rule}")
    with pytest.raises(InputError, match="system_prompt: the data is tokenised already; leave it out"):
        pf.unlearn(*job.checkpoints, *samples.values(), rule="fisher", lam=1.0, out=tmp_path / "o", system_prompt="Hi.")


def test_a_recipe_says_that_its_data_came_from_python(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pf.unlearn(*job.checkpoints, FORGET, RETAIN, rule="tv", lam=1.0, out=tmp_path / "out", progress=False)
    command = ["unlearn", "--recipe", tmp_path / "out" / "perta_report.json", "--out", tmp_path / "again", "--quiet"]
    assert main([*map(str, command)]) == 2
    assert "these rows given in Python are not kept; call the Python function again" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert main([*map(str, command), "--forget", str(job.forget), "--retain", str(job.retain)]) == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert f"forget data: {len(FORGET)} samples, rows given in Python" in capsys.readouterr().out


def test_a_stopped_run_is_resumed_without_its_rows(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its importances are on the disk; only the check, which reads data again, is left out, and says why."""
    final = tmp_path / "out"

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(to_directory, "write_model_card", stop)
        with pytest.raises(Interrupted, match=f"perta resume {final}"):
            pf.unlearn(*job.checkpoints, FORGET, RETAIN, rule="grad", lam=1.0, out=final, progress=False)
    report = pf.resume(final, progress=False)
    assert isinstance(report, Report) and report.check is not None
    assert report.check.left_out == "the forget data were rows given in Python, which are not kept"
    pf.unlearn(*job.checkpoints, job.forget, job.retain, rule="grad", lam=1.0, out=tmp_path / "whole", progress=False)
    assert weights(final) == weights(tmp_path / "whole")


def test_precondition(job: Job, tmp_path: Path) -> None:
    of_file = pf.precondition(job.base, job.tuned, job.retain, tmp_path / "file", progress=False)
    of_rows = pf.precondition(job.base, job.tuned, RETAIN, tmp_path / "rows", progress=False)
    assert weights(tmp_path / "file") == weights(tmp_path / "rows")
    assert of_rows.retain == {**of_file.retain, "path": ""}


@pytest.mark.parametrize("stream", [False, True])
def test_a_sweep(stream: bool, job: Job, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"rule": ["preconditioned", "fisher"], "lams": [1, 2], "stream": stream, "progress": False}
    of_files = pf.sweep(*job.checkpoints, job.forget, job.retain, out=tmp_path / "file", **chosen)
    of_rows = pf.sweep(*job.checkpoints, FORGET, RETAIN, out=tmp_path / "rows", **chosen)
    assert [row.forget_loss for row in of_rows.rows] == [row.forget_loss for row in of_files.rows]
    assert of_rows.data == {role: {**record, "path": ""} for role, record in of_files.data.items()}
    assert pf.Sweep.read(tmp_path / "rows" / "sweep.json").data == of_rows.data


def test_a_stopped_sweep_goes_on_by_the_same_call(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, measure, done = tmp_path / "sweep", measuring._measure, []

    def stopping(*arguments: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(measure(*arguments))
        return done[-1]

    def call() -> pf.Sweep:
        return pf.sweep(*job.checkpoints, FORGET, RETAIN, rule="tv", max_retain_rise=0.5, out=final, progress=False)

    with monkeypatch.context() as patched:
        patched.setattr(measuring, "_measure", stopping)
        with pytest.raises(Interrupted, match=r"Go on with: the same call, with the same rows$"):
            call()
    with pytest.raises(InputError, match="these rows given in Python are not kept; call the Python function again"):
        pf.resume(final, progress=False)
    with pytest.raises(InputError, match="another run to this place was stopped"):
        pf.sweep(*job.checkpoints, FORGET[1:], RETAIN, rule="tv", max_retain_rise=0.5, out=final, progress=False)
    assert done[0] in call().rows


def test_choose(job: Job, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"lams": [1, 2], "max_retain_rise": 5.0, "progress": False}
    pf.choose(*job.checkpoints, job.forget, job.retain, out=tmp_path / "file", **chosen)
    report = pf.choose(*job.checkpoints, FORGET, RETAIN, out=tmp_path / "rows", **chosen)
    assert weights(tmp_path / "file") == weights(tmp_path / "rows")
    assert report.recipe["retain"] == f"python:{report.data['retain']['blake3']}"


@pytest.mark.parametrize("stream", [False, True])
def test_evaluate(stream: bool, job: Job, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"stream": stream, "metrics": ["*_loss"], "progress": False}
    of_file = pf.evaluate(job.model, forget=job.forget, retain=job.retain, **chosen)
    of_rows = pf.evaluate(job.model, forget=FORGET, retain=RETAIN, out=tmp_path / "scores.json", **chosen)
    assert of_rows["forget_loss"] == of_file["forget_loss"]
    assert json.loads((tmp_path / "scores.json").read_text())["data"]["forget"]["path"] == ""
    tokens = encode(load_rows(job.forget), tokenizer(), 128)
    of_tokens = pf.evaluate(job.model, forget=tokens, **chosen)
    assert of_tokens["forget_loss"] == of_file["forget_loss"]
    assert of_tokens.settings["prompt"]["forms"] == ["tokens as they are"]
