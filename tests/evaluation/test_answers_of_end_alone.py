"""An answer that is only its end has no memorisation and no Min-K, and takes those of the others with it no more."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import evaluate
from perta_fast.errors import InputError
from perta_fast.evaluation import metrics
from tests.support.models import FORGET, llama, tokenizer, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = tokenizer()
TEXTS = [{"text": row["answer"]} for row in FORGET]
ALONE = [{"text": "zq"}]  # two tokens, of which the first is never predicted
SETTINGS: dict[str, Any] = {
    "progress": False,
    "tokenizer": WORDS,
    "max_new_tokens": 4,
    "metrics": ["default", "privleak_without_gold"],
}


def measured(tmp_path: Path, forget: list[dict[str, str]], holdout: list[dict[str, str]], **changes: Any) -> Any:
    forget_path = write_lines(tmp_path / "forget.jsonl", forget)
    holdout_path = write_lines(tmp_path / "holdout.jsonl", holdout)
    model = changes.pop("model", llama(2).eval())
    return evaluate(model, forget=forget_path, holdout=holdout_path, **SETTINGS | changes)


def test_the_sample_is_left_out_and_counted(tmp_path: Path) -> None:
    assert len(WORDS("zq")["input_ids"]) == 2
    whole = measured(tmp_path, TEXTS[:3], TEXTS[3:])
    out = tmp_path / "result.json"
    found = measured(tmp_path, TEXTS[:3] + ALONE, ALONE + TEXTS[3:], out=out)
    for name in ("mia_min_k", "mia_min_k_plus_plus", "privleak_without_gold"):
        assert found[name] == whole[name]
    for name in ("forget_extraction_strength", "forget_exact_memorization"):
        assert found[name] == pytest.approx(whole[name])
    assert found["mia_loss"] != whole["mia_loss"]  # it has a loss
    assert any("mia_min_k_plus_plus: 2 of 7 answers are only their end" in note for note in found.notes)
    assert any("forget_exact_memorization: 1 of 4 answers are only their end" in note for note in found.notes)
    assert not any("only their end" in note for note in whole.notes)
    scores = json.loads(out.read_text())["metrics"]["mia_min_k"]["value_by_index"]
    assert [number for number, sample in scores.items() if sample["score"] is None] == ["3", "4"]


def test_a_set_of_nothing_else(tmp_path: Path) -> None:
    found = measured(tmp_path, ALONE, TEXTS)
    assert math.isnan(found["mia_min_k"])
    assert math.isnan(found["privleak_without_gold"])
    assert 0 <= found["mia_loss"] <= 1


def test_scores_that_are_not_finite_still_show(tmp_path: Path) -> None:
    broken = llama(0).eval()
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    assert math.isnan(measured(tmp_path, TEXTS[:3] + ALONE, TEXTS[3:], model=broken)["mia_min_k"])


def test_privleak_without_a_gold_model_says_so(tmp_path: Path) -> None:
    out = tmp_path / "gold.json"
    found = measured(tmp_path, TEXTS[:3], TEXTS[3:], out=out)
    assert "privleak" not in found.metrics
    assert found["privleak_without_gold"] == pytest.approx(100 * ((1 - found["mia_min_k"]) - 0.5) / 0.5)
    assert any("privleak_without_gold: takes 0.5" in note for note in found.notes)
    for changes in ({"metrics": None}, {"metrics": None, "reference": out}):
        beside = measured(tmp_path, TEXTS[:3], TEXTS[3:], **changes)
        assert "privleak_without_gold" not in beside.metrics
        assert not any("privleak_without_gold" in note for note in beside.notes)
    with pytest.raises(InputError, match="'privleak_without_gold' is no metric of this data"):
        measured(tmp_path, TEXTS[:3], TEXTS[3:], reference=out)


def test_an_empty_set_has_no_auc() -> None:
    assert math.isnan(metrics.membership_auc([], [1.0]))
    assert math.isnan(metrics.membership_auc([1.0], []))
