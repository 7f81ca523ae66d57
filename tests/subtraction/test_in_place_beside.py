"""A run in place is refused if a run to the model's directory waits, or if a file that it would move is mounted."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import perta_fast as pf
from perta_fast import cli
from perta_fast.runs.apply import apply
from tests.support.checkpoints import fingerprint, read_checkpoint, same_bytes
from tests.support.children import run_child
from tests.support.inputs import Inputs, write_inputs
from tests.support.models import Job, write_job

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    inputs = write_inputs(tmp_path / "inputs", shards=2)
    for name in ("config.json", "README.md", "perta_report.json", "perta_files.b3"):
        (inputs["model"] / name).write_text("{}")
    return inputs


@pytest.fixture
def bind(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Mounts a copy of a file, which it returns, over the file."""
    made: list[Path] = []

    def mount(path: Path) -> Path:
        copy = tmp_path / f"elsewhere-{path.name}"
        copy.write_bytes(path.read_bytes())
        if run_child(["mount", "--bind", copy, path]).returncode != 0:
            pytest.skip("mounting is not permitted here")
        made.append(path)
        return copy

    yield mount
    for path in made:
        run_child(["umount", path], check=True)


NAMES = ["config.json", "README.md", "perta_report.json", "perta_files.b3", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", [*NAMES, "a shard"])
def test_a_file_mounted_from_elsewhere(
    name: str, inputs: Inputs, bind: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As containers mount one file: it cannot be renamed, so the run could never be finished."""
    model = inputs["model"]
    path = sorted(model.glob("*.safetensors"))[0] if name == "a shard" else model / name
    bind(path)
    before = fingerprint(tmp_path)
    with pytest.raises(pf.InputError, match=r"is a mount point, which a run in place cannot replace"):
        apply(*inputs.checkpoints, rule="tv", in_place=True, progress=False)
    assert fingerprint(tmp_path) == before
    options = [f"--{role}={path}" for role, path in zip(("model", "base", "tuned"), inputs.checkpoints, strict=True)]
    assert cli.main(["apply", *options, "--rule=tv", "--lam=1", f"--out={tmp_path / 'out'}"]) == 0  # as advised


def test_other_files_may_be_mounted(inputs: Inputs, bind: Callable[[Path], Path]) -> None:
    (inputs["model"] / "tokenizer.json").write_text("{}")
    bind(inputs["model"] / "tokenizer.json")
    apply(*inputs.checkpoints, rule="tv", in_place=True, progress=False)
    found = read_checkpoint(inputs["model"])
    assert all(same_bytes(found[name], tensor) for name, tensor in inputs.expected(None, 1.0).items())


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("rule", ["tv", "fisher"])
def test_a_run_to_the_same_directory_waits(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its importances lie beside the model, where those of a run in place would; and it would replace the result."""
    job = write_job(tmp_path / "inputs")
    model, (_, base, tuned) = job.model.rename(tmp_path / "model"), job.checkpoints
    job = Job(model, base, tuned, job.forget, job.retain)
    settings: dict[str, Any] = {"rule": rule, "lam": 1.0, "progress": False}
    data = (job.forget, job.retain)
    with monkeypatch.context() as patched, pytest.raises(pf.Interrupted):
        patched.setattr("perta_fast.subtraction.to_directory.describe_output", stop)
        pf.unlearn(base, base, tuned, *data, out=model, overwrite=True, **{"rule": "fisher"} | settings)
    before = fingerprint(tmp_path)
    said = r"finish it with: perta resume .*, or give it up with: rm -r "
    for call in (
        lambda: pf.unlearn(model, base, tuned, *data, in_place=True, **{"rule": "fisher"} | settings),
        lambda: pf.unlearn(model, base, tuned, *data, in_place=True, rule="grad", stream=True, progress=False, lam=1.0),
        lambda: pf.apply(model, base, tuned, rule="tv", in_place=True, progress=False),
    ):
        with pytest.raises(pf.InputError, match=said) as refusal:
            call()
        assert fingerprint(tmp_path) == before
    give_up = str(refusal.value).rpartition("with: ")[2]
    if rule == "tv":
        run_child(["sh", "-c", give_up], check=True)
        assert not (tmp_path / ".model.perta-partial").exists()
    else:
        pf.resume(model, progress=False)
    pf.apply(model, base, tuned, rule="tv", in_place=True, progress=False)
