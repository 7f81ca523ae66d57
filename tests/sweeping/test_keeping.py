"""What a sweep keeps: importances and θ_f, where the command that it prints finds them, with the bits of the choice."""

import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from perta_fast import InputError, Interrupted, PertaError, Sweep, apply, cli, resume, sweep, verify
from perta_fast.importance.ratio import ImportanceRatio
from perta_fast.importance.store import Importance
from perta_fast.runs import estimate, making_tuned
from perta_fast.scoring.live_model import ScoredModel
from perta_fast.sweeping import keeping
from perta_fast.sweeping.unfinished import Record
from tests.support.checkpoints import fingerprint
from tests.support.models import Job

pytestmark = pytest.mark.usefixtures("one_thread")


def run(job: Job, **chosen: Any) -> Sweep:
    return sweep(*job.checkpoints, job.forget, job.retain, **{"progress": False, "lams": [1, 2]} | chosen)


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def command(job: Job, *more: object) -> list[str]:
    model, base, tuned = job.checkpoints
    paths = ["--model", model, "--base", base, "--tuned", tuned, "--forget", job.forget, "--retain", job.retain]
    return [str(each) for each in ["sweep", *paths, *more, "--max-retain-rise", 9]]


WAYS: dict[str, list[object]] = {
    "pair": ["--rule", "fisher"],
    "pair in bfloat16": ["--rule", "fisher", "--importance-dtype", "bfloat16"],
    "ratio": ["--rule", "fisher", "--as", "ratio"],
    "ratios of two estimators": ["--rules", "fisher,empirical-fisher", "--as", "ratio"],
    "pairs of two estimators": ["--rules", "fisher,empirical-fisher"],
    "preconditioned": ["--mus", "10"],
    "preconditioned, two mu": ["--mus", "3,30"],
}


@pytest.mark.parametrize(("way", "stream"), [(way, number % 2 == 1) for number, way in enumerate(WAYS)])
def test_the_printed_command_makes_the_chosen_checkpoint_of_what_was_kept(
    way: str,
    stream: bool,
    job: Job,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keeping = ["--save-tuned", tmp_path / "tuned"] if "mu" in way or way == "preconditioned" else []
    keeping = keeping or ["--save-importance", tmp_path / "kept"]
    more = [*WAYS[way], *keeping, "--lams", "20,40", *(["--stream"] if stream else [])]
    assert cli.main(command(job, *more, "--out", tmp_path / "sweep")) == 0
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("perta "))
    words = shlex.split(printed)
    assert words[1] == "apply" and words[-1] == "DIR"
    more[more.index("--save-tuned" if keeping[0] == "--save-tuned" else "--save-importance") + 1] = tmp_path / "again"
    chosen = ["--out", tmp_path / "second", "--checkpoint", tmp_path / "chosen"]
    assert cli.main(command(job, *more, *chosen, "--quiet")) == 0
    monkeypatch.setattr(estimate, "accumulate", None)  # nothing is estimated again
    assert cli.main([*words[1:-1], str(tmp_path / "out"), "--quiet"]) == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "chosen")
    verified = verify(tmp_path / "chosen", full=True, progress=False)
    assert not verified.problems and not any("temporary" in line for line in verified.unchecked)


@pytest.mark.parametrize("out", [True, False])
def test_how_they_are_laid_out(out: bool, job: Job, tmp_path: Path) -> None:
    where: dict[str, Any] = {"out": tmp_path / "sweep"} if out else {}
    found = run(job, rule=["grad", "fisher", "preconditioned"], save_importance=tmp_path / "one", **where)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"forget", "retain"}
    assert Importance.load(tmp_path / "one" / "forget").metadata == found.importance["grad"]["forget"]
    assert f"kept: importances in {tmp_path / 'one'}" in found.notes
    both: dict[str, Any] = {"rule": ["grad", "empirical-fisher"], "save_as": "ratio"}
    run(job, **both, save_importance=tmp_path / "two", overwrite=out, **where)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"grad", "empirical-fisher"}
    assert ImportanceRatio.load(tmp_path / "two" / "grad").metadata["forget"].estimator == "grad"
    run(job, mu=[1, 30], save_tuned=tmp_path / "vectors", overwrite=out, **where)
    assert {path.name for path in (tmp_path / "vectors").iterdir()} == {"mu-1.0", "mu-30.0"}


def test_settings_score_what_apply_makes_of_what_is_kept(job: Job, tmp_path: Path) -> None:
    """A ratio in bfloat16 weighs a little differently than the pair that it is made of."""
    kept = run(job, rule="fisher", lams=[8], save_importance=tmp_path / "ratio", save_as="ratio", out=tmp_path / "a")
    given = run(job, rule="fisher", lams=[8], importance=tmp_path / "ratio", out=tmp_path / "b")
    assert [row.forget_loss for row in kept.rows] == [row.forget_loss for row in given.rows]
    apply(*job.checkpoints, importance=tmp_path / "ratio", rule="fisher", lam=8, out=tmp_path / "out", progress=False)


class Stop(BaseException):
    """In place of a signal."""


class Unnamed(keeping.OutputDirectory):
    """One that is stopped before it gets its name."""

    def commit(self) -> None:
        raise Stop


def stopped_at(owner: Any, name: str, call: int, error: BaseException) -> Any:
    """What raises ``error`` at the call of this number."""
    whole, left = getattr(owner, name), [None] * call

    def counted(*given: Any, **named: Any) -> Any:
        if not left:
            raise error
        left.pop()
        return whole(*given, **named)

    return counted


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_stopped_while_it_keeps_loses_nothing(
    stream: bool, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt goes on where the one before was stopped. A streamed sweep keeps the importances first."""
    chosen: dict[str, Any] = {"rule": ["fisher", "preconditioned"], "lams": [2], "stream": stream}
    chosen |= {"save_importance": tmp_path / "kept", "save_tuned": tmp_path / "tuned", "out": tmp_path / "sweep"}
    made: list[str] = []

    def counting(owner: Any, name: str) -> None:
        whole = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: (made.append(name), whole(*given, **named))[1])

    counting(estimate, "estimate_on")
    counting(making_tuned.Making, "run")
    full = rf"full.*is kept; go on with: perta resume {tmp_path}/sweep"
    record = rf"{tmp_path}/sweep: could not be written: the disk is full.*is kept; go on with: perta resume"
    stops: list[tuple[Any, str, Any, str]] = [
        (Record, "note_kept", stopped_at(Record, "note_kept", 0, OSError(28, "full")), record),
        (keeping, "OutputDirectory", Unnamed, "^$"),
        (keeping, "discard" if stream else "link_tree", Stop, "^$"),
        (keeping, "link_tree", stopped_at(keeping, "link_tree", 0 if stream else 1, OSError(28, "full")), full),
        (keeping, "discard", Stop, "^$"),
    ]
    for owner, name, stand_in, words in stops[: 4 if stream else 5]:
        with monkeypatch.context() as patched, pytest.raises((Stop, PertaError), match=words):
            patched.setattr(owner, name, stopped_at(owner, name, 0, stand_in()) if stand_in is Stop else stand_in)
            run(job, **chosen)
    found = run(job, **chosen)
    assert sorted(made) == ["estimate_on", "estimate_on", "run"]  # nothing twice
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "sweep", "tuned"]
    linked = [path for folder in ("kept", "tuned") for path in (tmp_path / folder).rglob("*.safetensors")]
    assert linked and all(path.stat().st_nlink == 1 for path in linked)
    given = run(job, rule="fisher", lams=[2], importance=tmp_path / "kept")
    assert [row.forget_loss for row in given.rows] == [row.forget_loss for row in found.rows[:2]]


def test_a_sweep_does_not_go_on_with_other_importances_than_it_kept(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, Any] = {"rule": ["fisher", "preconditioned"], "lams": [2], "out": tmp_path / "sweep"}
    chosen |= {"save_importance": tmp_path / "kept", "save_tuned": tmp_path / "tuned"}
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(ScoredModel, "score", stopped_at(ScoredModel, "score", 1, KeyboardInterrupt()))
        run(job, **chosen)
    monkeypatch.setattr(estimate, "estimate_on", None)  # nothing is made again
    monkeypatch.setattr(making_tuned.Making, "run", None)
    shard, config = next((tmp_path / "kept" / "forget").glob("*.safetensors")), tmp_path / "tuned" / "config.json"
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    for changed, mend in (
        (shard, lambda: os.utime(shard, ns=(0, shard.stat().st_mtime_ns - 1))),
        (config, lambda: config.write_bytes(config.read_bytes()[:-1])),
        (tmp_path / "tuned", lambda: (tmp_path / "away").rename(tmp_path / "tuned")),
    ):
        if changed == config:
            config.write_bytes(config.read_bytes() + b" ")
        elif changed.is_dir():
            changed.rename(tmp_path / "away")
        before = fingerprint(tmp_path)
        for again in (lambda: run(job, **chosen), lambda: resume(tmp_path / "sweep", progress=False)):
            with pytest.raises(
                InputError, match=rf"{changed}.*: has changed, or is gone, since .*put the old file back"
            ):
                again()
        assert fingerprint(tmp_path) == before
        mend()
    assert len(run(job, **chosen).rows) == 3


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rules that take none": ({"rule": "tv", "save_importance": "kept"}, "keeps what the sweep estimates, and rules tv"),
    "no preconditioning": ({"rule": "tv", "save_tuned": "kept"}, "save_tuned is for rule preconditioned; leave it out"),
    "a form of nothing": ({"rule": "grad", "save_as": "ratio"}, "save_as says how importances are kept; give save_imp"),
    "no form": ({"rule": "grad", "save_as": "rat", "save_importance": "kept"}, "save_as is 'rat'; it must be pair or"),
    "a taken place": ({"rule": "grad", "save_importance": "model"}, "model"),
    "in the sweep": (
        {"rule": "grad", "save_importance": "sweep/kept"},
        "save_importance .*kept and out .*sweep must lie apart, neither within the other",
    ),
    "both in one": (
        {"rule": ["grad", "preconditioned"], "save_importance": "kept", "save_tuned": "kept/in"},
        "save_importance .*kept and save_tuned .*in must lie apart, neither within the other",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str, job: Job, tmp_path: Path) -> None:
    chosen, message = BAD[case]
    places = {
        name: job.model if value == "model" else tmp_path / value
        for name, value in chosen.items()
        if "save_as" not in name and name != "rule"
    }
    with pytest.raises(InputError, match=message):
        run(job, **chosen | places, out=tmp_path / "sweep")
    assert list(tmp_path.iterdir()) == []
