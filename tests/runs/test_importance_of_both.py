"""``apply`` with one directory for both importances: their ratio, or the two of them."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from perta_fast import ImportanceRatio, InputError, Interrupted, Report, apply, resume, verify
from perta_fast.importance import store
from perta_fast.importance.ratio import ratio_table
from perta_fast.reporting.weight_distribution import BINS, Distribution, distribution
from perta_fast.runs import recomputed_tensors
from perta_fast.runs.inspect import inspect
from perta_fast.subtraction import compute as subtraction
from perta_fast.subtraction import in_place, to_directory
from tests.support.checkpoints import fingerprint, read_checkpoint, same_bytes
from tests.support.children import perta, run_child
from tests.support.inputs import BF16, F32, FROZEN, Inputs, write_inputs


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors are cut into many chunks, segments and shards."""
    monkeypatch.setattr(subtraction, "CHUNK", 64)
    monkeypatch.setattr(in_place, "SEGMENT", 700)
    monkeypatch.setattr(recomputed_tensors, "_CHUNK", 100)
    monkeypatch.setattr(store, "SHARD_BYTES", 900)


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return write_inputs(tmp_path / "inputs", (BF16, BF16, BF16, F32, F32), shards=2)


@pytest.fixture
def ratio(inputs: Inputs) -> Path:
    ImportanceRatio.of(inputs["forget"], inputs["retain"]).save(inputs.folder / "ratio")
    return inputs.folder / "ratio"


def by_ratio(p: float, alpha: float, threshold: float | None = None) -> Any:
    """w from the ratio in bfloat16, of the two importances."""

    def weigh(forget: Tensor, retain: Tensor) -> Tensor:
        ratio = (retain.double() / forget.double()).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).bfloat16().float()
        power = ratio if p == 1 else ratio * ratio
        w = 1 / (1 + alpha * power)
        return w if threshold is None else (w > threshold).float()

    return weigh


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("model*.safetensors")}


@pytest.mark.parametrize(
    ("rule", "p", "settings"),
    [("grad", 1, {}), ("fisher", 2, {}), ("fisher", 2, {"alpha": 16.0}), ("grad", 1, {"alpha": 3.0, "threshold": 0.3})],
)
def test_equals_the_formula(rule: str, p: float, settings: dict[str, Any], inputs: Inputs, ratio: Path) -> None:
    """One ratio serves the rules grad and fisher."""
    out = inputs.folder / "out"
    apply(*inputs.checkpoints, importance=ratio, rule=rule, lam=0.7, out=out, progress=False, **settings)
    weigh = by_ratio(p, settings.get("alpha", 1.0), settings.get("threshold"))
    found, expected = read_checkpoint(out), inputs.expected(weigh, 0.7)
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not same_bytes(found[name], tensor)]


def test_the_report_names_the_ratio_and_both_importances(inputs: Inputs, ratio: Path) -> None:
    apply(*inputs.checkpoints, importance=ratio, rule="grad", lam=0.7, out=inputs.folder / "out", progress=False)
    report = Report.load(inputs.folder / "out")
    assert report.inputs["ratio"]["path"] == str(ratio)
    assert {name for name in report.inputs["ratio"]["files"] if name.startswith("ratio")} == {
        path.name for path in ratio.iterdir()
    }
    assert "forget_importance" not in report.inputs
    pair = inputs.folder / "by-pair"
    apply(*inputs.all, rule="grad", lam=0.7, out=pair, progress=False)
    assert report.importance == Report.load(pair).importance
    for row, other in zip(report.tensors, Report.load(pair).tensors, strict=True):
        assert (row.name, row.action) == (other.name, other.action)
        assert (row.mean_weight or 0) == pytest.approx(other.mean_weight or 0, abs=2**-9)
    (frozen,) = (row for row in report.tensors if row.name == FROZEN)
    assert frozen.action == "copied: not covered by the importance"


def test_verify_recomputes_from_the_ratio(inputs: Inputs, ratio: Path) -> None:
    out = inputs.folder / "out"
    report = apply(*inputs.checkpoints, importance=ratio, rule="fisher", lam=0.7, out=out, progress=False)
    result = verify(out, full=True, progress=False)
    assert not result.problems and not result.unchecked
    assert result.recomputed == len(report.tensors)
    for path in ratio.iterdir():  # changed: no longer what the run has read
        if path.suffix == ".safetensors":
            save_file({name: tensor.clone() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    changed = verify(out, full=True, progress=False)
    assert [problem for problem in changed.problems if "ratio" in problem and "has changed since" in problem]


def test_the_page_shows_the_weights_of_the_ratio(inputs: Inputs, ratio: Path) -> None:
    how: dict[str, Any] = {"rule": "grad", "alpha": 3.0, "lam": 0.7, "progress": False}
    report = apply(*inputs.checkpoints, importance=ratio, **how, out=inputs.folder / "out")
    found = distribution(report, False)
    assert isinstance(found, Distribution)
    names = [row.name for row in report.tensors if row.mean_weight is not None]
    pairs = [(inputs.tensors["forget"][name], inputs.tensors["retain"][name]) for name in names]
    w = torch.cat([by_ratio(1, 3.0)(*pair).view(-1) for pair in pairs])
    assert found.total == len(w)
    assert found.above_half == int((w > 0.5).sum())
    assert found.counts.tolist() == torch.histc(w, BINS, 0, 1).int().tolist()


def test_in_place_gives_the_same_bytes(inputs: Inputs, ratio: Path) -> None:
    how: dict[str, Any] = {"importance": ratio, "rule": "fisher", "lam": 0.7, "progress": False}
    apply(*inputs.checkpoints, **how, out=inputs.folder / "out")
    before = fingerprint(ratio)
    apply(*inputs.checkpoints, **how, in_place=True)
    assert weights_of(inputs["model"]) == weights_of(inputs.folder / "out")
    assert fingerprint(ratio) == before


@pytest.mark.parametrize("kind", ["out", "in place"])
def test_a_run_that_was_stopped_is_resumed(
    kind: str, inputs: Inputs, ratio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"importance": ratio, "rule": "fisher", "lam": 0.7, "progress": False}
    apply(*inputs.checkpoints, **how, out=inputs.folder / "whole")
    place: dict[str, Any] = {"in_place": True} if kind == "in place" else {"out": inputs.folder / "out"}
    result = inputs["model"] if kind == "in place" else inputs.folder / "out"

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(in_place if kind == "in place" else to_directory, "describe_output", interrupt)
        with pytest.raises(Interrupted, match="perta resume"):
            apply(*inputs.checkpoints, **how, **place)
    (part,) = list(ratio.glob("*00001-of*.safetensors"))
    content, then = part.read_bytes(), part.stat().st_mtime_ns
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="has changed since the run began"):
        resume(result, progress=False)
    part.write_bytes(content)
    os.utime(part, ns=(then, then))
    report = resume(result, progress=False)
    assert isinstance(report, Report) and report.resumed == 1
    assert weights_of(result) == weights_of(inputs.folder / "whole")


def test_a_directory_with_both(inputs: Inputs) -> None:
    """As --save-importance writes them: forget and retain, beside other things."""
    how: dict[str, Any] = {"rule": "fisher", "lam": 0.7, "progress": False}
    apply(*inputs.all, **how, out=inputs.folder / "out")
    apply(*inputs.checkpoints, importance=inputs.folder, **how, out=inputs.folder / "other")
    assert weights_of(inputs.folder / "out") == weights_of(inputs.folder / "other")


WITHOUT_TORCH = """
import os
import sys
from pathlib import Path
from perta_fast.runs.apply import apply
model, base, tuned, ratio, out = map(Path, sys.argv[1:])
apply(model, base, tuned, importance=ratio, rule="fisher", lam=0.7, out=out, progress=False)
assert "torch" not in sys.modules
"""


def test_torch_is_not_imported(inputs: Inputs, ratio: Path) -> None:
    out = inputs.folder / "out"
    done = run_child([sys.executable, "-c", WITHOUT_TORCH, *inputs.checkpoints, ratio, out])
    assert done.returncode == 0, done.stderr
    assert not verify(out, progress=False).problems


def test_the_command(inputs: Inputs, ratio: Path) -> None:
    out, other = inputs.folder / "out", inputs.folder / "other"
    apply(*inputs.checkpoints, importance=ratio, rule="fisher", lam=0.7, out=other, progress=False)
    three = [word for name in ("model", "base", "tuned") for word in (f"--{name}", inputs[name])]
    done = perta("apply", *three, "--importance", ratio, "--rule", "fisher", "--lam", "0.7", "--out", out)
    assert done.returncode == 0, done.stderr
    assert weights_of(out) == weights_of(other)


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("-inf")])
def test_what_is_no_ratio_is_refused(value: float, inputs: Inputs, ratio: Path) -> None:
    (path,) = (path for path in ratio.glob("*.safetensors") if "model.layers.0.up" in load_file(path))
    tensors = load_file(path)
    tensors["model.layers.0.up"].view(-1)[700] = value
    metadata = ImportanceRatio.load(ratio).metadata
    save_file(tensors, path, ratio_table({side: store.as_strings(each) for side, each in metadata.items()}))
    with pytest.raises(InputError, match=r"ratio-.*: tensor model\.layers\.0\.up has a ratio that is NaN or less"):
        apply(*inputs.checkpoints, importance=ratio, out=inputs.folder / "out", progress=False)
    assert not (inputs.folder / "out").exists()


def test_what_is_given_must_fit(inputs: Inputs, ratio: Path) -> None:
    out = inputs.folder / "out"

    def refused(message: str, *pair: Path, **settings: Any) -> None:
        with pytest.raises(InputError, match=message):
            apply(*inputs.checkpoints, *pair, out=out, progress=False, **settings)
        assert not out.exists()

    refused("importance takes the place of", inputs["forget"], inputs["retain"], importance=ratio)
    refused("importance takes the place of", inputs["forget"], importance=ratio)
    refused("rule tv takes no importance", importance=ratio, rule="tv")
    refused("holds estimator grad, rule empirical-fisher needs", importance=ratio, rule="empirical-fisher")
    refused("holds the ratio of two importances, not one", ratio, inputs["retain"])
    refused("holds neither a ratio nor the importances", importance=inputs["model"])
    made = ImportanceRatio.of(inputs["forget"], inputs["retain"])
    refused("in memory only; save it first", importance=made)


def test_inspect_says_where_both_come_from(inputs: Inputs, ratio: Path) -> None:
    text = inspect(ratio).text()
    assert f"{ratio}: ratio of importances" in text
    assert "BF16" in text
    assert "forget sample_count: " in text and "retain evaluated_at: " in text
    with pytest.raises(InputError, match="an importance is not tuned from a base"):
        inspect(ratio, base=inputs["base"]).text()


def test_the_command_that_makes_one(inputs: Inputs, ratio: Path) -> None:
    made, pair = inputs.folder / "made", ("--forget-importance", inputs["forget"], "--retain-importance")
    done = perta("ratio", *pair, inputs["retain"], "--out", made)
    assert (done.returncode, done.stdout) == (0, f"ratio of 7 tensors, grad\nwritten to {made}\n"), done.stderr
    assert load_file(made / "ratio.safetensors").keys() == read_checkpoint(ratio).keys()
    for name, tensor in read_checkpoint(made).items():
        assert same_bytes(tensor, read_checkpoint(ratio)[name])
    for source in (inputs["forget"], inputs.folder):
        lost = perta("ratio", *pair, inputs["retain"], "--out", source, "--overwrite")
        assert lost.returncode == 2 and "is or contains the input" in lost.stderr
    again = perta("ratio", *pair, inputs["retain"], "--out", made)
    assert again.returncode == 2 and str(made) in again.stderr
    wide = perta("ratio", *pair, inputs["retain"], "--importance-dtype", "float32", "--out", made, "--overwrite")
    assert wide.returncode == 0
    assert {tensor.dtype for tensor in read_checkpoint(made).values()} == {F32}
