"""Bad input from the command line: the exit status, one line that names what is wrong, and nothing touched.

Each case damages inputs that are good, runs ``perta`` on them, and looks at everything it could have changed.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import cli
from tests.support.checkpoints import draw, fingerprint, write_checkpoint, write_importance, write_raw
from tests.support.children import perta
from tests.support.inputs import HEAD, Inputs, write_inputs
from tests.support.models import Job

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.0.up"


def assert_refused(
    arguments: list[object], status: int, words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``perta`` exits with ``status`` after one line with all ``words``; nothing below ``folder`` changes."""
    before, present = fingerprint(folder), sorted(folder.rglob("*"))
    assert cli.main(list(map(str, arguments))) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    # transformers may have shown a bar, or said something of its own.
    lines = [line for line in captured.err.splitlines() if "perta: error: " in line]
    assert captured.err.splitlines()[-1:] == lines
    assert lines[0].startswith("perta: error: ")
    assert [word for word in words if word not in lines[0]] == []
    assert fingerprint(folder) == before
    assert sorted(folder.rglob("*")) == present


def removed(path: Path) -> Path:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    return path


def spoil_importance(inputs: Inputs, role: str, value: float) -> None:
    tensors = inputs.tensors[role] | {UP: inputs.tensors[role][UP].index_fill(1, torch.tensor(30), value)}
    write_importance(removed(inputs[role]), tensors, shards=2)


def rewrite(inputs: Inputs, role: str, **changed: torch.Tensor) -> None:
    write_checkpoint(removed(inputs[role]), inputs.tensors[role] | changed, 2)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        removed(path)
    torch.save({}, folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        removed(path)
    (folder / "adapter_config.json").write_text("{}")


# What is done to the inputs; what is added to the arguments; the exit status; what the line must say.
Case = tuple[Callable[[Inputs], object], list[str], int, list[str]]
OVER_INPUT = ["--out", "{inputs}/base", "--overwrite"]
APPLY: dict[str, Case] = {
    "missing directory": (
        lambda i: removed(i["tuned"]), [], 2, ["{inputs}/tuned: no such directory", "hf download"],
    ),
    "a file for a directory": (
        lambda i: removed(i["base"]).write_text(""),
        [], 2, ["{inputs}/base: is not a directory"],
    ),
    "nothing in it": (
        lambda i: removed(i["base"]).mkdir(),
        [], 2, ["{inputs}/base: holds neither model.safetensors nor " + INDEX],
    ),
    "pickled weights": (
        lambda i: pickled(i["model"]), [], 2, ["{inputs}/model: holds pickled weights", "python -c"],
    ),
    "adapter": (lambda i: adapter(i["tuned"]), [], 2, ["an adapter of type None, not LORA"]),
    "not safetensors": (
        lambda i: (i["base"] / FIRST).write_text("<!DOCTYPE html><html>"),
        [], 2, ["{inputs}/base/" + FIRST, "is not a safetensors file"],
    ),
    "empty shard": (
        lambda i: (i["base"] / FIRST).write_bytes(b""), [], 2, ["{inputs}/base/" + FIRST, "it has 0 bytes"],
    ),
    "truncated shard": (
        lambda i: os.truncate(i["tuned"] / SECOND, (i["tuned"] / SECOND).stat().st_size - 1),
        [], 2, ["{inputs}/tuned/" + SECOND, "is truncated"],
    ),
    "header larger than the file": (
        lambda i: write_raw(i["model"] / FIRST, {}, length=10**6),
        [], 2, ["{inputs}/model/" + FIRST, "claims 1000000 bytes"],
    ),
    "absent shard": (
        lambda i: removed(i["base"] / SECOND),
        [], 2, ["{inputs}/base/" + INDEX, f"names the shard {SECOND}, which is not there"],
    ),
    "damaged index": (
        lambda i: (i["base"] / INDEX).write_text("{"), [], 2, ["{inputs}/base/" + INDEX, "is not JSON"],
    ),
    "shape mismatch": (
        lambda i: rewrite(i, "tuned", **{HEAD: draw((5, 37))}),
        [], 2, [f"tensor {HEAD}", "[37, 5] in {inputs}/model", "[5, 37] in {inputs}/tuned"],
    ),
    "unknown tensor": (
        lambda i: rewrite(i, "base", other=draw((2,))), [], 2, ["{inputs}/base", "tensor other", "lacks"],
    ),
    "type without arithmetic": (
        lambda i: rewrite(i, "base", **{UP: draw((33, 31), torch.float64)}),
        [], 2, [f"tensor {UP}", "{inputs}/base", "F64", "float32, bfloat16 or float16"],
    ),
    "NaN in importance": (
        lambda i: spoil_importance(i, "forget", float("nan")),
        [], 2, ["{inputs}/forget/importance-", f"tensor {UP} has NaN or infinite importance"],
    ),
    "infinity in importance": (
        lambda i: spoil_importance(i, "retain", float("inf")),
        [], 2, ["{inputs}/retain/importance-", f"tensor {UP} has NaN or infinite importance"],
    ),
    "importance of another estimator": (
        lambda i: None, ["--rule", "empirical-fisher"], 2, ["{inputs}/forget: holds estimator grad", "needs"],
    ),
    "a model for an importance": (
        lambda i: None,
        ["--forget-importance", "{inputs}/model"], 2, ["{inputs}/model: holds neither importance.safetensors"],
    ),
    "an importance for a model": (
        lambda i: None, ["--model", "{inputs}/forget"], 2, ["{inputs}/forget: holds neither model.safetensors"],
    ),
    "importance for rule tv": (lambda i: None, ["--rule", "tv"], 2, ["rule tv takes no importance"]),
    "infinite lambda": (lambda i: None, ["--lam", "inf"], 2, ["lam is inf", "finite"]),
    "lambda not a number": (lambda i: None, ["--lam", "nan"], 2, ["lam is nan", "finite"]),
    "p of zero": (lambda i: None, ["--p", "0"], 2, ["p is 0.0", "greater than 0"]),
    "negative p": (lambda i: None, ["--p", "-2"], 2, ["p is -2.0", "greater than 0"]),
    "negative alpha": (lambda i: None, ["--alpha", "-1"], 2, ["alpha is -1.0", "at least 0"]),
    "threshold beyond 1": (lambda i: None, ["--threshold", "1"], 2, ["threshold is 1.0", "less than 1"]),
    "no threads": (lambda i: None, ["--threads", "0"], 2, ["threads is 0", "at least 1"]),
    "output above the inputs": (
        lambda i: None, ["--out", "{inputs}"], 2, ["{inputs}: is or contains the input"],
    ),
    "output over an input": (lambda i: None, OVER_INPUT, 2, ["{inputs}/base: is or contains the input"]),
    "output is a file": (
        lambda i: None, ["--out", "{inputs}/model/" + FIRST], 2, ["{inputs}/model/" + FIRST],
    ),
    "output exists": (
        lambda i: write_checkpoint(i.folder / "full", {}),
        ["--out", "{inputs}/full"], 2, ["{inputs}/full: exists and is not empty", "--overwrite"],
    ),
    "result beyond the type": (
        lambda i: None, ["--lam", "1e39"], 1, ["tensor ", "the result would hold NaN or infinite values"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", APPLY)
def test_apply(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, more, status, words = APPLY[case]
    inputs = write_inputs(tmp_path / "inputs", shards=2)
    damage(inputs)
    arguments = [
        *("apply", "--model", inputs["model"], "--base", inputs["base"], "--tuned", inputs["tuned"]),
        *("--forget-importance", inputs["forget"], "--retain-importance", inputs["retain"]),
        *("--rule", "grad", "--lam", "1", "--out", tmp_path / "out"),
        *(text.format(inputs=inputs.folder) for text in more),
    ]
    said = [word.format(inputs=inputs.folder) for word in words]
    assert_refused(arguments, status, said, tmp_path, capsys)


@pytest.mark.parametrize("missing", ["forget", "retain"])
def test_apply_without_an_importance(missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    arguments: list[object] = [
        *("apply", "--model", inputs["model"], "--base", inputs["base"], "--tuned", inputs["tuned"]),
        *("--lam", "1", "--out", tmp_path / "out"),
    ]
    for role in {"forget", "retain"} - {missing}:
        arguments += [f"--{role}-importance", inputs[role]]
    said = [f"rule fisher needs --{missing}-importance", "perta importance"]
    assert_refused(arguments, 2, said, tmp_path, capsys)


JobCase = tuple[Callable[[Path], object], list[str], int, list[str]]
UNLEARN: dict[str, JobCase] = {
    "missing data": (lambda j: removed(j / "forget.jsonl"), [], 2, ["{job}/forget.jsonl: cannot be read"]),
    "data is a directory": (lambda j: None, ["--retain", "{job}"], 2, ["{job}: cannot be read"]),
    "empty data": (lambda j: (j / "retain.jsonl").write_text("\n\n"), [], 2, ["{job}/retain.jsonl: holds no"]),
    "bad line": (
        lambda j: (j / "forget.jsonl").write_text('{"text": "a"}\n\n{"text": 3}\n'),
        [], 2, ["{job}/forget.jsonl, line 3"],
    ),
    "data not UTF-8": (
        lambda j: (j / "forget.jsonl").write_bytes(b'{"text": "\xff"}'), [], 2, ["{job}/forget.jsonl", "UTF-8"],
    ),
    "nothing left to learn from": (
        lambda j: None, ["--max-length", "1"], 2, ["{job}/forget.jsonl, line 1", "no token", "first 1 tokens"],
    ),
    "no tokenizer": (
        lambda j: [removed(path) for path in (j / "base").glob("tokenizer*")],
        [], 2, ["{job}/base: transformers cannot load this model"],
    ),
    "no configuration": (
        lambda j: removed(j / "base" / "config.json"), [], 2, ["{job}/base: has no config.json", "cannot load"],
    ),
    "damaged configuration": (
        lambda j: (j / "base" / "config.json").write_text("{"), [], 2, ["{job}/base/config.json: is not JSON"],
    ),
    "configuration of another size": (
        lambda j: edit_json(j / "base" / "config.json", hidden_size=64),
        [], 2, ["{job}/base: transformers cannot load this model"],
    ),
    "configuration of a value out of type": (
        lambda j: edit_json(j / "base" / "config.json", hidden_size="wide"),
        [], 2, ["{job}/base: transformers cannot load this model", "hidden_size"],
    ),
    "configuration of more layers": (
        lambda j: edit_json(j / "base" / "config.json", num_hidden_layers=3),
        [], 2, ["{job}/base: lacks tensor model.layers.2.", "config.json calls for"],
    ),
    "unknown architecture": (
        lambda j: edit_json(j / "base" / "config.json", model_type="nonesuch"),
        [], 2, ["{job}/base: transformers cannot load this model", "nonesuch"],
    ),
    "no batch": (lambda j: None, ["--batch-size", "0"], 2, ["--batch-size is 0", "at least 1"]),
    "no length": (lambda j: None, ["--max-length", "0"], 2, ["--max-length is 0", "at least 1"]),
    "negative length": (lambda j: None, ["--max-length", "-3"], 2, ["--max-length is -3", "at least 1"]),
    "no threads": (lambda j: None, ["--threads", "-1"], 2, ["threads is -1", "at least 1"]),
    "lambda not a number": (lambda j: None, ["--lam", "nan"], 2, ["lam is nan"]),
    "output over the data": (lambda j: None, ["--out", "{job}", "--overwrite"], 2, ["{job}: is or contains"]),
    "importances over an input": (
        lambda j: None,
        ["--save-importance", "{job}/tuned", "--overwrite"], 2, ["{job}/tuned: is or contains the input"],
    ),
    "importances inside the output": (
        lambda j: None, ["--save-importance", "{job}/../out/kept"], 2, ["out: is or contains the input"],
    ),
    "importances over something else": (
        lambda j: None, ["--save-importance", "{job}"], 2, ["{job}: is or contains the input"],
    ),
}  # fmt: skip


def unlearn_arguments(folder: Path, *more: object) -> list[object]:
    return [
        *(
            "unlearn",
            "--rule=fisher",
            "--model",
            folder / "model",
            "--base",
            folder / "base",
            "--tuned",
            folder / "tuned",
        ),
        *("--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl", "--lam", "1", *more),
    ]


@pytest.mark.parametrize("case", UNLEARN)
def test_unlearn(case: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, more, status, words = UNLEARN[case]
    copy = tmp_path / "job"
    shutil.copytree(job.model.parent, copy)
    damage(copy)
    arguments = unlearn_arguments(copy, "--out", tmp_path / "out", *(text.format(job=copy) for text in more))
    assert_refused(arguments, status, [word.format(job=copy) for word in words], tmp_path, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = unlearn_arguments(job.model.parent, "--out", tmp_path / "out", "--device", "cuda")
    assert_refused(arguments, 2, ["device cuda was asked for, but torch finds no CUDA device"], tmp_path, capsys)


@pytest.mark.parametrize("missing", ["--forget", "--retain"])
def test_unlearn_without_data(missing: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = unlearn_arguments(job.model.parent, "--out", tmp_path / "out")
    place = arguments.index(missing)
    del arguments[place : place + 2]
    assert_refused(arguments, 2, [f"rule fisher needs {missing[2:]} data"], tmp_path, capsys)


@pytest.mark.parametrize("place", ["model", ".", "forget.jsonl"])
def test_importance_over_its_input(place: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "job"
    shutil.copytree(job.model.parent, copy)
    arguments = ["importance", "--model", copy / "model", "--data", copy / "forget.jsonl", "--overwrite"]
    assert_refused([*arguments, "--out", copy / place], 2, ["is or contains the input"], tmp_path, capsys)


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize("name", ["nowhere", "file", "empty", "x" * 300])
def test_places_without_anything_to_look_at(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert_refused([command, tmp_path / name], 2, [str(tmp_path / name)], tmp_path, capsys)


def test_verify_of_a_malformed_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "perta_report.json").write_text('{"rule": "fisher"}')
    words = [f"{tmp_path}/perta_report.json: is not a report that this version understands"]
    assert_refused(["verify", tmp_path], 2, words, tmp_path, capsys)


@pytest.mark.parametrize("name", ["nowhere", "broken"])
def test_from_a_shell(name: str, tmp_path: Path) -> None:
    """As above, with all that a process of its own adds: nothing but the line on standard error."""
    inputs = write_inputs(tmp_path / "inputs")
    (tmp_path / "broken").mkdir()
    write_raw(tmp_path / "broken" / "model.safetensors", b"[")
    before = fingerprint(tmp_path)
    process = perta(
        *("apply", "--model", inputs["model"], "--base", inputs["base"], "--tuned", tmp_path / name),
        *("--rule", "tv", "--lam", "1", "--out", tmp_path / "out"),
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith(f"perta: error: {tmp_path / name}")
    assert process.stderr.count("\n") == 1
    assert fingerprint(tmp_path) == before
