"""One forward walk gives what each version scores when its checkpoint is written, loaded whole and run."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from perta_fast import InputError, RunError, apply, estimate_importance
from perta_fast.data.samples import Sample
from perta_fast.files.durable import read_record, write_record
from perta_fast.models.scores import TokenScores
from perta_fast.models.token_scores import score_rows
from perta_fast.rules import Rescaling, Rule
from perta_fast.streaming.forward import score_walk
from perta_fast.streaming.forward.sample_set import SampleSet
from perta_fast.streaming.forward.score_walk import score_versions
from perta_fast.streaming.forward.version import Version, VersionScores
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule
from perta_fast.subtraction.inputs import Sources, open_importances
from tests.checkpoints.test_adapters import make_adapter
from tests.families.configs import FAMILIES, Family
from tests.families.matrix import build, write
from tests.support.models import Job, draw_samples, llama, tokenizer, write_job

pytestmark = pytest.mark.usefixtures("one_thread")

F32, BF16 = torch.float32, torch.bfloat16
SETS = [
    SampleSet("forget", draw_samples(5, seed=1), detailed=True),
    SampleSet("retain", draw_samples(4, seed=2)),
    SampleSet("masked", draw_samples(3, seed=3), hidden=5),
]


class Killed(BaseException):
    """In place of a signal: nothing that catches errors catches it."""


def scored(
    model: Path, versions: Sequence[Version], folder: Path, sets: Sequence[SampleSet] = SETS, **how: Any
) -> list[VersionScores]:
    skeleton = Skeleton.open(model, torch.device("cpu"), how.pop("dtype", None))
    settings = {"schedule": Schedule(2), "threads": 2, "progress": False} | how
    return score_versions(skeleton, versions, sets, folder=folder, **settings)


def expected(model: Path, of_set: SampleSet, dtype: torch.dtype | None = None) -> list[TokenScores]:
    module = AutoModelForCausalLM.from_pretrained(model, dtype=dtype or "auto").eval()
    for parameter in module.parameters():  # from_pretrained leaves them at any address, on which last bits depend
        parameter.data = parameter.data.clone()
    return score_rows(module, of_set.samples, batch_size=2, detailed=of_set.detailed, hidden=of_set.hidden)


def assert_same(found: VersionScores, model: Path, sets: Sequence[SampleSet] = SETS, **how: Any) -> None:
    for of_set in sets:
        for ours, theirs in zip(found.scores[of_set.name], expected(model, of_set, **how), strict=True):
            for column in ("log_probs", "hits", "standardised"):
                first, second = getattr(ours, column), getattr(theirs, column)
                assert first.dtype == second.dtype, column
                np.testing.assert_array_equal(first, second, err_msg=f"{of_set.name}, {column}")


def importances(job: Job, folder: Path, estimator: Any) -> list[Path]:
    for role in ("forget", "retain"):
        estimate_importance(job.base, getattr(job, role), estimator, out=folder / role, progress=False)
    return [folder / role for role in ("forget", "retain")]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return write_job(tmp_path_factory.mktemp("deep"), F32, num_hidden_layers=3, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def versions(deep: Job) -> list[Version]:
    tv = Sources.open(*deep.checkpoints)
    return [Version("as it is"), *(Version(f"tv {lam}", tv, Rescaling(lam)) for lam in (0.5, 2.0, -1.0))]


@pytest.mark.parametrize(("stored", "dtype"), [(F32, F32), (BF16, BF16), (BF16, F32)])
@pytest.mark.parametrize("tied", [True, False])
def test_every_rule(stored: torch.dtype, dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", stored, tie_word_embeddings=tied)
    versions, checkpoints = [Version("as it is")], [job.model]
    for name, estimator in (("tv", None), ("fisher", "grad"), ("empirical-fisher", "empirical-fisher")):
        paths = [] if estimator is None else importances(job, tmp_path / name, estimator)
        sources = Sources.open(*job.checkpoints, open_importances(Rule.of(name, 0.0), *paths))
        for lam in (0.5, 3.0):
            versions.append(Version(f"{name} {lam}", sources, Rule.of(name, lam).rescaling))
            checkpoints.append(tmp_path / f"{name} {lam} out")
            apply(*job.checkpoints, *paths, rule=name, lam=lam, out=checkpoints[-1], progress=False)
    found = scored(job.model, versions, tmp_path / "walk", dtype=dtype)
    for one, checkpoint in zip(found, checkpoints, strict=True):
        assert_same(one, checkpoint, dtype=dtype)
        assert one.not_finite == ""
    assert found[0].changed == 0 < min(one.changed for one in found[1:])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families(family: Family, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("model", "base", "tuned")]
    for seed, folder in enumerate(folders):
        write(build(family, seed), folder)
    sources = Sources.open(*folders)
    apply(*folders, rule="tv", lam=0.5, out=tmp_path / "out", progress=False)
    found = scored(folders[0], [Version("half", sources, Rescaling(0.5)), Version("as it is")], tmp_path / "walk")
    assert_same(found[0], tmp_path / "out")
    assert_same(found[1], folders[0])


@pytest.mark.parametrize("name", ["Llama tied", "GPT-2", "Mixtral", "GPT-OSS"])
def test_families_in_another_type_than_they_are_stored_in(name: str, tmp_path: Path) -> None:
    """Memory for converted weights is used again, but not that of experts that are joined."""
    family = next(family for family in FAMILIES if family.name == name)
    folders = [tmp_path / folder for folder in ("model", "base", "tuned")]
    for seed, folder in enumerate(folders):
        write(build(family, seed).to(BF16), folder)
    sources = Sources.open(*folders)
    versions = [Version("as it is"), *(Version(f"{lam}", sources, Rescaling(lam)) for lam in (0.5, 2.0))]
    found = scored(folders[0], versions, tmp_path / "walk", dtype=F32)
    for one, lam in zip(found, (0.0, 0.5, 2.0), strict=True):
        apply(*folders, rule="tv", lam=lam, out=tmp_path / f"{lam}", overwrite=True, progress=False)
        assert_same(one, tmp_path / f"{lam}", dtype=F32)


def test_an_adapter(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, llama, {"target_modules": ["q_proj", "up_proj"]})
    tokenizer().save_pretrained(tmp_path / "model")
    sources = Sources.open(tmp_path / "model", tmp_path / "base", adapter)
    apply(tmp_path / "model", tmp_path / "base", adapter, rule="tv", lam=2.0, out=tmp_path / "out", progress=False)
    (found,) = scored(tmp_path / "model", [Version("adapter", sources, Rescaling(2.0))], tmp_path / "walk")
    assert found.changed > 0
    assert_same(found, tmp_path / "out")


def test_one_reading_of_each_part(
    deep: Job, versions: list[Version], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stored tensor is read once, whatever the number of versions."""
    from perta_fast.subtraction import held_inputs

    read: list[tuple[Path, int]] = []
    read_one = held_inputs._read
    monkeypatch.setattr(
        held_inputs, "_read", lambda entry, array: (read.append((entry.path, entry.begin)), read_one(entry, array))
    )
    scored(deep.model, versions, tmp_path / "walk")
    stored = {(entry.path, entry.begin) for place in deep.checkpoints for entry in _entries(place)}
    resident = [place for place in set(read) if read.count(place) > 1]
    assert set(read) == stored
    assert len(resident) == len(deep.checkpoints)  # the last norm


def _entries(path: Path) -> list[Any]:
    from perta_fast.checkpoints.checkpoint import Checkpoint

    return list(Checkpoint.open(path).tensors.values())


STEPS = 4 * 5  # versions; embedding, three layers, head


@pytest.fixture(scope="module")
def whole(deep: Job, versions: list[Version], tmp_path_factory: pytest.TempPathFactory) -> list[VersionScores]:
    """The scores of a walk that nothing stops."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = scored(deep.model, versions, tmp_path_factory.mktemp("whole") / "walk")
    torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("stop", range(0, STEPS, 3))
@pytest.mark.parametrize("recorded", [True, False])
def test_killed_and_resumed(
    *,
    stop: int,
    recorded: bool,
    deep: Job,
    versions: list[Version],
    whole: list[VersionScores],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At any step, before its record or after it."""
    calls = 0
    record = score_walk._ScoreWalk.record

    def dying(self: Any, *state: Any) -> None:
        nonlocal calls
        calls += 1
        if calls <= stop or recorded:
            record(self, *state)
        if calls > stop:
            raise Killed

    monkeypatch.setattr(score_walk._ScoreWalk, "record", dying)
    with pytest.raises(Killed):
        scored(deep.model, versions, tmp_path / "walk", resumable=True)
    monkeypatch.undo()
    steps = 0
    step = score_walk._ScoreWalk._step

    def counting(self: Any, *what: Any) -> None:
        nonlocal steps
        steps += 1
        step(self, *what)

    monkeypatch.setattr(score_walk._ScoreWalk, "_step", counting)
    again = scored(deep.model, versions, tmp_path / "walk", resumable=True)
    assert steps == STEPS - stop - recorded
    assert_equal(whole, again)


@pytest.mark.parametrize("groups", [2, 3])
def test_samples_in_groups(
    groups: int,
    deep: Job,
    versions: list[Version],
    whole: list[VersionScores],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A walk for each has the same scores; one that is stopped in the second goes on there."""
    cut = Schedule(2, groups=groups)
    assert_equal(whole, scored(deep.model, versions, tmp_path / "whole", schedule=cut))
    step, steps = score_walk._ScoreWalk._step, 0

    def dying(self: Any, *what: Any) -> None:
        nonlocal steps
        if steps == STEPS + 5:
            raise Killed
        step(self, *what)
        steps += 1

    monkeypatch.setattr(score_walk._ScoreWalk, "_step", dying)
    with pytest.raises(Killed):
        scored(deep.model, versions, tmp_path / "walk", schedule=cut, resumable=True)
    steps = -groups * STEPS
    assert_equal(whole, scored(deep.model, versions, tmp_path / "walk", schedule=cut, resumable=True))
    assert steps == -STEPS - 5
    with pytest.raises(InputError, match="of other samples or settings"):
        scored(deep.model, versions, tmp_path / "walk", schedule=Schedule(3, groups=groups), resumable=True)


def assert_equal(first: list[VersionScores], second: list[VersionScores]) -> None:
    for one, other in zip(first, second, strict=True):
        assert (one.changed, one.not_finite) == (other.changed, other.not_finite)
        for of_set in SETS:
            for a, b in zip(one.scores[of_set.name], other.scores[of_set.name], strict=True):
                np.testing.assert_array_equal(a.log_probs, b.log_probs)
                np.testing.assert_array_equal(a.hits, b.hits)
                np.testing.assert_array_equal(a.standardised, b.standardised)


def test_another_walk_is_not_resumed(deep: Job, versions: list[Version], tmp_path: Path) -> None:
    scored(deep.model, versions, tmp_path / "walk", resumable=True)
    with pytest.raises(InputError, match="of other samples or settings"):
        scored(deep.model, versions[:2], tmp_path / "walk", resumable=True)
    with pytest.raises(InputError, match="of other samples or settings"):
        scored(deep.model, versions, tmp_path / "walk", SETS[:2], resumable=True)
    with pytest.raises(InputError, match="or of a model that ran in another type"):
        scored(deep.model, versions, tmp_path / "walk", resumable=True, dtype=BF16)


def test_damaged(deep: Job, versions: list[Version], tmp_path: Path) -> None:
    scored(deep.model, versions, tmp_path / "walk", resumable=True)
    path = tmp_path / "walk" / "scores.json"
    state = read_record(path)
    write_record(path, state | {"done": STEPS + 1})
    with pytest.raises(InputError, match="not the record of a walk"):
        scored(deep.model, versions, tmp_path / "walk", resumable=True)
    write_record(path, state)
    victim = next((tmp_path / "walk" / "scratch").glob("scores-1-*"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="is not what the run wrote"):
        scored(deep.model, versions, tmp_path / "walk", resumable=True)


def test_a_version_that_breaks(tmp_path: Path) -> None:
    """Weights that overflow: it is named, scores NaN, and the others score what they do without it."""
    job = write_job(tmp_path / "job", torch.float16)
    sources = Sources.open(*job.checkpoints)
    good = [Version("as it is"), Version("half", sources, Rescaling(0.5))]
    alone = scored(job.model, good, tmp_path / "alone")
    three = [good[0], Version("far too strong", sources, Rescaling(1e9)), good[1]]
    first, lost, second = scored(job.model, three, tmp_path / "walk", resumable=True)
    assert_equal(alone, [first, second])
    assert re.match(r"tensor model\.\S+: the result would hold NaN or infinite values", lost.not_finite)
    assert "written" not in lost.not_finite
    assert all(np.isnan(row.log_probs).all() and not row.hits.any() for rows in lost.scores.values() for row in rows)
    assert_equal([first, lost, second], scored(job.model, three, tmp_path / "walk", resumable=True))


def test_hidden_states_that_break(tmp_path: Path) -> None:
    """The place is named, and the rows that are not touched keep their scores."""
    job = write_job(tmp_path / "job", F32, tie_word_embeddings=False)
    file = next(job.model.glob("*.safetensors"))
    for file in sorted(job.model.glob("*.safetensors")):
        tensors = load_file(file)
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"][7] = float("inf")
            save_file(tensors, file, {"format": "pt"})
    samples = [Sample((3, 4, 5), (-100, 4, 5)), Sample((3, 7, 5), (-100, 7, 5))]
    (found,) = scored(job.model, [Version("as it is")], tmp_path / "walk", [SampleSet("forget", samples)])
    assert found.not_finite == "what the embedding makes of forget sample 1 (counted from 0) is not finite"
    good, bad = found.scores["forget"]
    assert np.isfinite(good.log_probs).all()
    assert np.isnan(bad.log_probs).any()


def test_an_input_that_is_cut_short(deep: Job, tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(path, tmp_path / path.name)) for path in deep.checkpoints]
    versions = [Version("tv", Sources.open(*copies), Rescaling(1.0))]
    victim = sorted(copies[2].glob("*.safetensors"))[-1]
    os.truncate(victim, victim.stat().st_size - 4)
    with pytest.raises(RunError, match=f"{victim.name}: ends inside tensor .*: it was cut short during the run"):
        scored(copies[0], versions, tmp_path / "walk")


def test_no_samples_in_a_set(deep: Job, versions: list[Version], tmp_path: Path) -> None:
    sets = [SampleSet("forget", SETS[0].samples), SampleSet("none", [])]
    found = scored(deep.model, versions[:1], tmp_path / "walk", sets)
    assert found[0].scores["none"] == []
