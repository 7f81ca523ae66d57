"""What a sweep keeps: importances and θ_f, where the command that it prints finds them, with the bits of the choice."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from perta_fast import InputError, Interrupted, Sweep, apply, cli, sweep, verify
from perta_fast.importance.ratio import ImportanceRatio
from perta_fast.importance.store import Importance
from perta_fast.runs import estimate
from perta_fast.scoring.live_model import ScoredModel
from perta_fast.streaming.forward.score_walk import _ScoreWalk
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
    assert cli.main(command(job, *more, *chosen)) == 0
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


@pytest.mark.parametrize("stream", [False, True])
def test_a_stopped_sweep_has_kept_them_and_goes_on(
    stream: bool, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, Any] = {"rule": ["fisher", "preconditioned"], "save_importance": tmp_path / "kept"}
    chosen |= {"save_tuned": tmp_path / "tuned", "out": tmp_path / "sweep", "stream": stream, "max_retain_rise": 9.0}

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    scored: list[Any] = []
    score = ScoredModel.score

    def later(*given: Any) -> Any:
        scored.append(given)
        return score(*given) if len(scored) == 1 else stop()

    with monkeypatch.context() as patched:
        patched.setattr(_ScoreWalk, "_step", stop) if stream else patched.setattr(ScoredModel, "score", later)
        with pytest.raises(Interrupted, match="what was scored is kept"):
            run(job, **chosen)
    before = [weights(tmp_path / "kept" / "forget"), weights(tmp_path / "tuned")]
    assert all(before)
    monkeypatch.setattr(estimate, "accumulate", None)
    found = run(job, **chosen)
    assert len(found.rows) == 5
    assert before == [weights(tmp_path / "kept" / "forget"), weights(tmp_path / "tuned")]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rules that take none": ({"rule": "tv", "save_importance": "kept"}, "keeps what the sweep estimates, and rules tv"),
    "no preconditioning": ({"rule": "tv", "save_tuned": "kept"}, "save_tuned is for rule preconditioned; leave it out"),
    "a form of nothing": ({"rule": "grad", "save_as": "ratio"}, "--as says how importances are kept; give --save-imp"),
    "no form": ({"rule": "grad", "save_as": "rat", "save_importance": "kept"}, "save_as is 'rat'; it must be pair or"),
    "a taken place": ({"rule": "grad", "save_importance": "model"}, "model"),
    "in the sweep": ({"rule": "grad", "save_importance": "sweep/kept"}, "must lie apart, neither within the other"),
    "both in one": (
        {"rule": ["grad", "preconditioned"], "save_importance": "kept", "save_tuned": "kept/in"},
        "must lie apart, neither within the other",
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
