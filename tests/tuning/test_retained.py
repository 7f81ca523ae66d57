"""The divergence on retained rows, held to a plain computation."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import perta_fast as pf
from perta_fast.data.batches import Batch
from perta_fast.data.rows import load_rows
from perta_fast.data.samples import IGNORED, encode
from perta_fast.models.losses import token_logits
from perta_fast.tuning.retained import Retained, divergence
from tests.support.checkpoints import read_checkpoint
from tests.support.models import RETAIN, Job, draw_samples, llama, nudge_, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(base: Any, tuned: Any, samples: Any) -> float:
    """Token by token, in float64."""
    found = []
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        p, q = (model(ids).logits[0].double().softmax(-1) for model in (base, tuned))
        found += [
            float((p[k] * (p[k] / q[k]).log()).sum())
            for k in range(len(sample.labels) - 1)
            if sample.labels[k + 1] != IGNORED
        ]
    return sum(found) / len(found)


@torch.no_grad()
def test_the_divergence(tmp_path: Path) -> None:
    base, tuned, samples = llama().eval(), llama().eval(), draw_samples(5)
    nudge_(tuned, 1, 0.1)
    expected = by_hand(base, tuned, samples)
    assert float(divergence(tuned, base, Batch.of(samples))) == pytest.approx(expected, rel=1e-4)
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "up_proj"]))
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)), alpha=1.0)
    expected = by_hand(base, adapted.eval(), samples)
    assert expected > 1e-3
    assert float(divergence(adapted, None, Batch.of(samples))) == pytest.approx(expected, rel=1e-4)
    assert adapted.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters is False


@torch.no_grad()
def test_a_frozen_copy_computes_as_the_model_does() -> None:
    """Accelerate wraps a model on a GPU so that it computes in bfloat16: as it was, it is no distance from its copy."""
    module, copy = llama(), llama().eval()
    for model in (module, copy):
        nudge_(model, 1, 0.3)
    batch = Batch.of(draw_samples(3))
    assert float(divergence(module, copy, batch)) == 0
    module.forward = torch.autocast("cpu", torch.bfloat16)(module.forward)
    assert float(divergence(module, copy, batch, mixed=True)) == 0
    assert float(divergence(module, copy, batch)) > 1e-5


def test_which_rows_are_taken() -> None:
    """Each row once in a pass over them, in an order that the seed alone decides."""
    samples = draw_samples(5)

    def drawn(seed: int) -> list[int]:
        held = Retained(llama(), samples, 1.0, 2, seed)
        return [samples.index(held._row(k)) for k in range(10)]

    assert sorted(drawn(0)[:5]) == sorted(drawn(0)[5:]) == [0, 1, 2, 3, 4]
    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize("full", [False, True])
def test_it_holds_the_model(full: bool, job: Job, tmp_path: Path) -> None:
    """With it, the tuned model is nearer to the base on retained rows; at the start the divergence is nothing."""
    how: dict[str, Any] = {"epochs": 4, "lr": 1e-3 if full else 1e-2, "full": full, "progress": False}
    free = pf.tune(job.base, job.forget, tmp_path / "free", retain=job.retain, retain_kl=1e-9, **how)
    held = pf.tune(job.base, job.forget, tmp_path / "held", retain=job.retain, retain_kl=20.0, **how)
    assert held.retain is not None and held.retain["path"] == str(job.retain)
    assert held.settings["retain_kl"] == 20.0
    assert 0 < held.epoch_divergences[-1] < 0.5 * free.epoch_divergences[-1]
    assert "divergence from the base on retained rows: " in held.summary()
    assert held.loss_after < held.loss_before


def test_a_tuning_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    """Two backward passes a step, each with all retained rows: AdamW on the data's loss and the weighted divergence."""
    job, weight, epochs, lr = write_job(tmp_path / "job", torch.float32), 5.0, 4, 1e-3
    retain = write_lines(tmp_path / "retain.jsonl", RETAIN[:4])
    how: dict[str, Any] = {"full": True, "epochs": epochs, "lr": lr, "batch_size": 8, "progress": False}
    record = pf.tune(job.base, job.forget, tmp_path / "out", retain=retain, retain_kl=weight, **how)
    model, base = (AutoModelForCausalLM.from_pretrained(job.base) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    forgotten, retained = (Batch.of(encode(load_rows(path), tokenizer, 4096)) for path in (job.forget, retain))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses, divergences = [], []
    for step in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * (step if step < 1 else (epochs - step) / (epochs - 1))
        logits, targets, _ = token_logits(model, forgotten)
        with torch.no_grad():
            p = token_logits(base, retained)[0].softmax(-1)
        apart = (p * (p.log() - token_logits(model, retained)[0].log_softmax(-1))).sum(-1).mean()
        loss = functional.cross_entropy(logits, targets) + weight * apart
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
        divergences.append(float(apart))
    assert record.epoch_losses == pytest.approx(losses, rel=1e-4)
    assert record.epoch_divergences == pytest.approx(divergences, rel=1e-2, abs=1e-6)
    assert divergences[-1] > 1e-4
    found, start = read_checkpoint(tmp_path / "out"), read_checkpoint(job.base)
    for name, tensor in model.named_parameters():
        change = tensor.detach() - start[name]
        # Adam takes rows of the embedding that only retained rows have by the sign of a gradient near 0.
        assert float((found[name] - tensor).norm()) < 5e-2 * float(change.norm())


def test_one_needs_the_other(job: Job, tmp_path: Path) -> None:
    for wrong in ({"retain": job.retain}, {"retain_kl": 1.0}):
        with pytest.raises(pf.InputError, match=r"retain_kl, a weight, and retain, .* need each other"):
            pf.tune(job.base, job.forget, tmp_path / "out", **wrong)
    with pytest.raises(pf.InputError, match=r"retain_kl is -1\.0; it must be a number above 0"):
        pf.tune(job.base, job.forget, tmp_path / "out", retain=job.retain, retain_kl=-1.0)
    assert list(tmp_path.iterdir()) == []
