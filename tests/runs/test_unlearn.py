"""The whole job on checkpoints that transformers wrote: what comes out, what is said, what is left behind."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from perta_fast import Importance, InputError, Report, RunError, apply, estimate_importance, resume, unlearn, verify
from perta_fast.importance.gradients import accumulate
from perta_fast.models import loading
from perta_fast.runs import estimate, unlearn_in_memory
from perta_fast.subtraction import report_entries as accounts
from perta_fast.subtraction import to_directory
from tests.support.checkpoints import fingerprint, read_checkpoint, same_bytes
from tests.support.inputs import weights
from tests.support.models import FORGET, RETAIN, Job, nudge_, tokenizer, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

RULES: dict[str, Any] = {"grad": "grad", "fisher": "grad", "empirical-fisher": "empirical-fisher"}


def run(job: Job, out: Path, **settings: Any) -> Report:
    # test_check.py has the check
    data = {"forget": job.forget, "retain": job.retain, "lam": 1.0, "check": False} | settings
    return unlearn(*job.checkpoints, out=out, progress=False, **{"rule": "fisher"} | data)


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# What comes out.


@pytest.mark.parametrize("at", ["base", "model"])
@pytest.mark.parametrize("rule", RULES)
def test_the_same_as_importance_and_apply(rule: str, at: Any, job: Job, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rule": rule, "lam": 1.5}
    run(job, tmp_path / "whole", at=at, **settings)
    for role in ("forget", "retain"):
        where, data = getattr(job, at), getattr(job, role)
        estimate_importance(where, data, RULES[rule], out=tmp_path / role, progress=False)
    parts = (tmp_path / "forget", tmp_path / "retain")
    apply(*job.checkpoints, *parts, **settings, out=tmp_path / "parts", progress=False)
    weights_of = [
        {p.name: p.read_bytes() for p in (tmp_path / name).glob("*.safetensors")} for name in ("whole", "parts")
    ]
    assert len(weights_of[0]) > 1  # shards
    assert weights_of[0] == weights_of[1]


def test_where_the_gradients_are_taken_matters(job: Job, tmp_path: Path) -> None:
    found = []
    for at in ("base", "model"):
        report = run(job, tmp_path / at, at=at)
        assert {table["evaluated_at"] for table in report.importance.values()} == {str(getattr(job, at).resolve())}
        found.append(read_checkpoint(tmp_path / at))
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_task_vector_alone_needs_no_data(job: Job, tmp_path: Path) -> None:
    report = unlearn(*job.checkpoints, rule="tv", lam=0.5, out=tmp_path / "out", progress=False)
    model, base, tuned, out = map(read_checkpoint, (*job.checkpoints, tmp_path / "out"))
    for name, theta in model.items():
        expected = (theta.float() - 0.5 * (tuned[name].float() - base[name].float())).to(theta.dtype)
        assert same_bytes(out[name], expected), name
    assert (report.data, report.importance) == ({}, {})


@pytest.mark.parametrize("way", ["apply", "unlearn", "stream", "in place"])
def test_a_strength_below_zero_is_warned_of(way: str, job: Job, tmp_path: Path) -> None:
    """It is computed all the same: that is how a task vector is added."""
    if way == "in place":
        job = replace(job, model=Path(shutil.copytree(job.model, tmp_path / "model")))
    place: dict[str, Any] = {"in_place": True} if way == "in place" else {"out": tmp_path / "out"}
    settings = {"rule": "tv", "lam": -0.5, "progress": False} | place
    if way == "apply":
        report = apply(*job.checkpoints, **settings)
    else:
        rule = {"rule": "grad", "stream": True} if way == "stream" else {}
        report = unlearn(*job.checkpoints, job.forget, job.retain, **{"rule": "fisher"} | settings | rule)
    assert [warning.partition(":")[0] for warning in report.warnings] == ["lambda -0.5 is less than 0"]
    assert "warning: lambda -0.5 is less than 0: the task vector is added" in report.summary()


def test_data_named_with_the_task_vector_alone_is_recorded(job: Job, tmp_path: Path) -> None:
    report = run(job, tmp_path / "out", rule="tv")
    for role, rows in (("forget", FORGET), ("retain", RETAIN)):
        path = getattr(job, role)
        digest = blake3(path.read_bytes()).hexdigest()
        expected = {"path": str(path), "blake3": digest, "samples": len(rows), "truncated": 0}
        assert report.data[role] == expected
    assert Report.load(tmp_path / "out").data == report.data


def test_the_limit_of_the_model_is_reported(job: Job, tmp_path: Path) -> None:
    """The number that was used, not that none was asked for; a recipe still leaves it to the model."""
    report = run(job, tmp_path / "out")
    config = json.loads((job.base / "config.json").read_text())
    assert report.settings["max_length"] == config["max_position_embeddings"]
    assert "max-length" not in report.recipe


def test_how_the_importances_were_estimated_is_reported(job: Job, tmp_path: Path) -> None:
    report = run(job, tmp_path / "out", at="model", batch_size=3, max_length=100, dtype=torch.float32)
    assert report.settings == {
        "at": "model",
        "estimator": "grad",
        "batch_size": 3,
        "max_length": 100,
        "dtype": "float32",
        "device": "cuda:0" if torch.cuda.is_available() else "cpu",
        "stream": False,
        "schedule": None,
        "processes": 1,
        "system_prompt": None,
        "date_string": None,
        "date": None,
    }


def test_transformers_loads_the_output_and_generates(job: Job, tmp_path: Path) -> None:
    run(job, tmp_path / "out", lam=0.5)
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = words("Question: Who wrote book 1?\nAnswer:", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > prompt["input_ids"].shape[1]
    assert model.dtype == torch.bfloat16
    layouts = [
        sorted((path.name, path.stat().st_size) for path in folder.glob("model*"))
        for folder in (job.model, tmp_path / "out")
    ]
    assert layouts[0] == layouts[1]


def write_mixtral_job(folder: Path) -> Job:
    torch.manual_seed(5)
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
    }
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    for seed, name in enumerate(("base", "model", "tuned")):
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
        nudge_(model, seed)
    data = write_lines(folder / "forget.jsonl", FORGET), write_lines(folder / "retain.jsonl", RETAIN)
    return Job(folder / "model", folder / "base", folder / "tuned", *data)


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    """Its checkpoint keeps experts apart that the module holds as one parameter; each gets its own weights."""
    job = write_mixtral_job(tmp_path)
    report = run(job, tmp_path / "out", save_importance=tmp_path / "kept", rule="grad", lam=2.0)
    model, base, tuned, out = map(read_checkpoint, (*job.checkpoints, tmp_path / "out"))
    forget, retain = (read_checkpoint(tmp_path / "kept" / role) for role in ("forget", "retain"))
    assert forget.keys() == retain.keys() == model.keys()
    assert sum(".experts." in name for name in model) == 2 * 4 * 3
    for name, theta in model.items():
        step = 2.0 * weights(1.0)(forget[name], retain[name]) * (tuned[name] - base[name])
        assert torch.equal(out[name], torch.where(step == 0, theta, theta - step)), name
    assert report.counts == {"subtracted": len(model)}


def test_a_tied_model(tmp_path: Path) -> None:
    job = write_job(tmp_path, tie_word_embeddings=True)
    run(job, tmp_path / "out")
    assert "lm_head.weight" not in read_checkpoint(tmp_path / "out")
    assert not verify(tmp_path / "out", full=True, progress=False).problems


# What is reported.


def test_the_report(job: Job, tmp_path: Path) -> None:
    report = run(job, tmp_path / "out")
    assert Report.load(tmp_path / "out") == report
    assert list(report.phases) == [
        *("load", "forget importance", "retain importance"),
        *("apply", "hash inputs", "hash output"),
    ]
    assert all(phase["seconds"] > 0 for phase in report.phases.values())
    for role, rows in (("forget", FORGET), ("retain", RETAIN)):
        path = getattr(job, role)
        assert report.data[role] == {
            "path": str(path),
            "blake3": blake3(path.read_bytes()).hexdigest(),
            "samples": len(rows),
            "truncated": 0,
        }
        assert report.importance[f"{role}_importance"]["sample_count"] == len(rows)
        assert report.inputs[f"{role}_importance"]["kept"] is False
    assert report.warnings == []


def test_no_data_text_in_the_output(job: Job, tmp_path: Path) -> None:
    run(job, tmp_path / "out", save_importance=tmp_path / "kept")
    written = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith("tokenizer")]
    assert len(written) > 5
    for row in FORGET + RETAIN:
        for text in row.values():
            assert not [path for path in written if text.encode() in path.read_bytes()]


def test_the_same_data_twice_is_a_warning(job: Job, tmp_path: Path) -> None:
    report = run(job, tmp_path / "out", retain=job.forget)
    assert report.warnings == ["forget and retain importance were estimated on the same data"]
    assert f"warning: {report.warnings[0]}" in report.summary()


def test_cut_samples_are_a_warning(job: Job, tmp_path: Path) -> None:
    long = write_lines(tmp_path / "long.jsonl", [*RETAIN, {"text": "river " * 200}])
    report = run(job, tmp_path / "out", retain=long)
    assert report.warnings == ["1 of 8 retain samples were cut to the length limit"]
    assert report.data["retain"]["truncated"] == 1 and report.data["forget"]["truncated"] == 0


def test_kept_importances(job: Job, tmp_path: Path) -> None:
    report = run(job, tmp_path / "out", save_importance=tmp_path / "kept")
    assert below(tmp_path / "kept") == sorted(
        part
        for role in ("forget", "retain")
        for part in (role, f"{role}/importance.safetensors", f"{role}/importance_rows.b3")
    )
    kept = (tmp_path / "kept" / "forget", tmp_path / "kept" / "retain")
    assert [report.inputs[f"{path.name}_importance"]["path"] for path in kept] == [str(path) for path in kept]
    assert "kept" not in report.inputs["forget_importance"]
    apply(*job.checkpoints, *kept, out=tmp_path / "again", progress=False)
    assert fingerprint_of_weights(tmp_path / "again") == fingerprint_of_weights(tmp_path / "out")
    with pytest.raises(InputError, match="kept: exists and is not empty"):
        run(job, tmp_path / "third", save_importance=tmp_path / "kept")
    run(job, tmp_path / "third", save_importance=tmp_path / "kept", overwrite=True, rule="empirical-fisher")
    assert "empirical-fisher" in (kept[0] / "importance.safetensors").read_bytes()[:2000].decode(errors="replace")


def fingerprint_of_weights(folder: Path) -> list[str]:
    return [digest for path, digest in fingerprint(folder).items() if path.suffix == ".safetensors"]


@pytest.mark.parametrize("keep", [False, True])
def test_what_verify_can_say(keep: bool, job: Job, tmp_path: Path) -> None:
    run(job, tmp_path / "out", save_importance=tmp_path / "kept" if keep else None)
    result = verify(tmp_path / "out", full=True, progress=False)
    assert not result.problems
    tensors = len(read_checkpoint(job.model))
    assert (result.recomputed, result.bounded) == ((tensors, 0) if keep else (0, tensors))


# What is left behind.


def fail(*arguments: Any, **settings: Any) -> Any:
    raise OSError(28, "No space left on device")


def interrupt(*arguments: Any, **settings: Any) -> Any:
    raise KeyboardInterrupt


def second_call(action: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Runs ``original`` once, then ``action``."""
    calls: list[int] = []

    def either(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        return (original if len(calls) == 1 else action)(*arguments, **settings)

    return either


STAGES: dict[str, Callable[[Callable[..., Any], pytest.MonkeyPatch], None]] = {
    "forget importance": lambda action, patch: patch.setattr(estimate, "accumulate", action),
    "retain importance": lambda action, patch: patch.setattr(estimate, "accumulate", second_call(action, accumulate)),
    "saving the retain importance": lambda action, patch: patch.setattr(
        Importance, "save", second_call(action, Importance.save)
    ),
    "opening": lambda action, patch: patch.setattr(unlearn_in_memory, "open_importances", action),
    "shards": lambda action, patch: patch.setattr(to_directory, "write_fully", action),
    "hashes": lambda action, patch: patch.setattr(accounts, "hash_files", action),
    "model card": lambda action, patch: patch.setattr(to_directory, "write_model_card", action),
}
WITH_SHARDS_DONE = ("hashes", "model card")


def same_shards(first: Path, second: Path) -> bool:
    return all(path.read_bytes() == (second / path.name).read_bytes() for path in first.glob("*.safetensors"))


@pytest.mark.parametrize("keep", [False, True], ids=["scratch", "kept"])
@pytest.mark.parametrize("action", [fail, interrupt])
@pytest.mark.parametrize("stage", STAGES)
def test_failure_at_any_stage(
    stage: str, action: Callable[..., Any], keep: bool, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No output, inputs as they were; importances only if both are complete. Finished shards can be used."""
    before = fingerprint(job.model.parent)
    STAGES[stage](action, monkeypatch)
    with pytest.raises(KeyboardInterrupt if action is interrupt else RunError):
        run(job, tmp_path / "out", save_importance=tmp_path / "kept" if keep else None)
    monkeypatch.undo()
    complete = stage in ("opening", "shards", *WITH_SHARDS_DONE)
    shown = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert shown == (["kept"] if keep and complete else [])
    if stage in WITH_SHARDS_DONE:
        with pytest.raises(InputError, match="was stopped; finish it with: perta resume"):
            run(job, tmp_path / "out")
        report = resume(tmp_path / "out")
        assert report.data.keys() == {"forget", "retain"}
        assert report.inputs["forget_importance"].get("kept", True) is keep
        run(job, tmp_path / "again")
        assert same_shards(tmp_path / "out", tmp_path / "again")
        for name in ("out", "again"):
            shutil.rmtree(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == shown
    if keep and complete:
        apply(*job.checkpoints, tmp_path / "kept" / "forget", tmp_path / "kept" / "retain", out=tmp_path / "out")
    assert fingerprint(job.model.parent) == before


def test_leftovers_of_a_killed_run_are_cleared(job: Job, tmp_path: Path) -> None:
    for name in (".out.perta-partial", "..out.perta-importance.perta-partial"):
        (tmp_path / name / "forget").mkdir(parents=True)
        (tmp_path / name / "forget" / "importance.safetensors").write_bytes(b"half")
    run(job, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# What is refused, before the first gradient.

LATE = {"text": "a"}  # a good line, but of a single token: found when it is tokenised


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"at": "tuned"}, "at is 'tuned'; it must be base or model"),
        ({"rule": "erase"}, "rule is 'erase'"),
        ({"lam": float("inf")}, "lam is inf"),
        ({"rule": "tv", "alpha": 2.0}, "rule tv has no weights"),
        ({"rule": "tv", "save_importance": "kept"}, "rule tv takes no importance, so there is none to save"),
        ({"forget": None}, "rule fisher needs forget data"),
        ({"retain": None}, "rule fisher needs retain data"),
        ({"forget": "absent.jsonl"}, r"absent\.jsonl: cannot be read"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 1}, r"forget\.jsonl, line 1: has no token .* within the first 1 tokens"),
        ({"max_length": 0}, "max_length is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"memory": 1 << 30}, "memory is for streamed runs; give stream too, or leave it out"),
        ({"device": "tpu9"}, "device 'tpu9'"),
        ({"forget": "talk.jsonl"}, r"talk\.jsonl, line 1: has messages, but the tokenizer has no chat template"),
        ({"retain": "late.jsonl"}, r"late\.jsonl, line 2: has no token to compute a loss on"),
        ({"save_importance": "full"}, "full: exists and is not empty"),
        ({"save_importance": "out/kept"}, "out: is or contains"),
        ({"save_importance": "out"}, "out: is or contains"),
    ],
)
def test_refusals(
    settings: dict[str, Any], reason: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "late.jsonl", [RETAIN[0], LATE])
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_lines(tmp_path / "talk.jsonl", [{"messages": talk}])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    before = below(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "accumulate", None)
    with pytest.raises(InputError, match=reason):
        run(job, tmp_path / "out", **settings)
    assert below(tmp_path) == before


def test_checkpoints_of_different_models_are_refused_first(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_job(tmp_path / "other", hidden_size=16)
    monkeypatch.setattr(loading, "load_subject", None)
    with pytest.raises(InputError, match="these are not of one model"):
        unlearn(job.model, job.base, other.tuned, job.forget, job.retain, out=tmp_path / "out", lam=1.0, rule="fisher")


def test_a_second_run_to_the_same_place_waits_for_leave(job: Job, tmp_path: Path) -> None:
    run(job, tmp_path / "out", lam=1.0)
    first = fingerprint_of_weights(tmp_path / "out")
    with pytest.raises(InputError, match="exists and is not empty"):
        run(job, tmp_path / "out", lam=2.0)
    assert fingerprint_of_weights(tmp_path / "out") == first
    report = run(job, tmp_path / "out", lam=2.0, overwrite=True)
    assert fingerprint_of_weights(tmp_path / "out") != first
    assert json.loads((tmp_path / "out" / "perta_report.json").read_text())["lam"] == report.lam == 2.0
