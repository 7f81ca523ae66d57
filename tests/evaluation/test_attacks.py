"""Membership scores from a reference model and from gradients, and the share of Min-K."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import PreTrainedModel

from perta_fast import Evaluation, cli, evaluate
from perta_fast.data.rows import rows_from
from perta_fast.data.samples import IGNORED, Sample, encode
from perta_fast.errors import InputError
from perta_fast.models.gradient_norms import gradient_norms
from tests.evaluation.test_suites import HOLDOUT, WORDS, losses
from tests.support.models import FORGET, llama, tokenizer, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {
        "forget": write_lines(tmp_path / "forget.jsonl", FORGET),
        "holdout": write_lines(tmp_path / "holdout.jsonl", HOLDOUT),
    }


def save(model: PreTrainedModel, path: Path) -> Path:
    model.save_pretrained(path)
    WORDS.save_pretrained(path)
    return path


def on(model: PreTrainedModel, files: dict[str, Path], *metrics: str, **changes: Any) -> Evaluation:
    return evaluate(model, **files, tokenizer=WORDS, progress=False, metrics=list(metrics), **changes)


def auc(forget: list[float], holdout: list[float]) -> float:
    return float(roc_auc_score([0] * len(forget) + [1] * len(holdout), forget + holdout))


def scores(result: Evaluation, name: str) -> dict[str, list[float]]:
    rows = result.metrics[name].samples
    return {role: [row["score"] for row in rows if row["set"] == role] for role in ("forget", "holdout")}


def test_the_reference_model_attack(files: dict[str, Path], tmp_path: Path) -> None:
    model, reference = llama(1).eval(), llama(2).eval()
    result = on(model, files, "mia_reference", reference_model=save(reference, tmp_path / "reference"))
    expected = {
        role: [own - other for own, other in zip(losses(model, rows), losses(reference, rows), strict=True)]
        for role, rows in (("forget", FORGET), ("holdout", HOLDOUT))
    }
    found = scores(result, "mia_reference")
    for role in expected:
        assert found[role] == pytest.approx(expected[role], rel=1e-4, abs=1e-5)
    assert result["mia_reference"] == pytest.approx(auc(expected["forget"], expected["holdout"]))
    assert result.settings["reference_model"] == str(tmp_path / "reference")
    own = on(model, files, "mia_reference", reference_model=save(model, tmp_path / "own"))
    assert own["mia_reference"] == 0.5
    assert all(abs(score) < 1e-6 for values in scores(own, "mia_reference").values() for score in values)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_the_reference_model_runs_in_the_type_that_was_asked_for(
    files: dict[str, Path], tmp_path: Path, stored: torch.dtype, stream: bool
) -> None:
    """Of one model in two files, the scores are exactly 0, in whatever type they are stored."""
    model = llama(1).to(torch.float16)
    own = save(model, tmp_path / "own")
    other = save(model.to(stored), tmp_path / "other")
    how: dict[str, Any] = {"metrics": ["mia_reference"], "stream": stream, "dtype": torch.bfloat16, "progress": False}
    found = scores(evaluate(own, **files, **how, reference_model=other), "mia_reference")
    assert found == {"forget": [0.0] * len(FORGET), "holdout": [0.0] * len(HOLDOUT)}


def norm_of(model: PreTrainedModel, sample: Sample) -> float:
    """The mean over parameters of the norm of the gradient, without the last label, by autograd."""
    labels = list(sample.labels)
    labels[max(k for k, label in enumerate(labels) if label != IGNORED)] = IGNORED
    loss = model(input_ids=torch.tensor([sample.input_ids]), labels=torch.tensor([labels])).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return float(np.mean([float(gradient.norm(p=2)) for gradient in gradients if gradient is not None]))


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_norm_attack(files: dict[str, Path], tied: bool) -> None:
    model = llama(1, tie_word_embeddings=tied).eval()
    expected = {
        role: [norm_of(model, sample) for sample in encode(rows_from(rows), WORDS, 128)]
        for role, rows in (("forget", FORGET), ("holdout", HOLDOUT))
    }
    result = on(model, files, "mia_gradnorm")
    found = scores(result, "mia_gradnorm")
    for role in expected:
        assert found[role] == pytest.approx(expected[role], rel=1e-4)
    assert result["mia_gradnorm"] == pytest.approx(auc(expected["forget"], expected["holdout"]))


def test_gradients_and_hooks_are_left_as_they_were(files: dict[str, Path]) -> None:
    model = llama(1).train()
    first = next(model.parameters())
    first.grad = torch.full_like(first, 3)
    before = copy.deepcopy(model.state_dict())
    on(model, files, "mia_gradnorm")
    assert (first.grad == 3).all()
    assert all(parameter.grad is None for parameter in list(model.parameters())[1:])
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_frozen_parameters_are_left_out(files: dict[str, Path]) -> None:
    model = llama(1).eval()
    model.model.embed_tokens.requires_grad_(False)
    (sample,) = encode(rows_from(FORGET[:1]), WORDS, 128)
    with_all = norm_of(llama(1).eval(), sample)
    (found,) = gradient_norms(model, [[sample]])
    assert found != pytest.approx(with_all)
    model.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter of the model takes a gradient; leave this metric out"):
        on(model, files, "mia_gradnorm")


def test_turns_of_one_row_have_one_gradient() -> None:
    """A row of several samples: the loss is the mean over all its labels but the last."""
    model = llama(1).eval()
    first, second = (
        Sample((5, 6, 7, 8), (IGNORED, IGNORED, 7, 8), share=0.5),
        Sample((9, 5, 6), (IGNORED, 5, 6), share=0.5),
    )
    (found,) = gradient_norms(model, [[first, second]])
    total = 2 * model(input_ids=torch.tensor([first.input_ids]), labels=torch.tensor([first.labels])).loss
    total += model(input_ids=torch.tensor([[9, 5]]), labels=torch.tensor([[IGNORED, 5]])).loss
    gradients = torch.autograd.grad(total / 3, list(model.parameters()))
    assert found == pytest.approx(float(np.mean([float(gradient.norm()) for gradient in gradients])), rel=1e-4)


def test_an_answer_that_is_only_its_end(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert math.isnan(gradient_norms(llama(1), [[Sample((5, 0), (IGNORED, 0))]])[0])


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_the_share_of_min_k(files: dict[str, Path], share: float) -> None:
    model = llama(1).eval()
    found = scores(on(model, files, "mia_min_k", min_k=share), "mia_min_k")
    for sample, score in zip(encode(rows_from(FORGET), WORDS, 128), found["forget"], strict=True):
        with torch.no_grad():
            every = model(input_ids=torch.tensor([sample.input_ids])).logits[0].log_softmax(-1)
        labelled = [k for k, label in enumerate(sample.labels) if label != IGNORED][:-1]
        values = sorted(float(every[k - 1, sample.input_ids[k]]) for k in labelled)
        kept = values[: max(1, int(len(values) * share))]
        assert score == pytest.approx(-sum(kept) / len(kept), rel=1e-4)


@pytest.mark.parametrize("share", [0, -0.4, 1.01, 40, math.nan])
def test_a_share_that_is_none(files: dict[str, Path], share: float) -> None:
    with pytest.raises(InputError, match=r"min_k is .*; it must be a share of the tokens, above 0 and at most 1"):
        on(llama(1), files, "mia_min_k", min_k=share)


def test_privleak_needs_the_share_of_the_gold_model(files: dict[str, Path], tmp_path: Path) -> None:
    gold = tmp_path / "gold.json"
    on(llama(2).eval(), files, "mia_min_k", min_k=0.2, out=gold)
    with pytest.raises(InputError, match=r"gold.json: has Min-K of 0.2 of the tokens; evaluate with min_k 0.2"):
        on(llama(1), files, "privleak", reference=gold)
    assert "privleak" in on(llama(1), files, "privleak", reference=gold, min_k=0.2).metrics
    content = json.loads(gold.read_text())
    gold.write_text(json.dumps(content["metrics"]))  # as open-unlearning writes it: nothing is known of the share
    assert "privleak" in on(llama(1), files, "privleak", reference=gold).metrics


def test_what_the_attacks_need(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mia_reference needs --reference-model"):
        on(llama(1), files, "mia_reference")
    for name in ("mia_reference", "mia_gradnorm"):
        with pytest.raises(InputError, match=f"{name} needs a holdout set"):
            on(llama(1), {"forget": files["forget"]}, name)
    other = tokenizer()
    other.add_tokens(["another"])
    llama(2, vocab_size=301).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"other: its tokenizer has another vocabulary than the model's"):
        on(llama(1), files, "mia_reference", reference_model=tmp_path / "other")
    with pytest.raises(InputError, match="no such directory"):
        on(llama(1), files, "mia_reference", reference_model=tmp_path / "nowhere")


def test_on_the_command_line(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, reference = save(llama(1), tmp_path / "model"), save(llama(2), tmp_path / "reference")
    arguments = ["eval", "--model", str(model), "--forget", str(files["forget"]), "--holdout", str(files["holdout"])]
    arguments += ["--reference-model", str(reference), "--min-k", "0.3", "--metrics", "membership"]
    assert cli.main([*arguments, "--out", str(tmp_path / "r.json")]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"mia_loss", "mia_reference", "mia_gradnorm"} <= set(shown)
    assert json.loads((tmp_path / "r.json").read_text())["settings"]["min_k"] == 0.3
    without = ["eval", "--model", str(model), "--forget", str(files["forget"]), "--holdout", str(files["holdout"])]
    assert cli.main([*without, "--max-new-tokens", "2"]) == 0
    assert "mia_gradnorm" not in capsys.readouterr().out  # a backward pass for each sample: only if it is named
