"""``perta tune``: training held to a plain loop of torch, its outputs to peft and transformers."""

import json
import math
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import perta_fast as pf
from perta_fast import cli, progress_lines
from perta_fast.checkpoints.adapters import Adapter
from perta_fast.progress import Event
from perta_fast.tuning.adapter import save_adapter
from perta_fast.tuning.checkpoint import write_tuned
from perta_fast.tuning.saving import disk_errors
from tests.families.configs import FAMILIES
from tests.families.matrix import build, write
from tests.families.test_multimodal import build as build_multimodal
from tests.families.test_multimodal import of_vision
from tests.support.checkpoints import fingerprint, read_checkpoint
from tests.support.children import perta
from tests.support.models import FORGET, Job, llama, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def tune(base: Path, forget: Path, out: Path, **settings: Any) -> pf.Tuning:
    return pf.tune(base, forget, out, **{"progress": False, "epochs": 3, "lr": 1e-3, "batch_size": 16} | settings)


@pytest.fixture(scope="module")
def float_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return write_job(tmp_path_factory.mktemp("float"), F32)


@pytest.fixture(scope="module")
def forget(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "forget.jsonl", FORGET)


def encoded(folder: Path) -> list[tuple[list[int], int]]:
    """Each forget sample's tokens by transformers alone, and how many of them the question takes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for row in FORGET:
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        ids = tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}")["input_ids"]
        assert ids[: len(prompt)] == prompt
        rows.append(([*ids, tokenizer.eos_token_id], len(prompt)))
    return rows


def token_losses(model: Any, ids: list[int], prompt: int) -> Tensor:
    logits = model(input_ids=torch.tensor([ids])).logits[0, prompt - 1 : -1].float()
    return functional.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="none")


@torch.no_grad()
def mean_loss(model: Any, folder: Path) -> float:
    means = [token_losses(model, *row).mean() for row in encoded(folder)]
    return float(torch.stack(means).mean())


def trained_by_hand(folder: Path, epochs: int, lr: float) -> tuple[dict[str, Tensor], list[float]]:
    """All samples in every step: AdamW on the mean over all tokens, norm clipped, warmed up for one step."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=F32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for step in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * (step if step < 1 else (epochs - step) / (epochs - 1))
        loss = torch.cat([token_losses(model, *row) for row in encoded(folder)]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return {name: each.detach() for name, each in model.named_parameters()}, losses


def test_a_full_tuning_is_that_of_a_plain_loop(float_job: Job, tmp_path: Path) -> None:
    before = fingerprint(float_job.base)
    record = tune(float_job.base, float_job.forget, tmp_path / "out", full=True, epochs=4)
    assert fingerprint(float_job.base) == before
    expected, losses = trained_by_hand(float_job.base, 4, 1e-3)
    found, base = read_checkpoint(tmp_path / "out"), read_checkpoint(float_job.base)
    assert found.keys() == base.keys() == expected.keys()
    for name, tensor in found.items():
        step = expected[name] - base[name]
        assert float(step.norm()) > 0
        assert float((tensor - expected[name]).norm()) < 1e-4 * float(step.norm())
    assert record.epoch_losses == pytest.approx(losses, rel=1e-5)
    assert record.loss_before > record.epoch_losses[-1] > record.loss_after


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_an_adapter_is_one_that_peft_loads(dtype: torch.dtype, tmp_path: Path) -> None:
    job = write_job(tmp_path, dtype)
    record = tune(job.base, job.forget, tmp_path / "out", rank=3, lr=3e-2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "perta_tune.json",
    ]
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (3, 6)
    assert settings["base_model_name_or_path"] == str(job.base)
    assert settings["target_modules"] == sorted(settings["target_modules"])  # the same in every process
    names = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters")
    assert [settings[name] for name in names if settings[name]] == []
    with safe_open(tmp_path / "out/adapter_model.safetensors", "pt") as stored:
        adapter = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    assert len(adapter) == 2 * 2 * 7  # A and B, layers, linear maps
    assert {tensor.dtype for tensor in adapter.values()} == {F32}
    assert all(bool(tensor.any()) for tensor in adapter.values())
    assert record.tuned_parameters == sum(tensor.numel() for tensor in adapter.values())
    base = AutoModelForCausalLM.from_pretrained(job.base, dtype=F32)
    close = {"rel": 1e-6 if dtype != BF16 else 1e-3}  # which it is trained and scored in
    assert record.loss_before == pytest.approx(mean_loss(base, job.base), **close)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    assert record.loss_after == pytest.approx(mean_loss(adapted, job.base), **close)
    assert record.loss_after < 0.99 * record.loss_before


def test_a_tuned_checkpoint_is_loaded_in_the_type_that_it_has(tmp_path: Path) -> None:
    """Its base names another type, above and in a part of the config."""
    job = write_job(tmp_path, BF16)
    config = json.loads((job.base / "config.json").read_text())
    assert {key: config.get(key) for key in ("dtype", "torch_dtype") if key in config} == {"dtype": "bfloat16"}
    config |= {"other_config": {"dtype": "bfloat16", "hidden_size": 3}}
    (job.base / "config.json").write_text(json.dumps(config))
    tune(job.base, job.forget, tmp_path / "out", full=True, epochs=1, lr=1e-5)
    named = json.loads((tmp_path / "out" / "config.json").read_text())
    assert named == config | {"dtype": "float32", "other_config": {"dtype": "float32", "hidden_size": 3}}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in read_checkpoint(tmp_path / "out").items())


def of_family(name: str) -> Callable[[], PreTrainedModel]:
    return lambda: build(next(each for each in FAMILIES if each.name == name), 1)


CHECKPOINTS: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: of_family(name) for name in ("Llama tied", "GPT-2", "Qwen3-MoE")},
    "LLaVA": lambda: build_multimodal("LLaVA", 1),
}


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_a_full_tuning_has_the_layout_of_its_base(family: str, forget: Path, tmp_path: Path) -> None:
    base = write(CHECKPOINTS[family]().bfloat16(), tmp_path / "base")
    record = tune(base, forget, tmp_path / "out", full=True)
    layouts = []
    for folder in (base, tmp_path / "out"):
        shards = {path.name: sorted(safe_open(path, "pt").keys()) for path in folder.glob("*.safetensors")}
        layouts.append((shards, sorted(path.name for path in folder.iterdir() if path.name != "perta_tune.json")))
    assert layouts[0] == layouts[1]
    for name, tensor in read_checkpoint(tmp_path / "out").items():
        if of_vision(name):
            assert torch.equal(tensor, read_checkpoint(base)[name])
        else:
            assert tensor.dtype == F32
    kind = transformers.AutoModelForImageTextToText if family == "LLaVA" else AutoModelForCausalLM
    loaded = kind.from_pretrained(tmp_path / "out", dtype=F32)
    assert record.loss_after == pytest.approx(mean_loss(loaded, base), rel=1e-5)
    assert record.loss_after < 0.99 * record.loss_before
    pf.apply(base, base, tmp_path / "out", rule="tv", lam=1.0, out=tmp_path / "unlearned", progress=False)


def test_a_tied_head_that_is_stored_stays_tied(forget: Path, tmp_path: Path) -> None:
    model = llama()
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    base = write(model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tune(base, forget, tmp_path / "out", full=True)
    found = read_checkpoint(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"], read_checkpoint(base)["lm_head.weight"])


def test_one_seed_is_one_result(float_job: Job, tmp_path: Path) -> None:
    """Whatever was drawn before, and whether activations are kept or computed again."""

    def weights(**changes: Any) -> list[bytes]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        torch.manual_seed(int(out.name))
        tune(float_job.base, float_job.forget, out, batch_size=2, epochs=1, **changes)
        return [path.read_bytes() for path in sorted(out.glob("*.safetensors"))]

    assert weights() == weights(gradient_checkpointing=True)
    assert weights(full=True) == weights(full=True) != weights(full=True, seed=1)  # another order of samples
    assert weights() != weights(seed=1)


def test_the_adapter_of_a_mixture_of_experts_is_a_plain_one_of_its_attention(forget: Path, tmp_path: Path) -> None:
    base = write(of_family("DeepSeek-V3, yarn")(), tmp_path / "base")
    record = tune(base, forget, tmp_path / "out")
    names = safe_open(tmp_path / "out/adapter_model.safetensors", "pt").keys()
    assert names
    assert all(".self_attn." in name for name in names)
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert not settings["target_parameters"]
    assert settings["rank_pattern"] == {}
    sizes = {name: tensor.numel() for name, tensor in read_checkpoint(base).items()}
    aside = (".self_attn.", "embed_tokens", "lm_head", "norm", "bias")
    rest = sum(size for name, size in sizes.items() if not any(part in name for part in aside))
    share = rest / sum(sizes.values())
    said = f"leaves out {share:.0%} of the parameters, such as joined experts; a full tuning includes them"
    assert any(said in warning for warning in record.warnings)


def test_the_command_says_what_it_has_done(float_job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    asked = ["tune", "--base", float_job.base, "--forget", float_job.forget, "--max-length", 40, "--out", out]
    asked += ["--epochs", 10, "--lr", 1e-5, "--batch-size", 16]
    assert cli.main(list(map(str, asked))) == 0
    text = capsys.readouterr().out
    record = json.loads((out / "perta_tune.json").read_text())
    assert f"{record['loss_before']:.4f} before, {record['loss_after']:.4f} after" in text
    assert "warning: 5 samples were cut to the length limit\n" in text
    assert "warning: the loss has fallen by less than a tenth" in text
    assert text.endswith(f"written to {out}\n")
    chosen = {"full": False, "rank": 16, "epochs": 10, "lr": 1e-5, "batch_size": 16, "max_length": 40, "seed": 0}
    assert record["settings"].items() >= chosen.items()
    assert (record["data"]["samples"], record["data"]["truncated"]) == (5, 5)
    assert record["versions"].keys() >= {"torch", "transformers", "peft", "accelerate"}
    assert len(record["epoch_losses"]) == 10
    assert record["chosen"] == [] and "chosen" not in text
    asked += ["--full", "--epochs", "5", "--lr", "0.1", "--overwrite", "--quiet"]
    assert cli.main(list(map(str, asked))) == 0
    assert capsys.readouterr().out == ""
    record = json.loads((out / "perta_tune.json").read_text())
    assert record["settings"].items() >= {"full": True, "epochs": 5, "lr": 0.1}.items()
    assert not any("less than a tenth" in warning for warning in record["warnings"])
    assert (out / "model.safetensors.index.json").exists()


def refused(job: Job, out: Path, error: type[pf.PertaError], words: str, **settings: Any) -> None:
    """``tune`` raises ``error`` and leaves everything as it was."""
    arguments = {"base": job.base, "forget": job.forget, "out": out, "progress": False, "batch_size": 16} | settings
    before, present = fingerprint(job.base.parent, out.parent), sorted(out.parent.iterdir())
    with pytest.raises(error, match=words):
        pf.tune(**arguments)
    assert fingerprint(job.base.parent, out.parent) == before
    assert sorted(out.parent.iterdir()) == present


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 0}, "max_length is 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": -1.0}, "lr is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"epochs": 2.5}, "epochs is 2.5, not a whole number"),
        ({"max_length": True}, "max_length is True, not a whole number"),
        ({"lr": "1e-3"}, "lr is '1e-3', not a number"),
        ({"full": "no"}, "full is 'no', not true or false"),
        ({"epochs": 0, "base": "someone/model", "download": True}, "epochs is 0"),
        ({"device": "cuda"}, "finds no CUDA device"),
        ({"base": Path("nowhere")}, "nowhere: no such directory"),
        ({"forget": Path("nowhere.jsonl")}, "nowhere.jsonl: cannot be read"),
        ({"max_length": 1}, "forget.jsonl, line 1: has no token to compute a loss on"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], words: str, float_job: Job, tmp_path: Path) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    refused(float_job, tmp_path / "out", pf.InputError, words, **settings)


def test_bad_places(float_job: Job, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    refused(float_job, tmp_path / "out", pf.InputError, "holds no samples", forget=tmp_path / "empty.jsonl")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    refused(float_job, tmp_path / "full", pf.InputError, "exists and is not empty")
    refused(float_job, float_job.base, pf.InputError, "is or contains the input")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").touch()
    (tmp_path / "adapter/adapter_model.safetensors").touch()
    words = "adapter: holds a PEFT adapter"
    refused(float_job, tmp_path / "out", pf.InputError, words, base=tmp_path / "adapter")
    quantised = shutil.copytree(float_job.base, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (quantised / "config.json").write_text(json.dumps(config))
    refused(float_job, tmp_path / "out", pf.InputError, "quantised: is quantised", base=quantised)


def test_no_adapter_that_could_not_be_applied(float_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise pf.InputError("adapts x, which is not in base")

    monkeypatch.setattr(Adapter, "meet", lost)
    refused(float_job, tmp_path / "out", pf.InputError, "tune all of it with full")
    tune(float_job.base, float_job.forget, tmp_path / "out", full=True, epochs=1)


def test_missing_libraries_are_named(float_job: Job, tmp_path: Path) -> None:
    """In a process that has neither."""
    asked = ["tune", "--base", float_job.base, "--forget", float_job.forget, "--out", tmp_path / "out"]
    found = perta(*asked, setup="import sys; sys.modules['peft'] = sys.modules['accelerate'] = None")
    assert found.returncode == 2
    words = "perta: error: peft and accelerate are needed: pip install 'perta-fast[tune]'\n"
    assert found.stderr == words
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite(float_job: Job, tmp_path: Path) -> None:
    words = "the loss of epoch 3 is not finite; nothing was written. Use a lower lr"
    refused(float_job, tmp_path / "out", pf.RunError, words, lr=1e30, full=True)
    broken = llama()
    broken.model.norm.weight.data.fill_(math.nan)
    base = write(broken, tmp_path / "broken")
    refused(float_job, tmp_path / "out", pf.RunError, "before tuning is not finite", base=base)


def test_an_interrupt_leaves_nothing(float_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of the training."""
    before, handler = fingerprint(float_job.base.parent), signal.getsignal(signal.SIGINT)

    def stop(event: Event) -> None:
        if event.phase == "tuning" and event.done:
            os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            tune(float_job.base, float_job.forget, tmp_path / "out", progress=stop)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert list(tmp_path.iterdir()) == []
    assert fingerprint(float_job.base.parent) == before


def test_companions_elsewhere_are_named_and_left_out(float_job: Job, forget: Path, tmp_path: Path) -> None:
    base, private = shutil.copytree(float_job.base, tmp_path / "base"), tmp_path / "private.txt"
    private.write_text("private")
    (base / "notes.txt").symlink_to(private)
    tuning = tune(base, forget, tmp_path / "out", full=True, epochs=1)
    assert f"{base / 'notes.txt'} is a link to {private}, outside the model's directory" in tuning.warnings[0]
    assert tuning.warnings[0] in tuning.summary()
    assert not os.path.lexists(tmp_path / "out" / "notes.txt") and (tmp_path / "out" / "tokenizer.json").exists()
    adapter = tune(base, forget, tmp_path / "adapter", epochs=1)
    assert not any("notes.txt" in warning for warning in adapter.warnings)


@pytest.mark.parametrize("full", [False, True])
def test_a_full_disk_is_a_sentence(
    full: bool, float_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors has an error type of its own for it."""
    where = f"perta_fast.tuning.tuned_model.{'write_tuned' if full else 'save_adapter'}"
    save = write_tuned if full else save_adapter

    def saved_to_a_full_disk(*arguments: Any) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the system answers likewise, with another number
        try:
            save(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(where, saved_to_a_full_disk)
    asked = ["tune", "--base", float_job.base, "--forget", float_job.forget, "--epochs", 1, "--out", tmp_path / "out"]
    assert cli.main([*map(str, asked), *(["--full"] if full else [])]) == 1
    said = f"{tmp_path / 'out'}: could not be written: the file would exceed this process's file size limit (ulimit -f)"
    assert f"{said}. The inputs are untouched; nothing was left behind" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_libraries_stay_as_they_are() -> None:
    errors = SafetensorError("invalid header"), Exception("no model"), ValueError("(os error 28)"), RuntimeError("size")
    for error in errors:
        with pytest.raises(type(error)) as raised, disk_errors():
            raise error
        assert raised.value is error
    with pytest.raises(OSError, match="No space left"), disk_errors():
        raise Exception("No space left on device (os error 28)")  # as tokenizers does


def test_a_log_says_which_step_and_what_loss(
    float_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where output is no terminal."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(progress_lines, "_FIRST", 0.0)
    monkeypatch.setattr(progress_lines, "_NEXT", 0.0)
    record = tune(float_job.base, float_job.forget, tmp_path / "out", progress=True)
    lines = capfd.readouterr().err.splitlines()
    tuning = [line for line in lines if line.startswith("tuning: ")]
    assert re.fullmatch(r"tuning: 5 of 15 samples \(33%\), .* left; step 1 of 3, loss \d\.\d{4}", tuning[0])
    assert tuning[-1].endswith(f"step 3 of 3, loss {record.epoch_losses[-1]:.4f}")
    assert not any("\r" in line or "Loading weights" in line for line in lines)
    tune(float_job.base, float_job.forget, tmp_path / "silent", progress=False)
    assert capfd.readouterr().err == ""
