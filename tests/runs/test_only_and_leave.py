"""Parameters left alone by choice keep the model's bytes; all others are as in the run that leaves none alone."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from perta_fast import apply, apply_to_module_, cli, estimate_importance, resume, sweep, unlearn, verify
from perta_fast.errors import InputError
from perta_fast.files.hashing import hash_file
from perta_fast.records.report import Report, describe_files
from perta_fast.scoring.live_model import LiveModel
from tests.distributed.launch import on_ranks
from tests.families.configs import FAMILIES
from tests.families.matrix import build, write
from tests.support.checkpoints import fingerprint, read_checkpoint, same_bytes, write_checkpoint
from tests.support.models import FORGET, RETAIN, Job, llama, nudge_, tokenizer, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BY_CHOICE = "copied: left alone by choice"
CHOICES: list[tuple[dict[str, Any], list[str]]] = [  # what is given, and parts of the names that stay
    ({"leave": "embeddings"}, [EMBED, HEAD]),
    ({"leave": ["norms", "*embed_tokens*"]}, ["norm", EMBED]),
    ({"only": "*.mlp.*"}, ["norm", EMBED, HEAD, "attn"]),
    ({"only": "model.layers.*", "leave": "*layers.0.*"}, [EMBED, HEAD, "layers.0.", "model.norm"]),
]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def importances(job: Job, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("importances")
    for role in ("forget", "retain"):
        estimate_importance(job.base, getattr(job, role), "grad", out=folder / role, progress=False)
    return [folder / "forget", folder / "retain"]


def check(out: Path, model: dict[str, Tensor], whole: dict[str, Tensor], parts: list[str]) -> int:
    """``out`` has theta_full's bytes in names with these parts, and the whole run's in others. How many stay."""
    found = read_checkpoint(out)
    assert found.keys() == model.keys()
    left = {name for name in model if any(part in name for part in parts)}
    assert left and left != model.keys()
    wrong = [name for name in model if not same_bytes(found[name], (model if name in left else whole)[name])]
    assert not wrong
    assert any(not same_bytes(found[name], model[name]) for name in model)
    return len(left)


@pytest.mark.parametrize(("chosen", "parts"), CHOICES)
@pytest.mark.parametrize("rule", ["tv", "grad"])
def test_apply_to_a_directory_and_in_place(
    rule: str, chosen: dict[str, Any], parts: list[str], job: Job, importances: list[Path], tmp_path: Path
) -> None:
    given = importances if rule == "grad" else []
    settings: dict[str, Any] = {"rule": rule, "lam": 0.7, "progress": False}
    apply(*job.checkpoints, *given, **settings, out=tmp_path / "whole")
    model, whole = read_checkpoint(job.model), read_checkpoint(tmp_path / "whole")
    report = apply(*job.checkpoints, *given, **settings, **chosen, out=tmp_path / "out", link_unchanged=True)
    count = check(tmp_path / "out", model, whole, parts)
    assert report.counts[BY_CHOICE] == count and report.counts["subtracted"] == len(model) - count
    assert (report.only or None, report.leave or None) == tuple(
        None if value is None else [value] if isinstance(value, str) else value
        for value in (chosen.get("only"), chosen.get("leave"))
    )
    assert not verify(tmp_path / "out", full=True, progress=False).problems
    copy = shutil.copytree(job.model, tmp_path / "copy")
    report = apply(copy, *job.checkpoints[1:], *given, **settings, **chosen, in_place=True)
    assert check(copy, model, whole, parts) == report.counts[BY_CHOICE]
    assert not verify(copy, full=True, progress=False).problems


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("given", [{"leave": "embeddings"}, {"leave": "lm_head.weight", "only": "*"}])
def test_unlearn(stream: bool, tied: bool, given: dict[str, Any], tmp_path: Path) -> None:
    """The importances are those of all parameters; with a tied matrix, the name of either use leaves it."""
    job = write_job(tmp_path, tie_word_embeddings=tied)
    settings: dict[str, Any] = {"rule": "empirical-fisher", "stream": stream, "lam": 0.7}
    settings |= {"check": False, "progress": False}
    inputs = *job.checkpoints, job.forget, job.retain
    unlearn(*inputs, **settings, out=tmp_path / "whole", save_importance=tmp_path / "first")
    unlearn(*inputs, **settings, **given, out=tmp_path / "out", save_importance=tmp_path / "second")
    parts = [HEAD] if given["leave"] == "lm_head.weight" and not tied else [EMBED, HEAD]
    check(tmp_path / "out", read_checkpoint(job.model), read_checkpoint(tmp_path / "whole"), parts)
    for role in ("forget", "retain"):
        first, second = (read_checkpoint(tmp_path / name / role) for name in ("first", "second"))
        assert all(same_bytes(first[name], second[name]) for name in first) and first.keys() == second.keys()
    assert not verify(tmp_path / "out", full=True, progress=False).problems


def _run_with(group: Any, job: Job, folder: Path) -> None:
    how: dict[str, Any] = {"leave": "embeddings,*norm*", "lam": 0.7, "progress": False, "group": group}
    apply(*job.checkpoints, rule="tv", out=folder / "applied", **how)
    unlearn(*job.checkpoints, job.forget, job.retain, rule="grad", stream=True, out=folder / "streamed", **how)


def test_many_processes(job: Job, tmp_path: Path) -> None:
    on_ranks(2, _run_with, job, tmp_path)
    model = read_checkpoint(job.model)
    apply(*job.checkpoints, rule="tv", lam=0.7, out=tmp_path / "whole", progress=False)
    check(tmp_path / "applied", model, read_checkpoint(tmp_path / "whole"), [EMBED, HEAD, "norm"])
    found = read_checkpoint(tmp_path / "streamed")
    assert {name for name in model if same_bytes(found[name], model[name])} == {
        name for name in model if name in (EMBED, HEAD) or "norm" in name
    }
    for out in ("applied", "streamed"):
        assert Report.load(tmp_path / out).counts[BY_CHOICE] == 7
        assert "left alone: embeddings, *norm*" in (tmp_path / out / "README.md").read_text()
        assert not verify(tmp_path / out, full=True, progress=False).problems


def test_names_that_a_wrapper_has_put_into_the_file(job: Job, tmp_path: Path) -> None:
    wrapped = {f"_orig_mod.{name}": values for name, values in read_checkpoint(job.model).items()}
    folder = write_checkpoint(tmp_path / "model", wrapped)
    for number, pattern in enumerate(("_orig_mod.model.norm.weight", "model.norm.weight", "*.model.norm.*")):
        apply(folder, *job.checkpoints[1:], rule="tv", leave=pattern, out=tmp_path / str(number), progress=False)
        found = read_checkpoint(tmp_path / str(number))
        assert [name for name in wrapped if same_bytes(found[name], wrapped[name])] == ["_orig_mod.model.norm.weight"]


def test_a_left_tensor_that_was_changed_is_found(job: Job, tmp_path: Path) -> None:
    apply(*job.checkpoints, rule="tv", leave="norms", out=tmp_path / "out", progress=False)
    for shard in (tmp_path / "out").glob("*.safetensors"):
        of = load_file(shard)
        for name in of:
            if "norm" in name:
                of[name] = of[name] + 1
        save_file(of, shard, {"format": "pt"})
    report = Report.load(tmp_path / "out")

    shards = list((tmp_path / "out").glob("*.safetensors"))
    report.output = describe_files({shard: hash_file(shard) for shard in shards}, tmp_path / "out")
    report.save(tmp_path / "out")
    problems = verify(tmp_path / "out", full=True, progress=False).problems
    assert {name for name in read_checkpoint(job.model) if "norm" in name} == {
        problem.split()[1] for problem in problems if problem.endswith("is not what the inputs give")
    }


@pytest.mark.parametrize("at", ["base", "model"])
def test_a_sweep_scores_and_writes_what_apply_does(at: Any, job: Job, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rule": "grad", "lams": [0.5, 1.0], "at": at, "progress": False}
    data = job.forget, job.retain
    whole = sweep(*job.checkpoints, *data, **settings)
    chosen = sweep(
        *job.checkpoints, *data, **settings, leave=["embeddings"], max_retain_increase=1000.0,
        out=tmp_path / "sweep", checkpoint=tmp_path / "chosen",
    )  # fmt: skip
    assert chosen.best is not None and chosen.best.rule
    assert "left alone: embeddings" in chosen.summary() and chosen.settings["leave"] == ["embeddings"]
    share = chosen.best.changed
    assert 0 < share < whole.rows[1].changed
    how: dict[str, Any] = {"rule": "grad", "lam": chosen.best.lam, "at": at, "leave": "embeddings", "progress": False}
    unlearn(*job.checkpoints, *data, **how, out=tmp_path / "out")
    found, right, model = (read_checkpoint(path) for path in (tmp_path / "chosen", tmp_path / "out", job.model))
    assert all(same_bytes(found[name], right[name]) for name in right)
    assert same_bytes(found[EMBED], model[EMBED]) and same_bytes(found[HEAD], model[HEAD])
    assert Report.load(tmp_path / "chosen").leave == ["embeddings"]
    changed = sum(int((right[name] != model[name]).sum()) for name in model) / sum(map(torch.numel, model.values()))
    assert share == pytest.approx(changed)
    with pytest.raises(InputError, match="leave"):
        sweep(*job.checkpoints, *data, **settings, leave="*nothing*")


@pytest.mark.parametrize("rule", ["tv", "grad"])
def test_a_strength_that_is_chosen_is_that_of_the_rest(rule: str, job: Job, tmp_path: Path) -> None:
    how: dict[str, Any] = {"rule": rule, "leave": "embeddings", "max_retain_rise": 0.02, "progress": False}
    data = job.forget, job.retain
    report = unlearn(*job.checkpoints, *data, **how, out=tmp_path / "out")
    swept = sweep(*job.checkpoints, *data, **how)
    assert swept.best is not None and report.lam == swept.best.lam > 0
    assert report.choice is not None and report.choice.after.retain_loss == pytest.approx(swept.best.retain_loss)
    model, found = read_checkpoint(job.model), read_checkpoint(tmp_path / "out")
    assert same_bytes(found[EMBED], model[EMBED]) and same_bytes(found[HEAD], model[HEAD])
    assert not verify(tmp_path / "out", full=True, progress=False).problems


def test_the_command_that_a_sweep_prints_has_the_patterns(
    job: Job, importances: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    how = [f"--{role}={getattr(job, role)}" for role in ("model", "base", "tuned", "forget", "retain")]
    how += ["--forget-importance", str(importances[0]), "--retain-importance", str(importances[1])]
    assert cli.main(["sweep", *how, "--rule", "grad", "--lams", "1", "--leave", "*norm*", "--leave", "embeddings"]) == 0
    assert "--leave '*norm*,embeddings' --lam" in capsys.readouterr().out


def test_live_modules(job: Job, tmp_path: Path) -> None:
    for number, (chosen, parts) in enumerate(CHOICES):
        apply(*job.checkpoints, rule="tv", lam=0.7, **chosen, out=tmp_path / f"out {number}", progress=False)
        module = AutoModelForCausalLM.from_pretrained(job.model)
        count = apply_to_module_(module, job.base, job.tuned, rule="tv", lam=0.7, **chosen)
        module.save_pretrained(tmp_path / f"live {number}")
        found, right = (read_checkpoint(tmp_path / f"{kind} {number}") for kind in ("live", "out"))
        assert all(same_bytes(found[name], right[name]) for name in right)
        assert count == sum(not any(part in name for part in parts) for name in right)
    with pytest.raises(InputError, match=r"only .*no parameter of the module"):
        apply_to_module_(module, job.base, job.tuned, rule="tv", only="*nothing*")


@pytest.mark.parametrize("pattern", [EMBED, HEAD])
def test_tied_live_modules(pattern: str, tmp_path: Path) -> None:
    job = write_job(tmp_path, tie_word_embeddings=True)
    module = AutoModelForCausalLM.from_pretrained(job.model)
    before = module.lm_head.weight.clone()
    apply_to_module_(module, job.base, job.tuned, rule="tv", leave=pattern)
    assert torch.equal(module.lm_head.weight, before)
    apply_to_module_(module, job.base, job.tuned, rule="tv", only=pattern)
    assert not torch.equal(module.lm_head.weight, before)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("given", [{"leave": "*q_proj*"}, {"only": "*layers.1.*"}])
def test_adapters(given: dict[str, Any], job: Job, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(job.base)
    config = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights="gaussian")
    adapted = get_peft_model(base, config)
    nudge_(adapted, 3)
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = job.model, job.base, tmp_path / "adapter"
    apply(*inputs, rule="tv", lam=0.7, out=tmp_path / "whole", progress=False)
    report = apply(*inputs, rule="tv", lam=0.7, **given, out=tmp_path / "out", progress=False)
    names = read_checkpoint(job.model)
    parts = ["q_proj"] if "leave" in given else [name for name in names if ".1." not in name]
    check(tmp_path / "out", names, read_checkpoint(tmp_path / "whole"), parts)
    assert BY_CHOICE in report.counts
    assert not verify(tmp_path / "out", full=True, progress=False).problems
    with pytest.raises(InputError, match="nothing would change in all tensors that only and leave let"):
        apply(*inputs, rule="tv", only="norms", out=tmp_path / "none", progress=False)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tied_matrix_that_an_adapter_has_for_one_use_is_taken_if_it_is_left(tmp_path: Path) -> None:
    job = write_job(tmp_path, torch.float32, tie_word_embeddings=True)
    config = LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights="gaussian")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(job.base), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = job.model, job.base, tmp_path / "adapter"
    with pytest.raises(InputError, match="is tied"):
        apply(*inputs, rule="tv", out=tmp_path / "out", progress=False)
    apply(*inputs, rule="tv", leave="embeddings", out=tmp_path / "out", progress=False)
    found, model = read_checkpoint(tmp_path / "out"), read_checkpoint(job.model)
    assert {name for name in model if not same_bytes(found[name], model[name])} == {n for n in model if "q_proj" in n}


@pytest.mark.parametrize("sizes", [(308, 300, 304), (300, 308, 300)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_vocabulary_that_was_resized_may_be_left(stream: bool, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    paths = []
    for seed, (role, rows) in enumerate(zip(("model", "base", "tuned"), sizes, strict=True)):
        module = llama(0)
        module.resize_token_embeddings(rows, mean_resizing=False)
        nudge_(module, seed)
        module.save_pretrained(tmp_path / role)
        tokenizer().save_pretrained(tmp_path / role)
        paths.append(tmp_path / role)
    data = [write_lines(tmp_path / f"{role}.jsonl", rows) for role, rows in (("forget", FORGET), ("retain", RETAIN))]
    settings: dict[str, Any] = {"rule": "grad", "lam": 1.0, "stream": stream, "check": False, "progress": False}
    with pytest.raises(InputError, match="common_rows"):
        unlearn(*paths, *data, **settings, leave="norms", out=tmp_path / "out")
    unlearn(*paths, *data, **settings, common_rows=True, out=tmp_path / "whole")
    unlearn(*paths, *data, **settings, leave="embeddings", out=tmp_path / "out")
    check(tmp_path / "out", read_checkpoint(paths[0]), read_checkpoint(tmp_path / "whole"), [EMBED, HEAD])
    assert not verify(tmp_path / "out", full=True, progress=False).problems
    live = AutoModelForCausalLM.from_pretrained(paths[0])
    apply_to_module_(live, *paths[1:], rule="tv", leave="embeddings")
    sweep(*paths, *data, rule="tv", lams=[1.0], leave="embeddings", progress=False)


def test_experts_that_are_joined_in_memory(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "Mixtral")
    paths = [write(build(family, seed), tmp_path / role) for seed, role in enumerate(("model", "base", "tuned"))]
    data = [write_lines(tmp_path / f"{role}.jsonl", rows) for role, rows in (("forget", FORGET), ("retain", RETAIN))]
    given: dict[str, Any] = {"leave": "*experts.2.*", "rule": "tv"}
    apply(*paths, rule="tv", out=tmp_path / "whole", progress=False)
    apply(*paths, **given, out=tmp_path / "out", progress=False)
    model = read_checkpoint(paths[0])
    check(tmp_path / "out", model, read_checkpoint(tmp_path / "whole"), ["experts.2."])
    module = AutoModelForCausalLM.from_pretrained(paths[0])
    apply_to_module_(module, *paths[1:], **given)
    module.save_pretrained(tmp_path / "live")
    found, right = read_checkpoint(tmp_path / "live"), read_checkpoint(tmp_path / "out")
    assert all(same_bytes(found[name], right[name]) for name in right)
    swept = sweep(*paths, *data, **given, lams=[1.0], progress=False)
    changed = sum(int((right[name] != model[name]).sum()) for name in model) / sum(map(torch.numel, model.values()))
    assert swept.rows[1].changed == pytest.approx(changed)
    AutoModelForCausalLM.from_pretrained(paths[0]).save_pretrained(tmp_path / "joined", save_original_format=False)
    joined = next(name for name in read_checkpoint(tmp_path / "joined") if "experts.gate_up_proj" in name)
    apply(tmp_path / "joined", *paths[1:], rule="tv", leave=joined, out=tmp_path / "kept", progress=False)
    kept, theta = read_checkpoint(tmp_path / "kept"), read_checkpoint(tmp_path / "joined")
    assert [name for name in theta if same_bytes(kept[name], theta[name])] == [joined]
    tokenizer().save_pretrained(tmp_path / "joined")
    swept = sweep(tmp_path / "joined", *paths[1:], *data, rule="tv", leave=joined, lams=[1.0], progress=False)
    changed = sum(int((kept[name] != theta[name]).sum()) for name in theta) / sum(map(torch.numel, theta.values()))
    assert swept.rows[1].changed == pytest.approx(changed)


@contextmanager
def stopped(monkeypatch: pytest.MonkeyPatch, where: str) -> Iterator[None]:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(where, stop)
        yield


@pytest.mark.parametrize("kind", ["directory", "in place", "streamed"])
def test_a_stopped_run_keeps_its_patterns(
    kind: str, job: Job, importances: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(job.model, tmp_path / "model")
    inputs = model, job.base, job.tuned
    how: dict[str, Any] = {"rule": "grad", "lam": 0.7, "progress": False}
    out = model if kind == "in place" else tmp_path / "out"
    destination: dict[str, Any] = {"in_place": True} if kind == "in place" else {"out": out}

    def run(**more: Any) -> None:
        if kind == "streamed":
            unlearn(*inputs, job.forget, job.retain, **how, **destination, stream=True, **more)
        else:
            apply(*inputs, *importances, **how, **destination, **more)

    apply(*job.checkpoints, *importances, **how, out=tmp_path / "whole")
    where = {
        "directory": "perta_fast.subtraction.to_directory.describe_inputs",
        "in place": "perta_fast.subtraction.in_place.Segment.apply",
        "streamed": "perta_fast.streaming.write_behind.WriteBehind.finish",
    }[kind]
    with stopped(monkeypatch, where):
        run(leave="embeddings")
    with pytest.raises(InputError, match="resume"):
        run()
    with pytest.raises(InputError, match="resume"):
        run(leave="embeddings,norms")
    resume(out, progress=False)
    check(out, read_checkpoint(job.model), read_checkpoint(tmp_path / "whole"), [EMBED, HEAD])
    report = Report.load(out)
    assert report.leave == ["embeddings"] and report.resumed == 1
    assert not verify(out, full=True, progress=False).problems


def test_a_stopped_sweep_keeps_its_patterns(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"rule": "tv", "lams": [0.5, 1.0], "out": tmp_path / "out", "progress": False}
    how["max_retain_rise"] = 1000  # so that settings are scored one by one
    right = sweep(*job.checkpoints, job.forget, job.retain, **how | {"out": None}, leave="norms")
    measure, calls = LiveModel.measure, []

    def stop(self: LiveModel, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(LiveModel, "measure", stop)
        sweep(*job.checkpoints, job.forget, job.retain, **how, leave="norms")
    with pytest.raises(InputError, match="resume"):
        sweep(*job.checkpoints, job.forget, job.retain, **how)
    resumed: Any = resume(tmp_path / "out", progress=False)
    assert [(row.lam, row.forget_loss, row.changed) for row in resumed.rows] == [
        (row.lam, row.forget_loss, row.changed) for row in right.rows
    ]


def command(job: Job, *more: object) -> list[str]:
    return [*(f"--{role}={getattr(job, role)}" for role in ("model", "base", "tuned")), *map(str, more)]


def test_the_command_line_and_its_recipe(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tv = ("--rule", "tv", "--lam", "1")
    chosen = ("--leave", "*norm*", "--leave", "embeddings", "--only", "model.layers.*,lm_head.weight")
    assert cli.main(["unlearn", "--rule=fisher", *command(job, *tv, *chosen, "--out", tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "copied: left alone by choice" in said
    assert "changed only: model.layers.*, lm_head.weight\nleft alone: *norm*, embeddings\n" in said
    recipe = Report.load(tmp_path / "out").recipe
    assert (recipe["only"], recipe["leave"]) == ("model.layers.*,lm_head.weight", "*norm*,embeddings")
    report = tmp_path / "out" / "perta_report.json"
    assert cli.main(["unlearn", "--recipe", str(report), "--out", str(tmp_path / "again")]) == 0
    first, second = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "again")
    assert all(same_bytes(first[name], second[name]) for name in first)
    yaml = tmp_path / "run.yaml"
    lines = {"model": job.model, "base": job.base, "tuned": job.tuned, "rule": "tv", "lam": 1, "out": "third"}
    written = "".join(f"{key}: {value}\n" for key, value in lines.items())
    yaml.write_text(f'{written}only: model.layers.*,lm_head.weight\nleave: "*norm*,embeddings"\n')
    assert cli.main(["unlearn", "--recipe", str(yaml)]) == 0
    third = read_checkpoint(tmp_path / "third")
    assert all(same_bytes(first[name], third[name]) for name in first)
    capsys.readouterr()
    cli.main(["inspect", str(tmp_path / "out")])
    assert "left alone: *norm*, embeddings" in capsys.readouterr().out
    yaml.write_text(f"{written}leave: *norm*\n")
    assert cli.main(["recipe", "check", str(yaml)]) == 2
    assert "quotes" in capsys.readouterr().err
    yaml.write_text(f'{written}leave: "*norm*,,"\n')
    assert cli.main(["recipe", "check", str(yaml)]) == 2
    assert "leave has the pattern ''" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["apply", "unlearn", "sweep"])
def test_bad_patterns_are_refused_before_a_byte_is_written(
    name: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = fingerprint(job.model.parent)
    how = ["--lam", "1"] if name != "sweep" else ["--lams", "1"]
    how += [f"--{role}={getattr(job, role)}" for role in ("forget", "retain")] if name != "apply" else []
    for given in ("--leave=*norn*", "--only=", "--leave=*", "--only=lm_head"):
        assert cli.main([name, *command(job, "--rule", "tv", *how, given, "--out", tmp_path / "out")]) == 2
        assert given[2:].partition("=")[0] in capsys.readouterr().err
    assert fingerprint(job.model.parent) == before and not list(tmp_path.iterdir())


def test_a_dry_run_looks_at_the_patterns(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = [f"--{role}={getattr(job, role)}" for role in ("forget", "retain")]
    how += ["--lam", "1", "--stream", "--dry-run", "--out", str(tmp_path / "out")]
    assert cli.main(["unlearn", "--rule=fisher", *command(job, *how, "--leave", "embeddings")]) == 0
    assert cli.main(["unlearn", "--rule=fisher", *command(job, *how, "--leave", "*embd_tokens*")]) == 2
    assert "close to it: model.embed_tokens.weight" in capsys.readouterr().err


def test_a_report_of_a_version_without_patterns_is_read(job: Job, tmp_path: Path) -> None:
    apply(*job.checkpoints, rule="tv", out=tmp_path / "out", progress=False)
    path = tmp_path / "out" / "perta_report.json"
    content = json.loads(path.read_text())
    del content["only"], content["leave"]
    path.write_text(json.dumps(content))
    assert (Report.load(tmp_path / "out").only, Report.load(tmp_path / "out").leave) == ([], [])
