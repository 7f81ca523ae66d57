"""``perta merge``: an adapter and its base as one checkpoint, held to peft's own merge."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import perta_fast as pf
from perta_fast import cli
from perta_fast.reporting import figures
from tests.families.configs import FAMILIES
from tests.families.matrix import build, write
from tests.support.checkpoints import fingerprint, read_checkpoint
from tests.support.models import Job, write_job

pytestmark = pytest.mark.usefixtures("one_thread")

F32, BF16 = torch.float32, torch.bfloat16
KINDS = {
    "LoRA": peft.LoraConfig(r=3, target_modules="all-linear"),
    "modules_to_save": peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["down_proj"]),
    "DoRA": peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"], use_dora=True),
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.fixture(scope="module", params=[F32, BF16], ids=["float32", "bfloat16"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return write_job(tmp_path_factory.mktemp("job"), request.param)


def adapt(base: Path, settings: peft.PeftConfig, out: Path) -> dict[str, torch.Tensor]:
    """Write an adapter whose tensors are drawn; returns the parameters of peft's merge in float32."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=F32), settings)
    for name, tensor in adapted.named_parameters():
        if tensor.requires_grad:
            tensor.data += 0.02 * torch.randn_like(tensor) * (1 if "lora" in name or "ia3" in name else 0.1)
    adapted.save_pretrained(out)
    return {name: tensor.detach() for name, tensor in adapted.merge_and_unload().named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_peft_merges(kind: str, job: Job, tmp_path: Path) -> None:
    expected = adapt(job.base, KINDS[kind], tmp_path / "adapter")
    before = fingerprint(job.base, tmp_path / "adapter")
    report = pf.merge(job.base, tmp_path / "adapter", tmp_path / "out", progress=False)
    assert fingerprint(job.base, tmp_path / "adapter") == before
    found, base = read_checkpoint(tmp_path / "out"), read_checkpoint(job.base)
    assert list(found) == list(base)
    changed = 0
    for name, tensor in found.items():
        assert tensor.dtype == base[name].dtype
        size = expected[name].abs() + base[name].abs().float()
        if tensor.dtype == F32:  # the sums over the rank are taken in another order
            assert float((tensor - expected[name]).abs().max()) <= 2.0**-22 * float(size.max())
        else:  # rounded once: never further from the exact value than half a step of bfloat16
            assert bool(((tensor.float() - expected[name]).abs() <= 2.0**-8 * 1.001 * size).all())
        changed += not torch.equal(tensor, base[name])
    assert changed == report.counts["subtracted"] > 0
    assert report.merged and report.warnings == []
    assert pf.verify(tmp_path / "out", full=True, progress=False).problems == []


def test_the_output_is_whole(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layout and companions of the base, loaded by transformers, with a card and a summary that say what it is."""
    adapt(job.base, KINDS["LoRA"], tmp_path / "adapter")
    out = tmp_path / "out"
    asked = ["merge", "--base", job.base, "--tuned", tmp_path / "adapter", "--out", out]
    assert cli.main(list(map(str, asked))) == 0
    said = capsys.readouterr().out
    assert said.startswith("the base with its adapter\ntensors: ") and " merged" in said and "lambda" not in said
    assert said.endswith(f"written to {out}\n")
    for path in job.base.glob("*.safetensors"):
        with safe_open(path, "pt") as first, safe_open(out / path.name, "pt") as second:
            assert list(first.keys()) == list(second.keys())
    assert {path.name for path in job.base.iterdir()} <= {path.name for path in out.iterdir()}
    loaded = AutoModelForCausalLM.from_pretrained(out)
    ids = AutoTokenizer.from_pretrained(out)("Question", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(job.base, dtype=F32)
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    close = 1e-4 if loaded.dtype == F32 else 0.1
    torch.testing.assert_close(loaded(ids).logits.float(), tuned(ids).logits, rtol=close, atol=close)
    card = (out / "README.md").read_text()
    assert "## Merged with perta_fast" in card and "Unlearned" not in card
    assert pf.Report.load(out).merged
    capsys.readouterr()
    assert cli.main(["verify", str(out)]) == 0
    assert "holds what the base with its adapter gives" in capsys.readouterr().out


def test_what_is_said_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page, ``perta inspect`` and a notebook call it a merge: nothing was to be forgotten, and nobody gave λ."""
    job = write_job(tmp_path, F32)
    adapt(job.base, KINDS["LoRA"], tmp_path / "adapter")
    out = tmp_path / "out"
    report = pf.merge(job.base, tmp_path / "adapter", out, progress=False)
    monkeypatch.setattr(figures, "_png", lambda figure: b"")
    assert cli.main(["report", str(out), "--no-verify", "--out", str(tmp_path / "page.html"), "--quiet"]) == 0
    page = (tmp_path / "page.html").read_text().replace("<wbr>", "")
    assert f"<title>Report of a merge: {job.base.name}</title>" in page
    assert "An adapter was merged into its base on 20" in page and "Nothing was to be forgotten." in page
    assert f"It changed {report.counts['subtracted']} of {len(report.tensors)} tensors." in page
    assert str(tmp_path / "adapter") in page and "--prompts questions.jsonl" in page and ">merged<" in page
    assert "copied: task vector is zero" in report.counts  # the stored words, as of every run
    assert "<td>copied: the adapter does not change it</td>" in page
    assert f"{len(report.tensors) - report.counts['subtracted']} copied: the adapter does not" in report.summary()
    for words in ("To be forgotten", "To be kept", "Not measured", "λ", "rule", "subtracted", "task vector"):
        assert words not in page, words
    capsys.readouterr()
    assert cli.main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert "\nmerged with perta_fast:\n" in said and "unlearned" not in said and "lambda" not in said
    assert repr(report).startswith("<Report: the base with its adapter, ")


def test_it_is_the_tuned_model_that_apply_takes(tmp_path: Path) -> None:
    """Of a float32 base; what is left of the difference is one rounding."""
    job = write_job(tmp_path, F32)
    adapt(job.base, KINDS["LoRA"], tmp_path / "adapter")
    pf.merge(job.base, tmp_path / "adapter", tmp_path / "merged", progress=False)
    results = []
    for tuned in ("adapter", "merged"):
        out = tmp_path / f"by {tuned}"
        pf.apply(job.model, job.base, tmp_path / tuned, rule="tv", lam=1.0, out=out, progress=False)
        results.append(read_checkpoint(out))
    merged = read_checkpoint(tmp_path / "merged")
    for name, tensor in results[0].items():
        limit = 2.0**-22 * float(tensor.abs().max() + merged[name].abs().max())
        torch.testing.assert_close(tensor, results[1][name], rtol=0, atol=limit)


def test_a_tied_matrix_is_changed_once(tmp_path: Path) -> None:
    base = write(build(next(row for row in FAMILIES if row.name == "Llama tied"), 1), tmp_path / "base")
    expected = adapt(base, KINDS["LoRA"], tmp_path / "adapter")
    pf.merge(base, tmp_path / "adapter", tmp_path / "out", progress=False)
    found = read_checkpoint(tmp_path / "out")
    assert found.keys() == read_checkpoint(base).keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name], rtol=1e-2, atol=1e-2)


def test_what_is_refused(tmp_path: Path) -> None:
    job = write_job(tmp_path, F32)
    with pytest.raises(pf.InputError, match="tuned: is no adapter, so there is nothing to merge"):
        pf.merge(job.base, job.tuned, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=F32)
    peft.get_peft_model(model, KINDS["LoRA"]).save_pretrained(tmp_path / "untrained")  # B is zero
    with pytest.raises(pf.InputError, match="pass allow_zero"):
        pf.merge(job.base, tmp_path / "untrained", tmp_path / "out")
    with pytest.raises(pf.InputError, match="is or contains the input"):
        pf.merge(job.base, tmp_path / "untrained", job.base, overwrite=True, allow_zero=True)
    assert not (tmp_path / "out").exists()
    report = pf.merge(job.base, tmp_path / "untrained", tmp_path / "out", allow_zero=True, progress=False)
    assert report.warnings == ["no value of the model has changed: the adapter changes none"]
    for name, tensor in read_checkpoint(tmp_path / "out").items():
        assert torch.equal(tensor, read_checkpoint(job.base)[name])


def test_a_stopped_merge_goes_on(tmp_path: Path) -> None:
    job = write_job(tmp_path, F32)
    adapt(job.base, KINDS["LoRA"], tmp_path / "adapter")
    pf.merge(job.base, tmp_path / "adapter", tmp_path / "whole", progress=False)

    def stop(event: pf.Event) -> None:
        if event.phase == "hash output" and event.done == event.total:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pf.merge(job.base, tmp_path / "adapter", tmp_path / "out", progress=stop)
    report = pf.resume(tmp_path / "out", progress=False)
    assert isinstance(report, pf.Report) and report.merged and report.resumed == 1
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert json.loads((tmp_path / "out/perta_report.json").read_text())["merged"] is True


def test_what_it_refuses_names_no_option_of_other_commands(tmp_path: Path) -> None:
    job = write_job(tmp_path, F32, max_shard_size="1GB")
    adapt(job.base, KINDS["LoRA"], tmp_path / "adapter")
    shard = job.base / "model.safetensors"
    tensors = load_file(shard)
    name = "model.layers.0.mlp.up_proj.weight"
    for value, said in ((torch.inf, r"look at this tensor in base and tuned\. Nothing"), (1j, "complex numbers here$")):
        save_file(tensors | {name: tensors[name] + value}, shard, {"format": "pt"})
        with pytest.raises(pf.PertaError, match=said):
            pf.merge(job.base, tmp_path / "adapter", tmp_path / "out", progress=False)
