"""Verification covers every file of an output, the report too, and what was read beside the weights of the inputs."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import perta_fast as pf
from perta_fast import cli
from perta_fast.files.durable import read_record, write_record
from perta_fast.records.file_hashes import read_hashes
from tests.records.test_version_1 import WRITTEN
from tests.support.models import Job, tokenizer, write_job

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
CARD, LIST, REPORT = "README.md", "perta_files.b3", "perta_report.json"
SMALL = {CARD, REPORT, "config.json", "generation_config.json", "model.safetensors.index.json"}
SMALL |= {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job with a chat template, a model card and code beside its model, and the output of rule fisher."""
    folder = tmp_path_factory.mktemp("made")
    job = write_job(folder)
    (job.model / CARD).write_text("# A model\n")
    (job.model / "modeling_own.py").write_text("x = 1\n")
    tokenizer(TEMPLATE).save_pretrained(job.base)
    pf.unlearn(*job.checkpoints, job.forget, job.retain, out=folder / "out", progress=False, lam=1.0, rule="fisher")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy, with reports that name it."""
    shutil.copytree(made, tmp_path / "copy")
    path = tmp_path / "copy" / "out" / REPORT
    path.write_text(path.read_text().replace(str(made), str(tmp_path / "copy")))
    seal(path.parent)
    return tmp_path / "copy"


def seal(out: Path) -> None:
    """Make the list agree with the report."""
    digest = blake3((out / REPORT).read_bytes()).hexdigest()
    lines = (out / LIST).read_text().splitlines()
    (out / LIST).write_text("".join(f"{digest if line.endswith(REPORT) else line[:64]}{line[64:]}\n" for line in lines))


def problems(folder: Path) -> list[str]:
    result = pf.verify(folder / "out", progress=False)
    text = result.summary()
    assert text.endswith("Verification failed." if result.problems else "Nothing wrong was found.")
    return result.problems


def test_the_list_is_one_for_b3sum(made: Path) -> None:
    out = made / "out"
    listed = read_hashes(out)
    assert listed == {path.name: blake3(path.read_bytes()).hexdigest() for path in out.iterdir() if path.name != LIST}
    assert listed.keys() >= SMALL | {"modeling_own.py"}
    if shutil.which("b3sum"):
        subprocess.run(["b3sum", "--check", LIST], cwd=out, check=True)


def test_a_fresh_run_is_right(made: Path) -> None:
    result = pf.verify(made / "out", progress=False)
    assert result.problems == []
    assert result.companions == len(SMALL) + 1
    assert "8 files beside the shards, with the report, have the hashes in perta_files.b3." in result.summary()


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\n")


@pytest.mark.parametrize("name", sorted(SMALL | {"modeling_own.py"}))
def test_every_changed_file_of_the_output_is_found(name: str, folder: Path) -> None:
    append(folder / "out" / name)
    assert problems(folder) == [f"{folder / 'out' / name} has changed since the run"]


def test_a_report_that_says_something_else_is_found(folder: Path) -> None:
    path = folder / "out" / REPORT
    content = json.loads(path.read_text())
    content["data"]["forget"]["samples"] += 1
    path.write_text(json.dumps(content))
    assert problems(folder) == [f"{path} has changed since the run"]


@pytest.mark.parametrize("name", sorted(SMALL - {REPORT, "model.safetensors.index.json"}))
def test_every_file_that_is_gone_is_found(name: str, folder: Path) -> None:
    (folder / "out" / name).unlink()
    assert problems(folder) == [f"{folder / 'out' / name} is gone"]


@pytest.mark.parametrize(
    "name",
    [
        *("chat_template.jinja", "extra.safetensors", "model.safetensors", "pytorch_model.bin", "adapter_config.json"),
        *("added_tokens.json", "tokenizer.model", "vocab.txt", "merges.txt", "evil.py", "model.gguf"),
        *("additional_chat_templates/tools.jinja", "preprocessor_config.json"),
    ],
)
def test_added_files_are_found(name: str, folder: Path) -> None:
    path = folder / "out" / name
    path.parent.mkdir(exist_ok=True)
    if name == "model.safetensors":  # beside an index that does not name it
        path.write_bytes(b"")
        with pytest.raises(pf.InputError, match=r"model\.safetensors"):
            problems(folder)
        return
    path.write_bytes(b"{}")
    assert problems(folder) == [f"{path} was added after the run"]


@pytest.mark.parametrize("change", [append, Path.unlink])
def test_a_model_card_that_was_edited_says_nothing_against_the_weights(
    change: Callable[[Path], object], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "out"
    change(out / CARD)
    assert cli.main(["verify", str(out)]) == 1
    text = capsys.readouterr().out
    what = "has changed since the run" if change is append else "is gone"
    only = "Only this text differs: weights, config, tokenizer and report are as the run wrote them."
    assert f"WRONG: {out / CARD} {what}.\n{only}\nVerification failed." in text
    assert text.startswith("Not refuted: ")  # the importances were not kept
    append(out / "config.json")
    assert cli.main(["verify", str(out)]) == 1
    text = capsys.readouterr().out
    assert "Only this text" not in text and "Not confirmed, as something is wrong" in text


def test_notes_are_named_but_not_wrong(folder: Path) -> None:
    (folder / "out" / "notes.md").write_text("x")
    (folder / "out" / ".gitattributes").write_text("x")
    result = pf.verify(folder / "out", progress=False)
    assert result.problems == []
    assert f"{folder / 'out' / 'notes.md'}, which was added after the run" in result.uncovered


@pytest.mark.parametrize(
    "content", [b"x\n", b"", b"0" * 64 + b"  ../../etc/passwd\n", b"0" * 64 + b"  /etc/passwd\n", b"0" * 64 + b"  a\n"]
)
def test_a_list_that_no_run_wrote_is_wrong(content: bytes, folder: Path) -> None:
    (folder / "out" / LIST).write_bytes(content)
    (found,) = problems(folder)
    assert found.startswith(str(folder / "out" / LIST))


def test_a_list_that_names_a_pipe_waits_for_nobody(folder: Path) -> None:
    path = folder / "out" / "config.json"
    path.unlink()
    os.mkfifo(path)
    (found,) = problems(folder)
    assert "Not a regular file" in found


def test_a_shard_has_one_hash(folder: Path) -> None:
    path = folder / "out" / LIST
    first = next(
        line for line in path.read_text().splitlines() if line.endswith("of-00005.safetensors") or "model-" in line
    )
    path.write_text(path.read_text().replace(first[:64], "0" * 64))
    (found,) = problems(folder)
    assert found.endswith(f"has another hash in the report than in {LIST}")


def test_names_with_escapes(folder: Path) -> None:
    name = "odd\\na\nme.txt"
    (folder / "model" / name).write_text("x")
    job = Job(folder / "model", folder / "base", folder / "tuned", folder / "forget.jsonl", folder / "retain.jsonl")
    pf.apply(*job.checkpoints, rule="tv", out=folder / "again", progress=False)
    assert read_hashes(folder / "again")[name] == blake3(b"x").hexdigest()
    assert pf.verify(folder / "again", progress=False).problems == []


# What was read beside the weights: of the model, which is copied, and of the base, where the gradients were taken.
READ = ["model/config.json", "model/tokenizer.json", "model/generation_config.json", "model/modeling_own.py"]
READ += ["base/config.json", "base/tokenizer.json", "base/tokenizer_config.json", "base/chat_template.jinja"]
READ += ["tuned/config.json"]


@pytest.mark.parametrize("name", READ)
def test_changed_inputs_are_found(name: str, folder: Path) -> None:
    append(folder / name)
    assert problems(folder) == [f"{folder / name} has changed since the run"]


def test_the_model_card_of_an_input_is_named(folder: Path) -> None:
    append(folder / "model" / CARD)
    result = pf.verify(folder / "out", progress=False)
    assert (result.problems, result.changed) == ([], [f"model file {folder / 'model' / CARD}"])
    (folder / "model" / CARD).unlink()
    assert pf.verify(folder / "out", progress=False).problems == []


def test_what_is_not_read_is_no_input(made: Path) -> None:
    report = pf.Report.load(made / "out")
    assert report.inputs["tuned"]["files"].keys() & SMALL == {"config.json", "model.safetensors.index.json"}
    assert CARD not in report.inputs["base"]["files"]


def test_tokens_of_importances_that_were_given(folder: Path) -> None:
    for role in ("forget", "retain"):
        pf.estimate_importance(folder / "base", folder / f"{role}.jsonl", out=folder / f"i-{role}", progress=False)
    inputs = [folder / name for name in ("model", "base", "tuned", "i-forget", "i-retain")]
    pf.apply(*inputs, out=folder / "given", progress=False)
    append(folder / "base" / "tokenizer.json")
    found = pf.verify(folder / "given", progress=False).problems
    assert found == [f"{folder / 'base' / 'tokenizer.json'} has changed since the run"]


def test_in_place(folder: Path) -> None:
    model = folder / "model"
    (model / "training_args.txt").write_text("x")
    pf.apply(model, folder / "base", folder / "tuned", rule="tv", in_place=True, progress=False)
    result = pf.verify(model, progress=False)
    assert (result.problems, result.companions) == ([], len(SMALL) + 2)
    append(model / "tokenizer.json")
    (model / "chat_template.jinja").write_text("")
    found = pf.verify(model, progress=False).problems
    assert found == [
        f"{model / 'tokenizer.json'} has changed since the run",
        f"{model / 'chat_template.jinja'} was added after the run",
    ]


def test_twice_in_a_row(folder: Path) -> None:
    pf.apply(folder / "out", folder / "base", folder / "tuned", rule="tv", out=folder / "second", progress=False)
    assert pf.verify(folder / "second", progress=False).problems == []
    pf.tune(folder / "second", folder / "forget.jsonl", folder / "tune", full=True, epochs=1, progress=False)
    assert not (folder / "tune" / LIST).exists()


def test_older_outputs_are_verified_with_what_they_hold(folder: Path) -> None:
    shutil.copytree(WRITTEN / "applied", folder / "applied")
    result = pf.verify(folder / "applied", progress=False)
    assert (result.problems, result.companions) == ([], 0)
    assert any("perta_files.b3 is not there; earlier versions wrote none" in line for line in result.uncovered)


def test_a_list_that_is_gone(folder: Path) -> None:
    (folder / "out" / LIST).unlink()
    assert pf.verify(folder / "out", progress=False).problems == [f"{folder / 'out' / LIST} is gone"]


def stop(*arguments: Any, **settings: Any) -> None:
    raise KeyboardInterrupt


Change = Callable[[Path], object]
CHANGES: list[tuple[str, Change, str]] = [
    ("model/tokenizer.json", append, "has changed since the run began; put the old file back"),
    ("model/config.json", append, "has changed since the run began"),
    ("model/README.md", append, "has changed since the run began"),
    ("model/generation_config.json", Path.unlink, "is gone since the run began; put the old file back"),
    ("model/chat_template.jinja", append, "was not there when the run began; move it away"),
    ("base/chat_template.jinja", append, "has changed since the run began"),
    ("base/added_tokens.json", append, "was not there when the run began"),
    ("tuned/config.json", append, "has changed since the run began"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("name", "change", "reason"), CHANGES)
def test_companions_that_changed_between_a_stop_and_resume(
    name: str, change: Change, reason: str, stream: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = folder / "resumed"
    inputs = [folder / role for role in ("model", "base", "tuned", "forget.jsonl", "retain.jsonl")]
    with monkeypatch.context() as patched, pytest.raises(pf.Interrupted):
        patched.setattr("perta_fast.subtraction.to_directory.describe_output", stop)
        pf.unlearn(*inputs, out=out, stream=stream, progress=False, lam=1.0, rule="fisher")
    path = folder / name
    before = path.read_bytes() if path.exists() else None
    change(path)
    with pytest.raises(pf.InputError, match=reason) as caught:
        pf.resume(out, progress=False)
    assert str(path) in str(caught.value)
    assert not out.exists()
    if before is None:
        path.unlink()
    else:
        path.write_bytes(before)
    pf.resume(out, progress=False)
    assert pf.verify(out, progress=False).problems == []
    for shard in [] if stream else (folder / "out").glob("*.safetensors"):  # a walk adds in another order
        assert (out / shard.name).read_bytes() == shard.read_bytes()


def test_a_run_that_an_earlier_version_began_is_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder / "resumed"
    with monkeypatch.context() as patched, pytest.raises(pf.Interrupted):
        patched.setattr("perta_fast.subtraction.to_directory.describe_output", stop)
        pf.apply(folder / "model", folder / "base", folder / "tuned", rule="tv", out=out, progress=False)
    path = folder / ".resumed.perta-partial" / ".perta-run" / "job.json"
    job = read_record(path)
    assert job.pop("companions")["model"]
    write_record(path, job)
    pf.resume(out, progress=False)
    assert pf.verify(out, progress=False).problems == []
    assert "tokenizer.json" in pf.Report.load(out).inputs["model"]["files"]


def test_tokenizers_of_a_sweep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [folder / role for role in ("model", "base", "tuned", "forget.jsonl", "retain.jsonl")]
    with monkeypatch.context() as patched, pytest.raises(pf.Interrupted):
        patched.setattr("perta_fast.sweeping.run.draw", stop)
        pf.sweep(*inputs, rule="tv", lams=[0.5], out=folder / "sweep", progress=False)
    append(folder / "model" / "tokenizer.json")
    with pytest.raises(pf.InputError, match=r"tokenizer\.json: has changed since the sweep began"):
        pf.resume(folder / "sweep", progress=False)


def copied_line(content: str) -> str:
    return content + content.splitlines(keepends=True)[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content + " ",
        lambda content: content + "\n",
        lambda content: content + "0" * 64,
        lambda content: content.removesuffix("\n"),
        lambda content: content.replace("\n", "\r\n"),
        lambda content: "".join(reversed(content.splitlines(keepends=True))),
        lambda content: "".join(line for line in content.splitlines(keepends=True) if "safetensors" not in line),
        copied_line,
    ],
)
def test_a_list_that_was_changed_is_found(change: Callable[[str], str], folder: Path) -> None:
    path = folder / "out" / LIST
    path.write_bytes(change(path.read_text()).encode())
    assert problems(folder)[0].startswith(f"{path}")


def test_what_has_no_hash_is_named(folder: Path) -> None:
    out = folder / "out"
    for name in ("below/config.json", "custom_generate/generate.py", ".hidden.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
    (out / "chat_template.json").mkdir()
    (out / "tokenizer.model").symlink_to("nowhere")
    os.mkfifo(out / "vocab.txt")
    result = pf.verify(out, progress=False)
    assert result.problems == []
    names = (".hidden.json", "below", "chat_template.json", "custom_generate", "tokenizer.model", "vocab.txt")
    assert result.uncovered == [", ".join(str(out / name) for name in names)]


def test_a_file_that_became_a_link_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", sorted(path.name for path in (folder / "out").glob("*.safetensors"))[0]):
        path = (folder / "out" / name).rename(tmp_path / name)
        (folder / "out" / name).symlink_to(path)
        result = pf.verify(folder / "out", progress=False)
        assert result.problems == []
        assert result.uncovered.pop().endswith(f"has become a link to {path}; what is there now was checked")
        path.write_bytes(path.read_bytes() + b"\n")
        assert problems(folder)
        path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [b"", b"{", b'{"weight_map": {"a": "../b"}}'])
def test_a_damaged_index_is_one_of_the_problems(damage: bytes, folder: Path) -> None:
    (folder / "out" / "model.safetensors.index.json").write_bytes(damage)
    (folder / "out" / "config.json").write_bytes(damage)
    names = ("config.json", "model.safetensors.index.json")
    assert problems(folder) == [f"{folder / 'out' / name} has changed since the run" for name in names]
