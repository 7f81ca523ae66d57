"""Directories made to do harm: harmful links and devices are not followed, pickles not loaded, code not run.

``perta`` gets them as every kind of input. A trap that is loaded or run makes a directory, ``marker``.
"""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from perta_fast import cli
from tests.support.checkpoints import fingerprint, read_checkpoint, same_bytes
from tests.support.inputs import Inputs, write_inputs
from tests.support.models import Job
from tests.support.patience import patience

pytestmark = pytest.mark.usefixtures("one_thread")

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


class Bomb:
    """Makes the directory ``marker`` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def write_bombs(folder: Path, marker: Path) -> None:
    """Write pickles under all names from which programs load them."""
    for name in (
        *("pytorch_model.bin", "model.bin", "importance.bin", "training_args.bin", "optimizer.pt"),
        *("tokenizer.pkl", "model.pt", "consolidated.00.pth", "model.ckpt"),
    ):
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))


def write_code(folder: Path, marker: Path, model_type: str | None = None) -> None:
    """Write code, and name it in the configurations of model and tokenizer."""
    (folder / "trap.py").write_text(
        f"import os\nos.mkdir({str(marker)!r})\nfrom transformers import LlamaConfig as TrapConfig\n"
        "from transformers import LlamaForCausalLM as Trap, PreTrainedTokenizerFast as TrapTokenizer\n"
    )
    edit_json(
        folder / "config.json",
        auto_map={"AutoConfig": "trap.TrapConfig", "AutoModelForCausalLM": "trap.Trap"},
        **({} if model_type is None else {"model_type": model_type, "architectures": ["Trap"]}),
    )
    edit_json(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["trap.TrapTokenizer", "trap.TrapTokenizer"]}
    )


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(autouse=True)
def end() -> Iterator[None]:
    with patience():
        yield


@pytest.fixture(autouse=True)
def auto_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers marks the class that it takes instead of code that it did not run; this undoes the mark."""
    for marked in (LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast):
        monkeypatch.setattr(marked, "_auto_class", marked._auto_class)


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return write_inputs(tmp_path / "inputs", shards=2)


@pytest.fixture
def copied(job: Job, tmp_path: Path) -> Path:
    """A copy of the job, to damage."""
    shutil.copytree(job.model.parent, tmp_path / "job")
    return tmp_path / "job"


def apply(inputs: Inputs, out: Path) -> int:
    arguments = [f"--{role}={inputs[role]}" for role in ("model", "base", "tuned")]
    arguments += [f"--{role}-importance={inputs[role]}" for role in ("forget", "retain")]
    return cli.main(["apply", *arguments, "--rule=grad", "--lam=1", f"--out={out}", "--quiet"])


def estimate(folder: Path, out: Path) -> int:
    arguments = [f"--model={folder / 'base'}", f"--data={folder / 'forget.jsonl'}", f"--out={out}", "--quiet"]
    return cli.main(["importance", *arguments])


def test_the_bomb_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_the_code_is_run_by_those_who_trust_it(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_code(copied / "base", tmp_path / "marker", "trap")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    AutoConfig.from_pretrained(copied / "base", trust_remote_code=True)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("role", ["model", "base", "tuned", "forget", "retain"])
def test_pickles_alone_are_refused(role: str, inputs: Inputs, tmp_path: Path) -> None:
    for path in inputs[role].iterdir():
        path.unlink()
    write_bombs(inputs[role], tmp_path / "marker")
    before = fingerprint(tmp_path)
    assert apply(inputs, tmp_path / "out") == 2
    assert cli.main(["inspect", str(inputs[role])]) == 2
    assert fingerprint(tmp_path) == before
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "out").exists()


def test_pickles_beside_the_weights_are_left_alone(inputs: Inputs, tmp_path: Path) -> None:
    assert apply(inputs, tmp_path / "expected") == 0
    for role in ("model", "base", "tuned", "forget", "retain"):
        write_bombs(inputs[role], tmp_path / "marker")
    assert apply(inputs, tmp_path / "out") == 0
    for command in ("inspect", "verify"):
        assert cli.main([command, str(tmp_path / "out")]) == 0
    expected, found = (read_checkpoint(tmp_path / name) for name in ("expected", "out"))
    assert expected.keys() == found.keys()
    assert all(same_bytes(expected[name], found[name]) for name in expected)
    assert not (tmp_path / "marker").exists()


def test_importance_is_never_estimated_on_pickles(copied: Path, tmp_path: Path) -> None:
    write_bombs(copied / "base", tmp_path / "marker")
    assert estimate(copied, tmp_path / "beside the weights") == 0
    for path in (copied / "base").glob("*.safetensors*"):
        path.unlink()
    assert estimate(copied, tmp_path / "alone") == 2
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(("model_type", "status"), [(None, 0), ("trap", 2)])
def test_code_that_comes_with_a_model_is_not_run(
    model_type: str | None, status: int, copied: Path, tmp_path: Path
) -> None:
    """transformers has a class for the first model type; for the second there is only the code."""
    for role in ("model", "base", "tuned"):
        write_code(copied / role, tmp_path / "marker", model_type)
    assert estimate(copied, tmp_path / "importance") == status
    arguments = [f"--{role}={copied / role}" for role in ("model", "base", "tuned")]
    assert cli.main(["apply", *arguments, "--rule=tv", "--lam=1", f"--out={tmp_path / 'out'}", "--quiet"]) == 0
    assert not (tmp_path / "marker").exists()


# Each entry makes a file of the model, or the model itself, a link that never ends, a device or a pipe.
LOOPS: dict[str, Callable[[Path], object]] = {
    "shard": lambda model: relink(model / FIRST, FIRST),
    "index": lambda model: relink(model / INDEX, INDEX),
    "directory": lambda model: relink(model, "model"),
    "two shards": lambda model: cross(model),
    "device for a shard": lambda model: relink(model / FIRST, "/dev/zero"),
    "device for an index": lambda model: relink(model / INDEX, "/dev/null"),
    "pipe for a shard": lambda model: repipe(model / FIRST),
    "pipe for an index": lambda model: repipe(model / INDEX),
}


def relink(path: Path, target: str) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(target)


def cross(model: Path) -> None:
    relink(model / FIRST, SECOND)
    relink(model / SECOND, FIRST)


def repipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("loop", LOOPS)
def test_files_without_an_end_are_refused(
    loop: str, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LOOPS[loop](inputs["model"])
    present = sorted(tmp_path.rglob("*"))
    assert apply(inputs, tmp_path / "out") == 2
    assert cli.main(["inspect", str(inputs["model"])]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"perta: error: {inputs['model']}") for line in lines] == [True, True]
    assert sorted(tmp_path.rglob("*")) == present


def test_companions_without_an_end_are_left_out(inputs: Inputs, tmp_path: Path) -> None:
    (inputs["model"] / "config.json").symlink_to("config.json")
    (inputs["model"] / "vocab.json").symlink_to("/dev/zero")
    os.mkfifo(inputs["model"] / "merges.txt")
    assert apply(inputs, tmp_path / "out") == 0
    left_out = {"config.json", "vocab.json", "merges.txt"}
    assert not left_out & {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("shard", ["../../etc/passwd", "/etc/passwd", "../base/" + FIRST, "a\0.safetensors"])
def test_an_index_leads_nowhere_else(
    shard: str, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = inputs["model"] / INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, shard)}))
    before = fingerprint(tmp_path)
    assert apply(inputs, tmp_path / "out") == 2
    assert "is not the name of a safetensors file beside it" in capsys.readouterr().err
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "pipe", "loop", "model"])
def test_a_report_cannot_make_verify_read_what_has_no_end(target: str, inputs: Inputs, tmp_path: Path) -> None:
    assert apply(inputs, tmp_path / "out") == 0
    os.mkfifo(inputs.folder / "pipe")
    (inputs.folder / "loop").symlink_to("loop")
    path = (inputs.folder / target).absolute()
    report = tmp_path / "out" / "perta_report.json"
    content = json.loads(report.read_text())
    content["inputs"]["model"] = {"path": str(path.parent), "files": {path.name: {"bytes": 0, "blake3": "00"}}}
    report.write_text(json.dumps(content))
    assert cli.main(["verify", "--quiet", str(tmp_path / "out")]) in (0, 1)


def test_a_report_without_an_end_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    assert apply(inputs, tmp_path / "out") == 0
    report = tmp_path / "out" / "perta_report.json"
    for spoil in (repipe, lambda path: relink(path, path.name), lambda path: relink(path, "/dev/zero")):
        spoil(report)
        assert cli.main(["verify", "--quiet", str(tmp_path / "out")]) == 2
