"""Evaluations that are stopped within a pass: they go on with the batch that is missing, to the same result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perta_fast import resume
from perta_fast.errors import InputError, Interrupted
from perta_fast.files import kept_rows
from perta_fast.files.kept_parts import KeptParts
from perta_fast.files.kept_rows import KeptRows
from perta_fast.models import gradient_norms, token_scores
from tests.evaluation.test_kept_parts import content, home, measured, place
from tests.support.children import perta, signal_at
from tests.support.models import LlamaForCausalLM

__all__ = ["home", "place"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """A process that ends where it is."""


class Batches:
    """Counts batches that are scored, answered or differentiated, and stops one. after: batches that go first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done = 0
        self.after: int | None = None
        self.error: type[BaseException] = KeyboardInterrupt
        for owner, name in (
            (token_scores, "score_batch"),
            (gradient_norms, "token_logits"),
            (LlamaForCausalLM, "generate"),
        ):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **options: Any) -> Any:
            if self.done == self.after:
                raise self.error
            self.done += 1
            return real(*given, **options)

        return run


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    return Batches(monkeypatch)


METRICS = ["forget_Q_A_Prob", "forget_Q_A_ROUGE", "extraction_strength", "mia_gradnorm"]


def evaluated(home: Path, **changes: Any) -> Any:
    return measured(home, **{"metrics": METRICS, "batch_size": 1} | changes)


def counted(home: Path, batches: Batches) -> int:
    """How many batches there are."""
    evaluated(home, out=home / "whole.json")
    return batches.done


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.9])
def test_what_ctrl_c_stops_goes_on_at_the_next_batch(home: Path, batches: Batches, share: float) -> None:
    count = counted(home, batches)
    assert count >= 8
    batches.done, batches.after = 0, max(1, int(share * count))
    with pytest.raises(Interrupted, match="what was done is kept; go on with: perta resume"):
        evaluated(home)
    after, batches.done, batches.after = batches.after, 0, None
    evaluated(home)
    assert batches.done == count - after
    assert content(home / "r.json") == content(home / "whole.json")
    assert not (home / ".r.json.perta-partial").exists()


def test_what_is_killed_again_and_again_goes_on(home: Path, batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a chance to write anything down at the end."""
    monkeypatch.setattr(kept_rows, "_INTERVAL", 0.0)
    monkeypatch.setattr(KeptParts, "__exit__", lambda self, *_: self._locked.close())
    batches.error = Killed
    count, total = counted(home, batches), 0
    for after in (1, 2, 3):
        batches.done, batches.after = 0, after
        with pytest.raises(Killed):
            evaluated(home)
        total += batches.done
    batches.done, batches.after = 0, None
    monkeypatch.undo()
    counting = Batches(monkeypatch)
    resume(home / "r.json", progress=False)
    assert counting.done == count - total
    assert content(home / "r.json") == content(home / "whole.json")


def test_a_damaged_piece_is_refused(home: Path, batches: Batches) -> None:
    batches.after = 1
    with pytest.raises(Interrupted):
        evaluated(home)
    (piece,) = (path for path in (home / ".r.json.perta-partial").rglob("*.json") if path.name != "begun.json")
    piece.write_bytes(piece.read_bytes()[:-3])
    with pytest.raises(InputError, match="is damaged"):
        evaluated(home)


def test_rows_of_other_input_are_passed_over(tmp_path: Path) -> None:
    with KeptParts(tmp_path / "r.json", {}, resume=False) as kept:
        with pytest.raises(KeyboardInterrupt), KeptRows(kept, "a", "first") as rows:
            rows.add({0: "x", 3: "y"})
            raise KeyboardInterrupt
        assert KeptRows(kept, "a", "first").done == {0: "x", 3: "y"}
        assert KeptRows(kept, "a", "second").done == {}
        assert KeptRows(kept, "b", "first").done == {}
        kept.any = False  # removes it


@pytest.mark.slow
def test_killed_while_rows_are_written(home: Path) -> None:
    evaluated(home, out=home / "whole.json")
    given = ["eval", "--model", home / "model", "--suite", "tofu", "--data", home / "tofu", "--split", "forget01"]
    given += ["--max-new-tokens", 4, "--metrics", ",".join(METRICS), "--batch-size", 1, "--out", home / "r.json"]
    setup = "from perta_fast.files import kept_rows\nkept_rows._INTERVAL = 0.0\n"
    setup += signal_at("SIGKILL", "files.kept_parts.write_record", earlier=3)
    assert perta(*given, setup=setup).returncode == -9
    assert perta("resume", home / "r.json").returncode == 0
    assert content(home / "r.json") == content(home / "whole.json")
