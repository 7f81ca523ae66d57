"""Steps and rate that follow from the number of rows, and data that is not to be forgotten."""

import json
from pathlib import Path

import pytest

import perta_fast as pf
from perta_fast import cli
from perta_fast.tuning.schedule import Schedule
from tests.support.models import FORGET, RETAIN, Job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("rows", "full", "batch_size", "epochs"),
    [
        (1, False, 4, 60),
        (10, False, 4, 20),
        (10, True, 4, 10),
        (40, False, 4, 10),
        (40, True, 4, 8),
        (100, False, 4, 10),
        (400, False, 4, 10),
        (400, True, 4, 8),
        (1000, False, 8, 10),
        (4000, False, 16, 10),
    ],
)
def test_what_follows_from_the_rows(rows: int, full: bool, batch_size: int, epochs: int) -> None:
    schedule = Schedule.of(rows, full, None, None, None)
    assert (schedule.batch_size, schedule.epochs, schedule.lr) == (batch_size, epochs, 1e-4 if full else 5e-4)
    assert schedule.chosen == ("batch_size", "epochs", "lr")


def test_what_was_given_stays() -> None:
    assert Schedule.of(10, False, 2, 3, 0.5) == Schedule(2, 3, 0.5)
    assert Schedule.of(10, False, 10, None, 0.5) == Schedule(10, 60, 0.5, ("epochs",))
    assert Schedule(10, 60, 0.5, ("epochs", "lr")).line() == "chosen for this number of rows: 60 epochs, rate 0.5"


def test_a_few_rows_are_learnt(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the record and the summary say what was chosen for them."""
    out = tmp_path / "out"
    asked = ["tune", "--base", job.base, "--forget", job.forget, "--lr", 0.02, "--full", "--out", out]
    assert cli.main(list(map(str, asked))) == 0
    record = json.loads((out / "perta_tune.json").read_text())
    assert record["settings"].items() >= {"batch_size": 4, "epochs": 15, "lr": 0.02}.items()
    assert (record["chosen"], record["role"], record["resumed"]) == (["batch_size", "epochs"], "forget", 0)
    assert record["loss_after"] < 1.0 < record["loss_before"]
    text = capsys.readouterr().out
    assert "chosen for this number of rows: batches of 4, 15 epochs\n" in text and "warning" not in text


def test_rows_that_are_not_learnt_well_are_a_warning(job: Job, tmp_path: Path) -> None:
    """If everything was chosen for them: the rate is too low for a model this small."""
    record = pf.tune(job.base, job.forget, tmp_path / "out", full=True, progress=False)
    assert record.loss_after > 0.1 and len(record.warnings) == 1
    assert "give more epochs or a" in record.warnings[0]


def test_other_data(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the same rows to forget, but for what the record and the summary call them; in Python also as a list."""
    rows = [*FORGET, *RETAIN]
    every = write_lines(tmp_path / "every.jsonl", rows)
    asked = ["tune", "--base", job.base, "--data", every, "--epochs", 1, "--out", tmp_path / "out"]
    assert cli.main(list(map(str, asked))) == 0
    text = capsys.readouterr().out
    assert "mean loss of the data: " in text and "forget" not in text
    record = json.loads((tmp_path / "out/perta_tune.json").read_text())
    assert (record["role"], record["data"]["path"]) == ("data", str(every))
    same = pf.tune(job.base, every, tmp_path / "same", epochs=1, progress=False)
    listed = pf.tune(job.base, data=rows, out=tmp_path / "listed", epochs=1, progress=False)
    assert (same.role, listed.role, listed.data["path"]) == ("forget", "data", "")
    weights = {(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "same", "listed")}
    assert len(weights) == 1


def test_one_of_the_two(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ({}, {"forget": job.forget, "data": job.forget}):
        with pytest.raises(pf.InputError, match="give either forget, the data to forget, or data"):
            pf.tune(job.base, out=tmp_path / "out", **wrong)
    with pytest.raises(pf.InputError, match="give out"):
        pf.tune(job.base, job.forget)
    with pytest.raises(SystemExit):
        cli.main(["tune", "--base", str(job.base), "--forget", "a", "--data", "b", "--out", str(tmp_path / "out")])
    assert "not allowed with" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_reports_go_where_transformers_sends_them(job: Job, tmp_path: Path) -> None:
    with pytest.raises(pf.InputError, match=r"report_to is 'nowhere'; transformers reports to one of .*wandb"):
        pf.tune(job.base, job.forget, tmp_path / "out", report_to="nowhere")
    with pytest.raises(pf.InputError, match="report_to: clearml is not installed: pip install clearml"):
        pf.tune(job.base, job.forget, tmp_path / "out", report_to=["clearml"])
    assert list(tmp_path.iterdir()) == []


def test_callbacks_are_called(job: Job, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Ear(TrainerCallback):
        heard: list[float] = []  # noqa: RUF012

        def on_log(self, args: object, state: object, control: object, logs: dict[str, float], **_: object) -> None:
            self.heard += [logs["loss"]] if "loss" in logs else []

    record = pf.tune(job.base, job.forget, tmp_path / "out", epochs=2, batch_size=16, callbacks=[Ear()], progress=False)
    assert Ear.heard == record.epoch_losses
