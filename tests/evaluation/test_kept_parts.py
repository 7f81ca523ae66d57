"""Evaluations that are stopped: finished passes are kept, and the same call or ``perta resume`` goes on with them."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import Evaluation, cli, evaluate, resume
from perta_fast.errors import InputError, Interrupted, RunError
from perta_fast.files.durable import read_record, write_record
from perta_fast.files.locking import lock
from perta_fast.models import greedy_answers, token_scores
from tests.evaluation.test_suites import HOLDOUT, TOFU, WORDS, write_tofu
from tests.support.checkpoints import fingerprint
from tests.support.children import perta, signal_at
from tests.support.models import CHAT_TEMPLATE, llama, tokenizer, write_lines
from tests.support.processors import have_instructions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "tofu").mkdir()
    write_tofu(folder / "tofu")
    llama(1).save_pretrained(folder / "model")
    WORDS.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def home(place: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(place, tmp_path / "home"))


def measured(home: Path, **changes: Any) -> Evaluation:
    options = {"suite": "tofu", "data": home / "tofu", "split": "forget01", "max_new_tokens": 4, "progress": False}
    return evaluate(home / "model", **options | {"out": home / "r.json"} | changes)


class Passes:
    """Counts the passes of the model, and stops one. after: passes that are finished first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done = 0
        self.after: int | None = None
        self.error: BaseException = KeyboardInterrupt()
        for owner, name in ((token_scores, "score_rows"), (greedy_answers, "greedy_answers")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **options: Any) -> Any:
            if self.done == self.after:
                raise self.error
            result = real(*given, **options)
            self.done += 1
            return result

        return run

    def again(self) -> None:
        self.done, self.after = 0, None


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


def content(path: Path) -> dict[str, Any]:
    """A result without its times."""
    return {key: value for key, value in json.loads(path.read_text()).items() if key not in ("started", "finished")}


ALL = 15  # passes of TOFU with a holdout set: 4 sets, 2 paraphrased, 4 perturbed, 4 times answers, holdout


@pytest.mark.parametrize("after", [1, 7, ALL - 1])
@pytest.mark.parametrize("way", ["call", "resume"])
def test_a_stopped_evaluation_goes_on(home: Path, passes: Passes, after: int, way: str) -> None:
    whole = measured(home, out=home / "whole.json")
    assert passes.done == ALL
    passes.again()
    passes.after = after
    before = fingerprint(home)
    with pytest.raises(Interrupted, match=r"interrupted; what was done is kept; go on with: perta resume .*r\.json"):
        measured(home)
    assert not (home / "r.json").exists()
    passes.again()
    result = measured(home) if way == "call" else resume(home / "r.json", progress=False)
    assert isinstance(result, Evaluation)
    assert passes.done == ALL - after
    assert result.metrics == whole.metrics
    assert content(home / "r.json") == content(home / "whole.json")
    (home / "r.json").unlink()
    assert fingerprint(home) == before  # nothing is left behind


def test_passes_of_another_processor_are_made_again(
    home: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model ran in another type there."""
    llama(1).to(torch.bfloat16).save_pretrained(home / "model")
    have_instructions(monkeypatch, True)
    passes.after = 7
    with pytest.raises(Interrupted):
        measured(home)
    passes.again()
    have_instructions(monkeypatch, False)
    resume(home / "r.json", progress=False)
    assert passes.done == ALL
    measured(home, out=home / "whole.json")
    assert content(home / "r.json") == content(home / "whole.json")
    assert not (home / ".r.json.perta-partial").exists()


def test_the_type_of_a_reference_model_counts_too(home: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch) -> None:
    llama(2).to(torch.bfloat16).save_pretrained(home / "reference")
    WORDS.save_pretrained(home / "reference")
    how: dict[str, Any] = {"reference_model": home / "reference", "metrics": ["mia_reference"]}
    have_instructions(monkeypatch, True)
    passes.after = 3  # of four: two sets, two models
    with pytest.raises(Interrupted):
        measured(home, **how)
    passes.again()
    have_instructions(monkeypatch, False)
    resume(home / "r.json", progress=False)
    assert passes.done == 4


def test_a_type_that_was_asked_for_is_that_of_both_models(
    home: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any processor, so nothing is made again on another."""
    llama(2).to(torch.bfloat16).save_pretrained(home / "reference")
    WORDS.save_pretrained(home / "reference")
    have_instructions(monkeypatch, True)
    passes.after = 3  # of four: two sets, two models
    with pytest.raises(Interrupted):
        measured(home, reference_model=home / "reference", metrics=["mia_reference"], dtype=torch.float32)
    passes.again()
    have_instructions(monkeypatch, False)
    resume(home / "r.json", progress=False)
    assert passes.done == 1


def test_stopped_again_and_again(home: Path, passes: Passes) -> None:
    for after in (2, 3, 1):
        passes.again()
        passes.after = after
        with pytest.raises(Interrupted):
            measured(home)
    passes.again()
    measured(home)
    assert passes.done == ALL - 6


def test_nothing_is_left_of_one_that_finished_nothing(home: Path, passes: Passes) -> None:
    before = fingerprint(home)
    passes.after = 0
    with pytest.raises(KeyboardInterrupt) as stopped:
        measured(home)
    assert not isinstance(stopped.value, Interrupted)
    assert fingerprint(home) == before
    with pytest.raises(InputError, match="there is no unfinished run to resume"):
        resume(home / "r.json")


def stop(home: Path, passes: Passes, **changes: Any) -> None:
    passes.again()
    passes.after = 3
    with pytest.raises(Interrupted):
        measured(home, **changes)
    passes.again()


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 3},
        {"max_new_tokens": 5},
        {"max_length": 40},
        {"dtype": torch.bfloat16},
        {"metrics": ["forget_Q_A_Prob"]},
        {"show_text": True},
        {"device": "cpu"},
    ],
)
def test_other_arguments_are_refused(home: Path, passes: Passes, changes: dict[str, Any]) -> None:
    stop(home, passes)
    before = fingerprint(home)
    with pytest.raises(InputError, match=r"another run to this place was stopped; finish it with: perta resume .*json"):
        measured(home, **changes)
    assert fingerprint(home) == before
    measured(home, overwrite=True, **changes)
    assert passes.done == (1 if "metrics" in changes else ALL)
    with pytest.raises(InputError, match="there is no unfinished run"):
        resume(home / "r.json")


def other_weights(home: Path) -> None:
    llama(2).save_pretrained(home / "model")


def other_rows(home: Path) -> None:
    write_lines(home / "tofu" / "retain_perturbed.jsonl", TOFU["forget01_perturbed"])


def other_template(home: Path) -> None:
    tokenizer(CHAT_TEMPLATE).save_pretrained(home / "model")


@pytest.mark.parametrize("way", ["call", "resume"])
@pytest.mark.parametrize(
    ("change", "named"),
    [(other_weights, "model.safetensors"), (other_rows, "retain_perturbed.jsonl"), (other_template, "chat_template")],
)
def test_an_input_that_changed_is_refused(
    home: Path, passes: Passes, change: Callable[[Path], None], named: str, way: str
) -> None:
    stop(home, passes)
    change(home)
    before = fingerprint(home)
    with pytest.raises(InputError, match=rf"{named}.*: has changed since the evaluation began; put the old file back"):
        measured(home) if way == "call" else resume(home / "r.json")
    assert fingerprint(home) == before


def test_other_versions_are_refused(home: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(home, passes)
    monkeypatch.setattr("perta_fast.evaluation.begun.installed_versions", lambda: {"torch": "1.0"})
    with pytest.raises(InputError, match=r"was begun with .* None.*|was begun with .*, this is .*start over"):
        measured(home)


def test_another_command_does_not_take_the_place(home: Path, passes: Passes) -> None:
    stop(home, passes)
    with pytest.raises(InputError, match="another run to this place was stopped"):
        measured(home, forget=write_lines(home / "f.jsonl", HOLDOUT), suite=None, data=None)


def test_the_result_that_is_replaced_stays_until_the_end(home: Path, passes: Passes) -> None:
    (home / "r.json").write_text("{}")
    stop(home, passes, overwrite=True)
    assert (home / "r.json").read_text() == "{}"
    resume(home / "r.json", progress=False)
    assert passes.done == ALL - 3
    assert "metrics" in content(home / "r.json")


def test_given_rows_go_on_without_overwrite(home: Path, passes: Passes) -> None:
    """The call that began it would start over, and without the record the file that is there would be in the way."""
    own: dict[str, Any] = {
        "suite": None,
        "data": None,
        "split": "",
        "forget": HOLDOUT[:2],
        "metrics": ["*_loss", "*_Q*"],
    }
    (home / "r.json").write_text("{}")
    passes.after = 1
    with pytest.raises(Interrupted, match=r"go on with: the same call, with the same rows, without overwrite$"):
        measured(home, overwrite=True, **own)
    passes.again()
    with pytest.raises(InputError, match=r"r\.json: exists"):
        measured(home, **own | {"batch_size": 3})
    measured(home, **own)
    assert passes.done == 1 and "forget_loss" in content(home / "r.json")["metrics"]
    with pytest.raises(InputError, match=r"r\.json: exists"):
        measured(home, **own)


def test_two_at_once(home: Path, passes: Passes) -> None:
    stop(home, passes)
    descriptor = lock(home / ".r.json.perta-partial")
    with pytest.raises(RunError, match="another run is writing it now"):
        measured(home)
    os.close(descriptor)
    measured(home)


def test_a_damaged_part_is_refused(home: Path, passes: Passes) -> None:
    stop(home, passes)
    state = home / ".r.json.perta-partial" / ".perta-evaluation"
    part = next(path for path in state.iterdir() if path.name != "begun.json")
    part.write_bytes(part.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"is damaged: it does not have the hash .*; start over with overwrite"):
        measured(home)


def test_what_is_no_record_is_refused(home: Path, passes: Passes) -> None:
    stop(home, passes)
    path = home / ".r.json.perta-partial" / ".perta-evaluation" / "begun.json"
    record = read_record(path)
    write_record(path, record | {"request": record["request"] | {"out": "\0"}})
    with pytest.raises(InputError, match="holds a character that no file name can have"):
        resume(home / "r.json")
    path.write_text("x")
    with pytest.raises(InputError, match="is damaged"):
        measured(home)
    measured(home, overwrite=True)


def test_a_folder_of_a_run_that_was_killed_at_its_start(home: Path, passes: Passes) -> None:
    (home / ".r.json.perta-partial").mkdir()
    measured(home)
    assert passes.done == ALL
    assert not (home / ".r.json.perta-partial").exists()


def test_a_link_in_the_hidden_place_is_refused(home: Path) -> None:
    (home / "elsewhere").mkdir()
    (home / ".r.json.perta-partial").symlink_to("elsewhere")
    with pytest.raises(InputError, match="is a link"):
        measured(home)


def test_out_of_memory(home: Path, passes: Passes) -> None:
    passes.after, passes.error = 2, MemoryError()
    with pytest.raises(RunError, match="out of memory; what was done is kept; go on with: perta resume"):
        measured(home)
    passes.again()
    measured(home)
    assert passes.done == ALL - 2


def test_a_model_in_memory_keeps_nothing(home: Path, passes: Passes) -> None:
    """It may be another one at the next call."""
    before = fingerprint(home)
    passes.after = 3
    options = {"suite": "tofu", "data": home / "tofu", "split": "forget01", "progress": False, "max_new_tokens": 4}
    with pytest.raises(KeyboardInterrupt):
        evaluate(llama(1).eval(), tokenizer=WORDS, out=home / "r.json", **options)
    assert fingerprint(home) == before


def test_on_the_command_line(home: Path, passes: Passes, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "--model", str(home / "model"), "--suite", "tofu", "--data", str(home / "tofu")]
    arguments += ["--split", "forget01", "--max-new-tokens", "4", "--out", str(home / "r.json")]
    passes.after = 4
    assert cli.main(arguments) == 130
    assert f"go on with: perta resume {home / 'r.json'}" in capsys.readouterr().err
    passes.again()
    assert cli.main(["resume", str(home / "r.json")]) == 0
    assert passes.done == ALL - 4
    assert "model_utility" in capsys.readouterr().out
    assert cli.main(["resume", str(home / "r.json")]) == 2
    assert "no unfinished run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "after", "earlier"),
    [
        ("files.new_directory.make_own_directory", True, 0),
        ("files.kept_parts.write_record", True, 0),  # the record, and no part yet
        ("files.kept_parts.write_record", False, 4),
        ("files.durable.move", False, 4),
        ("files.kept_parts.write_file", False, 0),  # the result
        ("files.kept_parts.forget", False, 0),  # the result is there, and its parts too
        ("files.kept_parts.remove", False, 0),
    ],
)
def test_killed_at_any_instant(home: Path, call: str, after: bool, earlier: int) -> None:
    measured(home, out=home / "whole.json")
    given = ["eval", "--model", home / "model", "--suite", "tofu", "--data", home / "tofu", "--split", "forget01"]
    given += ["--max-new-tokens", 4, "--batch-size", 16, "--out", home / "r.json"]
    killed = perta(*given, setup=signal_at("SIGKILL", call, after=after, earlier=earlier))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if (home / "r.json").exists():
        assert content(home / "r.json") == content(home / "whole.json")
        left = (home / ".r.json.perta-partial" / ".perta-evaluation" / "begun.json").exists()
        assert cli.main(["resume", str(home / "r.json")]) == (0 if left else 2)
        measured(home, overwrite=True)
    else:
        assert cli.main(list(map(str, given))) == 0
    assert content(home / "r.json") == content(home / "whole.json")
    assert sorted(path.name for path in home.iterdir()) == ["model", "r.json", "tofu", "whole.json"]
