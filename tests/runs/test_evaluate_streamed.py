"""An evaluation layer by layer: the numbers of a loaded model, whatever stops it on the way."""

import errno
import json
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from perta_fast import Evaluation, InputError, Interrupted, RunError, cli, evaluate, resume
from perta_fast.models import loading
from perta_fast.streaming import scratch_files
from perta_fast.streaming.forecast import choice
from perta_fast.streaming.forecast.forward_costs import ForwardEstimate
from perta_fast.streaming.forward import score_walk
from tests.distributed.launch import perta_on_ranks
from tests.evaluation.test_suites import HOLDOUT, TOFU, WORDS, write_muse, write_tofu
from tests.families.configs import FAMILIES
from tests.families.matrix import build, write
from tests.support.checkpoints import fingerprint
from tests.support.children import perta, signal_at
from tests.support.models import CHAT_TEMPLATE, FORGET, RETAIN, llama, tokenizer, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

BY_NAME = {family.name: family for family in FAMILIES}
STEPS = 4  # of one walk: embedding, two layers, head


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data of all kinds."""
    folder = tmp_path_factory.mktemp("place")
    for name, model in (("Llama", llama(1)), ("reference", llama(2)), ("gold", llama(3))):
        model.save_pretrained(folder / name, max_shard_size="40KB")
        WORDS.save_pretrained(folder / name)
    for name in ("Gemma 2", "Mixtral"):
        write(build(BY_NAME[name], 1), folder / name)
    for name, writing in (("tofu", write_tofu), ("muse", write_muse)):
        (folder / name).mkdir()
        writing(folder / name)
    for name, rows in (("forget", FORGET), ("retain", RETAIN), ("holdout", HOLDOUT)):
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def home(place: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(place, tmp_path / "home"))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files lie."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def suite(place: Path, name: str) -> dict[str, Any]:
    if name == "own":
        return {role: place / f"{role}.jsonl" for role in ("forget", "retain", "holdout")}
    return {"suite": name, "data": place / name, **({"split": "forget01"} if name == "tofu" else {})}


def streamed(home: Path, data: str = "tofu", model: str = "Llama", **changes: Any) -> Evaluation:
    options = suite(home, data) | {"stream": True, "batch_size": 3, "progress": False}
    return evaluate(home / model, **options | changes)


def in_memory(home: Path, data: str = "tofu", model: str = "Llama", **changes: Any) -> Evaluation:
    module = AutoModelForCausalLM.from_pretrained(home / model).eval()
    for parameter in module.parameters():  # from_pretrained leaves them at any address, on which last bits depend
        parameter.data = parameter.data.clone()
    words = AutoTokenizer.from_pretrained(home / model)
    options = suite(home, data) | {"tokenizer": words, "batch_size": 3, "max_new_tokens": 2, "progress": False}
    return evaluate(module, **options | changes)


def left_out(result: Evaluation) -> tuple[set[str], list[str]]:
    """The metrics that a streamed evaluation says it did not compute, and its other notes."""
    (note,) = (note for note in result.notes if note.startswith("not computed"))
    names = note.removeprefix("not computed, since they need more than token scores: ").split(", ")
    return set(names), [other for other in result.notes if other != note]


@pytest.mark.parametrize("data", ["tofu", "muse", "own"])
@pytest.mark.parametrize("model", ["Llama", "Gemma 2", "Mixtral"])
def test_the_numbers_of_a_model_in_memory(place: Path, data: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    live = in_memory(place, data, model)
    with monkeypatch.context() as patched:
        patched.setattr(loading, "_from_pretrained", lambda *_: pytest.fail("loads the model"))
        result = streamed(place, data, model)
    missing, notes = left_out(result)
    assert missing == {name for name in live.metrics if "ROUGE" in name or name == "model_utility"}
    assert result.metrics == {name: metric for name, metric in live.metrics.items() if name not in missing}
    assert notes == [note for note in live.notes if "ROUGE" not in note]
    assert result.data == live.data
    settings = live.settings | {"stream": True, "max_new_tokens": None}
    assert result.settings == settings


def test_compatible_and_with_references(place: Path, tmp_path: Path) -> None:
    """A gold model's file, a reference model, the conventions of open-unlearning, other words, a date: all at once."""
    in_memory(place, model="gold", compatible="open-unlearning", out=tmp_path / "gold.json")
    options: dict[str, Any] = {
        "reference": tmp_path / "gold.json",
        "reference_model": place / "reference",
        "compatible": "open-unlearning",
    }
    live, result = in_memory(place, **options), streamed(place, **options)
    assert {"forget_quality", "privleak", "mia_reference", "mia_min_k"} <= result.metrics.keys()
    for name in result.metrics:
        assert result.metrics[name] == live.metrics[name], name


def test_a_chat_template_and_chosen_metrics(home: Path) -> None:
    tokenizer(CHAT_TEMPLATE).save_pretrained(home / "Llama")
    how: dict[str, Any] = {"metrics": ["forget_loss", "retain_e*"], "system_prompt": "Be brief.", "max_length": 56}
    live, result = in_memory(home, "own", **how), streamed(home, "own", **how)
    assert result.metrics == live.metrics
    assert result.settings["prompt"] == live.settings["prompt"]
    assert result.notes == live.notes and any("cut to the length limit" in note for note in live.notes)


def test_the_memory_chooses_the_batch(home: Path, steps: "Steps", monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped evaluation goes on with the batch that it began with, whatever would fit by then."""
    fits = {"batch": 2}
    monkeypatch.setattr(choice, "_fits", lambda _, schedule, *__: schedule.batch_size <= fits["batch"])
    steps.after = 2
    with pytest.raises(Killed):
        streamed(home, out=home / "r.json", memory=1 << 40)
    steps.again()
    fits["batch"] = 1
    result = streamed(home, out=home / "r.json", memory=1 << 40)
    assert result.settings["batch_size"] == 2
    assert steps.done == STEPS - 2
    assert result.metrics == streamed(home, batch_size=2).metrics


def test_the_disk_has_room_for_half_of_the_samples(home: Path, steps: "Steps", monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a walk each; a stopped evaluation goes on with as many as it began with."""
    whole = streamed(home)
    free = {"bytes": 6}
    monkeypatch.setattr(ForwardEstimate, "scratch", lambda _, schedule: 12 // schedule.groups)
    monkeypatch.setattr(choice.Budget, "at", lambda *_: choice.Budget(free["bytes"]))
    steps.again()
    steps.after = STEPS + 2
    with pytest.raises(Killed):
        streamed(home, out=home / "r.json")
    steps.again()
    free["bytes"] = 4
    result = streamed(home, out=home / "r.json")
    assert steps.done == 2 * STEPS - STEPS - 2
    assert (result.metrics, result.settings) == (whole.metrics, whole.settings)


def test_a_memory_that_holds_no_layer(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"memory of \S+ \S+ cannot hold one part of the model: it needs at least"):
        streamed(place, memory=1 << 10, out=tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_both_models_fit_before_the_first_walk(home: Path, steps: "Steps", monkeypatch: pytest.MonkeyPatch) -> None:
    def fits(estimate: Any, *_: Any) -> bool:
        return bool(estimate.structure.checkpoint.path.name == "Llama")

    monkeypatch.setattr(choice, "_fits", fits)
    before = fingerprint(home)
    with pytest.raises(InputError):
        streamed(home, reference_model=home / "reference", memory=1 << 40, out=home / "r.json")
    assert steps.done == 0
    assert fingerprint(home) == before


@pytest.mark.parametrize("which", ["Llama", "reference"])
def test_a_quantised_model(home: Path, which: str) -> None:
    config = home / which / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match=f"{which}.*gptq"):
        streamed(home, reference_model=home / "reference")


def test_half_precision_is_close(place: Path) -> None:
    live = in_memory(place, metrics=["forget_Q_A_Prob"])
    result = streamed(place, metrics=["forget_Q_A_Prob"], dtype=torch.bfloat16)
    assert result["forget_Q_A_Prob"] == pytest.approx(live["forget_Q_A_Prob"], rel=0.1)
    assert result["forget_Q_A_Prob"] != live["forget_Q_A_Prob"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["model_utility"]}, "metrics: model_utility needs generated text"),
        ({"metrics": ["mia_gradnorm"]}, "metrics: mia_gradnorm needs gradients"),
        ({"stress": ["int8"]}, "stress needs the whole model in memory"),
        ({"lm_eval": ["hellaswag"]}, "lm_eval needs the whole model in memory"),
        ({"stream": False, "memory": 1 << 30}, "memory is for streamed runs; give stream too"),
        ({"stream": False, "device_memory": 1 << 30}, "device_memory is for streamed runs"),
    ],
)
def test_bad_arguments(place: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        streamed(place, out=tmp_path / "r.json", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_live_module(place: Path) -> None:
    with pytest.raises(InputError, match="stream is for checkpoint directories; a live module is in memory already"):
        in_memory(place, stream=True)


def test_a_reference_model_with_other_tokens(home: Path) -> None:
    words = AutoTokenizer.from_pretrained(home / "reference")
    words.add_tokens(["another"])
    words.save_pretrained(home / "reference")
    with pytest.raises(InputError, match="reference: its tokenizer has another vocabulary"):
        streamed(home, reference_model=home / "reference")


def test_a_layer_that_breaks_is_named(home: Path) -> None:
    for file in (home / "Llama").glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors.keys() & {"model.layers.1.mlp.down_proj.weight"}:
            tensors[name][:] = float("nan")
        save_file(tensors, file, {"format": "pt"})
    result = streamed(home, "own", out=home / "r.json")
    assert result.notes[-1] == f"{home / 'Llama'}: what layer 1 makes of forget sample 0 (counted from 0) is not finite"
    assert "forget: the loss of 5 of 5 samples is not finite" in result.notes
    assert json.loads((home / "r.json").read_text())["metrics"]["forget_loss"]["agg_value"] is None


def test_without_a_file_nothing_is_left(place: Path, temporary: Path) -> None:
    before = fingerprint(place)
    seen = []
    step = score_walk._ScoreWalk._step

    def looking(self: Any, *what: Any) -> None:
        step(self, *what)
        seen.append(sum(file.is_file() for file in temporary.rglob("*")))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(score_walk._ScoreWalk, "_step", looking)
        streamed(place)
    assert min(seen) > 0
    assert list(temporary.iterdir()) == []
    assert fingerprint(place) == before


class Killed(BaseException):
    """In place of a signal: nothing that catches errors catches it."""


class Steps:
    """Counts the steps of walks, and stops at one. after: steps that are recorded first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.recorded = 0, 0
        self.after: int | None = None
        self.error: BaseException = Killed()
        step, record = score_walk._ScoreWalk._step, score_walk._ScoreWalk.record

        def counted(walk: Any, *what: Any) -> None:
            self.done += 1
            step(walk, *what)

        def recorded(walk: Any, *what: Any) -> None:
            if self.recorded == self.after:
                raise self.error
            record(walk, *what)
            self.recorded += 1

        monkeypatch.setattr(score_walk._ScoreWalk, "_step", counted)
        monkeypatch.setattr(score_walk._ScoreWalk, "record", recorded)

    def again(self) -> None:
        self.done, self.recorded, self.after = 0, 0, None


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def content(path: Path) -> dict[str, Any]:
    """A result without its times."""
    return {key: value for key, value in json.loads(path.read_text()).items() if key not in ("started", "finished")}


@pytest.mark.parametrize("after", range(2 * STEPS))
def test_killed_at_any_step(home: Path, steps: Steps, after: int) -> None:
    """In the walk through the model, and in that through the reference model."""
    how: dict[str, Any] = {"data": "own", "reference_model": home / "reference", "out": home / "r.json"}
    streamed(home, **how | {"out": home / "whole.json"})
    assert steps.done == 2 * STEPS
    before = fingerprint(home)
    steps.again()
    steps.after = after
    with pytest.raises(Killed):
        streamed(home, **how)
    assert not (home / "r.json").exists()
    steps.again()
    if after % 2:
        streamed(home, **how)
    else:
        resume(home / "r.json", progress=False)
    assert steps.done == 2 * STEPS - after
    assert content(home / "r.json") == content(home / "whole.json")
    (home / "r.json").unlink()
    assert fingerprint(home) == before  # nothing is left behind


def test_interrupted(home: Path, steps: Steps) -> None:
    steps.after, steps.error = 2, KeyboardInterrupt()
    with pytest.raises(Interrupted, match=r"interrupted; what was done is kept; go on with: perta resume .*r\.json"):
        streamed(home, out=home / "r.json")
    steps.again()
    assert cli.main(["resume", str(home / "r.json")]) == 0
    assert steps.done == STEPS - 2


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the hidden states of the first layer are written."""

    def failing(self: Any, name: str, *_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(scratch_files.ScratchFiles, "write", failing)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"the disk is full: .*; what was done is kept; go on with: perta resume"):
        streamed(home, out=home / "r.json")
    monkeypatch.undo()
    resume(home / "r.json", progress=False)
    assert content(home / "r.json")["metrics"]


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_for_temporary_files(home: Path, temporary: Path) -> None:
    with pytest.raises(RunError, match=r"perta-eval-\S+: could not be written: the disk is full.*nothing was left"):
        streamed(home)
    assert list(temporary.iterdir()) == []


def other_weights(home: Path) -> None:
    llama(5).save_pretrained(home / "Llama", max_shard_size="40KB")


def other_reference(home: Path) -> None:
    llama(5).save_pretrained(home / "reference", max_shard_size="40KB")


def other_rows(home: Path) -> None:
    write_lines(home / "tofu" / "retain_perturbed.jsonl", TOFU["forget01_perturbed"])


@pytest.mark.parametrize("way", ["call", "resume"])
@pytest.mark.parametrize("change", [other_weights, other_reference, other_rows])
def test_an_input_that_changed_is_refused(home: Path, steps: Steps, change: Any, way: str) -> None:
    how: dict[str, Any] = {"reference_model": home / "reference", "out": home / "r.json"}
    steps.after = 3
    with pytest.raises(Killed):
        streamed(home, **how)
    steps.again()
    change(home)
    before = fingerprint(home)
    with pytest.raises(InputError, match="has changed since the evaluation began; put the old file back"):
        streamed(home, **how) if way == "call" else resume(home / "r.json", progress=False)
    assert fingerprint(home) == before
    assert steps.done == 0
    streamed(home, overwrite=True, **how)
    assert steps.done == 2 * STEPS


@pytest.mark.parametrize("changes", [{"stream": False}, {"batch_size": 2}, {"metrics": ["forget_Q_A_Prob"]}])
def test_another_evaluation_does_not_go_on(home: Path, steps: Steps, changes: dict[str, Any]) -> None:
    steps.after = 1
    with pytest.raises(Killed):
        streamed(home, out=home / "r.json")
    with pytest.raises(InputError, match="another run to this place was stopped"):
        streamed(home, out=home / "r.json", **changes)


def test_a_tokenizer_in_memory(home: Path, steps: Steps) -> None:
    """It may be another one at the next call, so nothing is kept."""
    before = fingerprint(home)
    steps.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patched:
        patched.setattr(score_walk._ScoreWalk, "_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        streamed(home, out=home / "r.json", tokenizer=WORDS)
    assert fingerprint(home) == before
    streamed(home, out=home / "r.json", tokenizer=WORDS)
    assert (home / "r.json").exists()


def command(home: Path, *more: object) -> list[str]:
    given = ["eval", "--stream", "--model", home / "Llama", "--suite", "tofu", "--data", home / "tofu"]
    return [str(part) for part in (*given, "--split", "forget01", "--batch-size", 3, *more)]


def test_on_the_command_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(home, "--out", home / "r.json")) == 0
    assert "not computed, since they need more than token scores: forget_Q_A_ROUGE" in capsys.readouterr().out
    streamed(home, out=home / "again.json")
    assert content(home / "r.json") == content(home / "again.json")
    with_memory = [*command(home, "--memory", "1GiB")]
    with_memory.remove("--stream")
    assert cli.main(with_memory) == 2
    assert "--memory is for streamed runs; add --stream" in capsys.readouterr().err


def test_a_dry_run(home: Path, temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = fingerprint(home)
    given = command(home, "--reference-model", home / "reference", "--out", home / "r.json", "--dry-run")
    assert cli.main(given) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^through the model: 5 forget samples of \d+ tokens, 5 forget paraphrased samples", shown)
    assert re.search(r"^through the reference model: 5 forget samples of \d+ tokens, 6 holdout", shown, re.MULTILINE)
    assert shown.count("schedule: batches of 3, one walk forward for 1 version of the weights") == 2
    assert fingerprint(home) == before and list(temporary.iterdir()) == []
    assert cli.main([*given, "--memory", "1KiB"]) == 2
    assert "memory of 1.02 kB cannot hold one part of the model" in capsys.readouterr().err
    given.remove("--stream")
    assert cli.main(given) == 2
    assert "--dry-run is for streamed runs; add --stream" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("after", "earlier"), [(True, 0), (False, 2), (True, 3)])
def test_killed_by_a_signal(home: Path, after: bool, earlier: int) -> None:
    streamed(home, out=home / "whole.json")
    call = "streaming.forward.score_walk.record_step"
    killed = perta(
        *command(home, "--out", home / "r.json", "--quiet"),
        setup=signal_at("SIGKILL", call, after=after, earlier=earlier),
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (home / "r.json").exists()
    assert cli.main(["resume", str(home / "r.json")]) == 0
    assert content(home / "r.json") == content(home / "whole.json")


@pytest.mark.slow
def test_dealt_over_ranks(home: Path) -> None:
    """The samples are; the first writes the result and says what there is to say."""
    streamed(home, out=home / "alone.json", reference_model=home / "reference")
    before = fingerprint(home)
    given = command(home, "--reference-model", home / "reference", "--out", home / "r.json")
    first, second = perta_on_ranks(2, *given)
    assert (first.status, second.status) == (0, 0), first.errors + second.errors
    assert "forget_Q_A_Prob" in first.output and not second.output
    assert content(home / "r.json") == content(home / "alone.json")
    (home / "r.json").unlink()
    assert fingerprint(home) == before


def _full_at_the_second_layer(rank: int) -> None:
    """The disk of rank 1 is full."""
    flush, calls = scratch_files.StepFiles.flush, []

    def failing(files: Any) -> None:
        calls.append(files)
        if rank == 1 and len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(files)

    scratch_files.StepFiles.flush = failing  # type: ignore[method-assign]


@pytest.mark.slow
def test_stopped_and_resumed_over_ranks(home: Path) -> None:
    streamed(home, out=home / "alone.json")
    ended = perta_on_ranks(2, *command(home, "--out", home / "r.json", "--quiet"), setup=_full_at_the_second_layer)
    assert [one.status for one in ended] == [1, 1]
    assert "the disk is full" in ended[0].errors + ended[1].errors
    assert "go on with: perta resume" in ended[0].errors
    ended = perta_on_ranks(2, "resume", home / "r.json")
    assert [one.status for one in ended] == [0, 0], ended
    assert content(home / "r.json") == content(home / "alone.json")


@pytest.mark.slow
def test_over_ranks_without_stream(home: Path) -> None:
    given = command(home, "--out", home / "r.json")
    given.remove("--stream")
    ended = perta_on_ranks(2, *given)
    assert [one.status for one in ended] == [2, 2]
    assert "one process evaluates a model in memory; give --stream, or start it without torchrun" in ended[0].errors
    assert not ended[1].errors


@pytest.mark.slow
def test_bad_input_over_ranks(home: Path) -> None:
    """What only the first finds ends all."""
    (home / "r.json").write_text("{}")
    ended = perta_on_ranks(2, *command(home, "--out", home / "r.json"))
    assert [one.status for one in ended] == [2, 2]
    assert "r.json: exists; choose another file" in ended[0].errors and not ended[1].errors
