"""A tuning that is stopped goes on, and gives the bytes of one that was not."""

import json
import math
import pickle
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from transformers import Trainer, TrainerCallback

import perta_fast as pf
from perta_fast import cli
from perta_fast.files import new_directory
from perta_fast.files.durable import read_record, write_record
from perta_fast.files.hashing import hash_file
from perta_fast.resuming import is_unfinished
from perta_fast.tuning import training, tuned_model, unfinished
from tests.fuzz.test_damaged_files import examples
from tests.support.checkpoints import fingerprint
from tests.support.json_mutation import damaged
from tests.support.models import Job, write_job, write_lines
from tests.support.processors import have_instructions

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {"batch_size": 2, "epochs": 3, "lr": 1e-2, "progress": False}


class Stop(BaseException):
    """As a kill: nothing of our own catches it."""


@pytest.fixture(scope="module", autouse=True)
def at_every_step() -> Iterator[None]:
    """A state is kept at every step, and progress is told at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unfinished, "_LEAST_WAIT", 0.0)
        patch.setattr(unfinished, "_LARGEST_SHARE", float("inf"))
        patch.setattr("perta_fast.progress._INTERVAL", 0.0)
        yield


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], tuple[pf.Tuning, Path]]:
    """A tuning that was not stopped, of an adapter or ``full``: its record and its directory."""

    @cache
    def made(full: bool) -> tuple[pf.Tuning, Path]:
        out = tmp_path_factory.mktemp("whole") / "out"
        return tune(job, out, full=full), out

    return made


@pytest.fixture(scope="module")
def stopped_once(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.raises(Stop):
        tune(job, out, progress=stopping(5))
    return out


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """Where the result of a tuning belongs that was stopped after its third step, which the state lacks."""
    shutil.copytree(hidden(stopped_once), hidden(tmp_path / "out"))
    return tmp_path / "out"


def change_record(out: Path, **changes: Any) -> None:
    """Change what the record of a stopped tuning says; its hash fits."""
    path = hidden(out) / ".perta-tuning" / "begun.json"
    write_record(path, read_record(path) | changes)


def stopping(samples: int, phase: str = "tuning", error: BaseException | None = None) -> Callable[[pf.Event], None]:
    """Stops the run when so much of a phase is done."""

    def stop(event: pf.Event) -> None:
        if event.phase == phase and event.done >= samples:
            raise error or Stop

    return stop


def tune(job: Job, out: Path, **settings: Any) -> pf.Tuning:
    return pf.tune(job.base, job.forget, out, **SETTINGS | settings)


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def hidden(out: Path) -> Path:
    return out.with_name(f".{out.name}.perta-partial")


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "checkpoint"])
@pytest.mark.parametrize("where", [(4, "tuning"), (5, "tuning"), (9, "tuning"), (3, "loss after tuning")])
def test_it_goes_on_to_the_same_bytes(
    where: tuple[int, str], full: bool, job: Job, whole: Callable[[bool], tuple[pf.Tuning, Path]], tmp_path: Path
) -> None:
    """Stopped within an epoch, at its end, and when the training is done."""
    out = tmp_path / "out"
    with pytest.raises(Stop):
        tune(job, out, full=full, progress=stopping(*where))
    assert list(tmp_path.iterdir()) == [hidden(out)]
    is_as_whole(pf.resume(out, progress=False), out, *whole(full))
    assert list(tmp_path.iterdir()) == [out]


def is_as_whole(record: object, out: Path, whole: pf.Tuning, directory: Path, stops: int = 1) -> None:
    """A tuning that was stopped has given what an uninterrupted one gives."""
    assert isinstance(record, pf.Tuning)
    assert weights(out) == weights(directory)
    assert {path.name for path in out.iterdir()} == {path.name for path in directory.iterdir()}
    assert (record.epoch_losses, record.loss_before) == (whole.epoch_losses, whole.loss_before)
    assert (record.loss_after, record.resumed) == (whole.loss_after, stops)


def test_a_stop_before_the_result_has_its_name(
    stopped: Path, whole: Callable[[bool], tuple[pf.Tuning, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is there still; before, it was removed first, and the result with it."""
    with monkeypatch.context() as patched:
        patched.setattr(new_directory, "move", interrupted)
        with pytest.raises(pf.Interrupted, match=f"what was learnt is kept; go on with: perta resume {stopped}$"):
            pf.resume(stopped, progress=False)
    assert list(stopped.parent.iterdir()) == [hidden(stopped)]
    record = pf.resume(stopped, progress=False)
    is_as_whole(record, stopped, *whole(False), stops=2)
    assert list(stopped.parent.iterdir()) == [stopped]


def test_a_stop_after_the_result_has_its_name(
    job: Job, stopped: Path, whole: Callable[[bool], tuple[pf.Tuning, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is left is to move what was reported, and to remove the state."""
    (hidden(stopped) / ".perta-tuning" / "runs").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(tuned_model, "clear_up", interrupted)
        said = f"the result is complete, in {stopped}; remove what is left of its state with: perta resume {stopped}$"
        with pytest.raises(pf.Interrupted, match=said):
            pf.resume(stopped, progress=False)
    assert list(stopped.parent.iterdir()) == [stopped] and is_unfinished(stopped)
    with pytest.raises(pf.InputError, match=f"finish it with: perta resume {stopped}"):
        tune(job, stopped)
    record = pf.resume(stopped, progress=False)
    assert list(stopped.glob("runs")) and not is_unfinished(stopped)
    (stopped / "runs").rmdir()
    is_as_whole(record, stopped, *whole(False))


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_same_command_goes_on_too(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice stopped, by Ctrl-C, with data to hold and numbers of NumPy's; another command is refused."""
    held: dict[str, Any] = {"retain": job.retain, "retain_kl": np.float32(0.5), "epochs": np.int64(3)}
    tune(job, tmp_path / "whole", **held)
    out = tmp_path / "out"
    for samples in (4, 9):
        with pytest.raises(pf.Interrupted, match=f"what was learnt is kept; go on with: perta resume {out}"):
            tune(job, out, progress=stopping(samples, error=KeyboardInterrupt()), **held)
    with pytest.raises(pf.InputError, match="another run to this place was stopped; finish it with: perta resume"):
        tune(job, out, **held | {"seed": 3})
    asked = ["apply", "--model", job.model, "--base", job.base, "--tuned", job.tuned, "--rule", "tv", "--lam", 1]
    assert cli.main([*map(str, asked), "--out", str(out)]) == 2
    assert "perta resume" in capsys.readouterr().err
    record = tune(job, out, **held)
    assert record.resumed == 2
    assert weights(out) == weights(tmp_path / "whole")
    assert json.loads((out / "perta_tune.json").read_text())["epoch_divergences"] == record.epoch_divergences
    assert not hidden(out).exists()


def test_overwrite_starts_over(job: Job, stopped: Path) -> None:
    assert tune(job, stopped, overwrite=True, seed=3).resumed == 0
    assert not hidden(stopped).exists()


def test_what_no_run_has_written_is_not_replaced(job: Job, stopped: Path) -> None:
    """The record alone says that it may be: neither resume nor the same call takes that as enough."""
    change_record(stopped, overwrite=True)
    stopped.mkdir()
    (stopped / "mine").touch()
    for go_on in ways_on(job, stopped):
        with pytest.raises(pf.InputError, match="out: holds what no run has written; move it away"):
            go_on()
    assert [path.name for path in stopped.iterdir()] == ["mine"]


def test_inputs_that_changed_are_refused(job: Job, stopped: Path) -> None:
    kept = fingerprint(hidden(stopped))
    for path, content in ((job.base / "config.json", b" "), (job.forget, b'{"text": "More."}\n')):
        before = path.read_bytes()
        path.write_bytes(before + content)
        try:
            with pytest.raises(pf.InputError, match=f"{path.name}: has changed since the tuning began"):
                pf.resume(stopped, progress=False)
        finally:
            path.write_bytes(before)
    assert fingerprint(hidden(stopped)) == kept


def test_a_record_that_is_damaged_is_refused(stopped: Path) -> None:
    record = hidden(stopped) / ".perta-tuning" / "begun.json"
    record.write_bytes(record.read_bytes()[:-9])
    with pytest.raises(pf.InputError, match=r"begun\.json"):
        pf.resume(stopped, progress=False)


@given(data=st.data())
@examples(ordinary=25, soak=1000)
def test_a_forged_record_is_refused_or_one_that_tune_could_have_written(
    data: st.DataObject, stopped_once: Path
) -> None:
    content = read_record(hidden(stopped_once) / ".perta-tuning" / "begun.json")
    with pytest.MonkeyPatch.context() as patch, suppress(pf.InputError):
        patch.setattr(unfinished, "read_record", lambda *_: data.draw(damaged(content)))
        begun = unfinished.Begun.load(stopped_once)
        assert begun is not None
        assert begun.checkpoint == f"checkpoint-{len(begun.losses)}"
        json.dumps(asdict(begun), allow_nan=False)


def test_a_record_that_no_tuning_has_written_is_refused(job: Job, stopped: Path) -> None:
    kept = read_record(hidden(stopped) / ".perta-tuning" / "begun.json")
    words = "by another version of perta_fast, or its record is damaged"
    for changes, expected in (
        ({"request": kept["request"] | {"epochs": 0}}, "epochs is 0"),
        ({"request": kept["request"] | {"lr": math.inf}}, "lr is inf"),
        ({"day": "today"}, "is 'today'"),
        ({"device": "moon"}, "'moon'"),
        ({"checkpoint": "../checkpoint-2"}, "checkpoint is '../checkpoint-2'"),
        ({"losses": [*kept["losses"][:-1], math.nan]}, "the number nan"),
        ({"divergences": [1.0]}, "1 divergences of 2 steps"),
    ):
        change_record(stopped, **changes)
        for go_on in ways_on(job, stopped):
            with pytest.raises(pf.InputError, match=f"{words}.*{re.escape(expected)}.*start over with overwrite"):
                go_on()
        change_record(stopped, **kept)


def ways_on(job: Job, out: Path) -> list[Callable[[], object]]:
    """To go on with a stopped tuning."""
    return [lambda: tune(job, out), lambda: pf.resume(out, progress=False)]


def test_a_forged_state_is_refused(stopped: Path) -> None:
    """The record has its hashes, but it is no state of this model; pickled objects are never loaded."""
    (folder,) = (hidden(stopped) / ".perta-tuning").glob("checkpoint-*")
    hashes = read_record(folder.parent / "begun.json")["state"]
    step = json.loads((folder / "trainer_state.json").read_text()) | {"global_step": 1}
    for name, content in (
        ("trained.safetensors", b"{}"),
        ("trained.safetensors", save({"other": torch.zeros(1)})),
        ("trainer_state.json", b"[]"),
        ("trainer_state.json", json.dumps(step).encode()),
        ("optimizer.pt", pickle.dumps(Stop, 2)),
        ("optimizer.pt", pickle.dumps({"state": {}}, 2)),
        ("rng_state.pth", b""),
    ):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        change_record(stopped, state=hashes | {name: hash_file(folder / name)})
        with pytest.raises(pf.InputError, match="checkpoint-2: the kept state does not fit this model"):
            pf.resume(stopped, progress=False)
        (folder / name).write_bytes(before)


def test_a_device_that_fails_as_it_goes_on(stopped: Path) -> None:
    failure = RuntimeError("CUDA error: unspecified launch failure\nCompile with")
    message = r"^the device failed: CUDA error: unspecified launch failure; what was learnt is kept; go on with: perta"
    with pytest.raises(pf.RunError, match=message):
        pf.resume(stopped, progress=stopping(9, error=failure))
    assert pf.resume(stopped, progress=False)


def test_a_device_that_fails_says_nothing_of_the_state(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    before = fingerprint(hidden(stopped))
    monkeypatch.setattr(training, "load_file", fail)
    with pytest.raises(pf.RunError, match=r"^the device failed: CUDA error: unspecified launch failure; that was"):
        pf.resume(stopped, progress=False)
    assert fingerprint(hidden(stopped)) == before


class Counting(TrainerCallback):
    """A callback of the user's own."""


def test_it_goes_on_with_the_callbacks_and_the_device_that_it_began_with(
    job: Job, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_record(stopped, callbacks=["Counting"], overwrite=True)
    for go_on in ways_on(job, stopped):
        with pytest.raises(pf.InputError, match=r"was begun with the callbacks Counting.* repeat the call of tune"):
            go_on()
    with pytest.raises(pf.InputError, match="was stopped; finish it with the call of tune that began it, which has"):
        tune(job, stopped, seed=3)
    again = "the same call of tune, without overwrite, which has the callbacks"
    with pytest.raises(pf.Interrupted, match=f"go on with {again}"):
        tune(job, stopped, callbacks=[Counting()], progress=stopping(12, error=KeyboardInterrupt()))
    change_record(stopped, device="cuda", callbacks=[])
    with pytest.raises(pf.InputError, match=r"was begun with the callbacks \(none\)"):
        tune(job, stopped, callbacks=[Counting])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for go_on in ways_on(job, stopped):
        with pytest.raises(pf.InputError, match=r"was begun on cuda, and goes on there alone: .*finds no CUDA device"):
            go_on()


def test_it_goes_on_in_its_type_on_a_processor_of_another_kind(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the adapter lies a model in bfloat16."""
    have_instructions(monkeypatch, True)
    whole = tune(job, tmp_path / "whole")
    with pytest.raises(Stop):
        tune(job, tmp_path / "out", progress=stopping(5))
    have_instructions(monkeypatch, False)
    is_as_whole(pf.resume(tmp_path / "out", progress=False), tmp_path / "out", whole, tmp_path / "whole")
    assert weights(tune(job, tmp_path / "other") and tmp_path / "other") != weights(tmp_path / "whole")


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_state_that_is_damaged_is_refused(name: str, stopped: Path) -> None:
    """A bit would change the result unnoticed; transformers goes on without a file that is missing."""
    (path,) = (hidden(stopped) / ".perta-tuning").glob(f"checkpoint-*/{name}")
    content = path.read_bytes()
    for other in (content[:-9], content[:-9] + b"\0" + content[-8:], None):
        path.unlink() if other is None else path.write_bytes(other)
        with pytest.raises(pf.InputError, match="checkpoint-2: the kept state is damaged; start over with overwrite"):
            pf.resume(stopped, progress=False)


def test_work_that_another_process_has_finished_meanwhile(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at its record and the lock."""
    with monkeypatch.context() as patched:
        patched.setattr(unfinished.Begun, "check_inputs", lambda *_: hidden(stopped).rename(stopped))
        with pytest.raises(pf.RunError, match="another run has gone on with this tuning meanwhile"):
            pf.resume(stopped, progress=False)
    assert list(stopped.parent.iterdir()) == [stopped]


def test_rows_of_python_keep_nothing(job: Job, tmp_path: Path) -> None:
    """They would not be there when the run goes on."""
    with pytest.raises(KeyboardInterrupt):
        pf.tune(
            job.base,
            [{"text": "One."}, {"text": "Two."}],
            tmp_path / "out",
            **SETTINGS | {"progress": stopping(4, error=KeyboardInterrupt())},
        )
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_keeps_nothing(job: Job, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", [{"text": "One."}] * 4)
    with pytest.raises(pf.RunError, match="is not finite; nothing was written"):
        pf.tune(job.base, rows, tmp_path / "out", full=True, **SETTINGS | {"lr": 1e30})
    assert list(tmp_path.iterdir()) == [rows]


@pytest.mark.parametrize("failing", ["weights", "optimizer", "record"])
def test_a_state_that_cannot_be_written_does_not_end_the_training(
    failing: str,
    job: Job,
    whole: Callable[[bool], tuple[pf.Tuning, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The one before it stays, and no other is written."""
    save, write, kept = Trainer._save_checkpoint, unfinished.write_record, list[list[str]]()

    def limited(function: Callable[..., None], size: int, *arguments: Any) -> None:
        """As on a full disk once there is a state."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if kept and kept[-1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            function(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def seen(event: pf.Event) -> None:
        kept.append(sorted(path.name for path in hidden(tmp_path / "out").glob(".perta-tuning/checkpoint-*")))

    if failing == "record":
        monkeypatch.setattr(unfinished, "write_record", partial(limited, write, 20))
    else:
        size = 20_000 if failing == "weights" else 100_000
        monkeypatch.setattr(Trainer, "_save_checkpoint", lambda *given: limited(save, size, *given))
    record = tune(job, tmp_path / "out", progress=seen)
    assert kept[-1] == ["checkpoint-1"] + (["checkpoint-2"] if failing == "record" else [])
    (said,) = [text for text in caplog.messages if "state of the training" in text]
    assert said.startswith(f"{tmp_path / 'out'}: the state of the training is no longer kept: ")
    assert weights(tmp_path / "out") == weights(whole(False)[1])
    assert record.loss_after == whole(False)[0].loss_after
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_disk_that_is_nearly_full_keeps_no_state(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "_STATE_BYTES", 1 << 60)
    with pytest.raises(KeyboardInterrupt):
        tune(job, tmp_path / "out", progress=stopping(9, error=KeyboardInterrupt()))
    assert list(tmp_path.iterdir()) == []
