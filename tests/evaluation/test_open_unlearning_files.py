"""The layout of open-unlearning: its file names, keys and nesting, and none of its names for what is not its metric."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from perta_fast import cli, evaluate
from perta_fast.errors import InputError
from perta_fast.evaluation.results import EvaluationFile
from tests.evaluation.test_kept_parts import content, home, place
from tests.evaluation.test_suites import HOLDOUT, write_muse
from tests.support.checkpoints import fingerprint
from tests.support.models import CHAT_TEMPLATE, llama, tokenizer, write_lines

__all__ = ["home", "place"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")

COMPATIBLE: Literal["open-unlearning"] = "open-unlearning"
SETS = ("forget", "retain", "ra", "wf")
TOFU_NAMES = {
    *(f"{role}_Q_A_{metric}" for role in SETS for metric in ("Prob", "ROUGE")),
    *("ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised", "forget_truth_ratio", "model_utility"),
    *("retain_Truth_Ratio", "ra_Truth_Ratio", "wf_Truth_Ratio"),
    *("extraction_strength", "exact_memorization", "retain_extraction_strength"),
    *("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus"),
}


def laid_out(home: Path, folder: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both files of an evaluation on TOFU."""
    options: dict[str, Any] = {"suite": "tofu", "data": home / "tofu", "split": "forget01", "compatible": COMPATIBLE}
    evaluate(home / "model", progress=False, open_unlearning_dir=folder, **options | changes)
    return read(folder, "TOFU")


def read(folder: Path, suite: str) -> tuple[dict[str, Any], dict[str, Any]]:
    every, summary = (json.loads((folder / f"{suite}_{kind}.json").read_text()) for kind in ("EVAL", "SUMMARY"))
    return every, summary


def test_the_results_of_tofu(home: Path) -> None:
    every, summary = laid_out(home, home / "evals", out=home / "r.json", metrics=["default", "privleak_without_gold"])
    assert list(every) == sorted(TOFU_NAMES | {"privleak"})
    ours = json.loads((home / "r.json").read_text())["metrics"]
    assert summary == {
        name: ours[name if name != "privleak" else "privleak_without_gold"]["agg_value"] for name in every
    }
    for name in ("forget_Q_A_Prob", "forget_truth_ratio", "extraction_strength"):
        assert every[name] == ours[name]
    assert every["forget_Q_A_Prob"]["value_by_index"]["0"].keys() == {"prob", "avg_loss"}
    assert every["forget_Q_A_ROUGE"]["value_by_index"]["0"].keys() == {"rougeL_recall", "rougeL_f1"}
    assert every["model_utility"].keys() == {"agg_value"}
    attack = every["mia_loss"]
    assert attack.keys() == {"forget", "holdout", "auc", "agg_value"}
    assert attack["auc"] == attack["agg_value"] == summary["mia_loss"]
    assert list(attack["holdout"]["value_by_index"]) == [str(number) for number in range(len(HOLDOUT))]
    scores = [sample["score"] for sample in attack["forget"]["value_by_index"].values()]
    assert attack["forget"]["agg_value"] == pytest.approx(sum(scores) / len(scores))


def test_the_file_serves_as_a_gold_model_s(home: Path) -> None:
    laid_out(home, home / "gold", metrics=["forget_truth_ratio", "membership"])
    gold = home / "gold" / "TOFU_EVAL.json"
    assert EvaluationFile.read(gold).foreign
    _, summary = laid_out(home, home / "evals", reference=gold, metrics=["forget_quality*", "privleak"])
    assert summary == {"forget_quality": 1.0, "privleak": 0.0}


def test_a_number_of_another_metric_does_not_get_the_name(home: Path) -> None:
    every, summary = laid_out(home, home / "evals", max_new_tokens=4, min_k=0.2)
    left_out = {name for name in TOFU_NAMES if "ROUGE" in name or "min_k" in name or name == "model_utility"}
    assert every.keys() == summary.keys() == TOFU_NAMES - left_out


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
def test_the_results_of_muse(tmp_path: Path, template: str | None) -> None:
    (tmp_path / "muse").mkdir()
    write_muse(tmp_path / "muse")
    llama(1, max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tokenizer(template).save_pretrained(tmp_path / "model")
    evaluate(
        tmp_path / "model", suite="muse", data=tmp_path / "muse", open_unlearning_dir=tmp_path / "evals", progress=False
    )
    every, summary = read(tmp_path / "evals", "MUSE")
    knowledge = {"forget_knowmem_ROUGE", "retain_knowmem_ROUGE"} if template is None else set()
    names = {"extraction_strength", "exact_memorization", "mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus"}
    assert every.keys() == summary.keys() == names | knowledge


def test_a_number_that_is_not_finite_is_null_and_not_in_the_summary(home: Path) -> None:
    model = llama(1)
    model.lm_head.weight.data.fill_(float("nan"))
    model.save_pretrained(home / "model")
    every, summary = laid_out(home, home / "evals", metrics=["forget_Q_A_Prob"])
    assert (every["forget_Q_A_Prob"]["agg_value"], summary) == (None, {})


def test_what_cannot_have_the_layout_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = fingerprint(home)
    for folder, changes, message in (
        (home / "evals", {"compatible": None}, "which measures in another way; add compatible open-unlearning"),
        (home / "no" / "evals", {}, "no: is not a directory"),
        (home / "tofu" / "holdout01.json", {}, "is no directory; give one for TOFU_EVAL.json and TOFU_SUMMARY"),
    ):
        with pytest.raises(InputError, match=message):
            laid_out(home, folder, **changes)
    assert fingerprint(home) == before
    forget = write_lines(home / "forget.jsonl", HOLDOUT)
    with pytest.raises(InputError, match="is for the results of a suite"):
        evaluate(home / "model", forget=forget, open_unlearning_dir=home / "evals")
    (home / "evals").mkdir()
    (home / "evals" / "TOFU_SUMMARY.json").write_text("mine")
    arguments = ["eval", "--model", home / "model", "--suite", "tofu", "--data", home / "tofu", "--split", "forget01"]
    arguments += ["--compatible", COMPATIBLE, "--metrics", "forget_Q_A_Prob", "--open-unlearning-dir", home / "evals"]
    assert cli.main(list(map(str, arguments))) == 2
    assert "TOFU_SUMMARY.json: exists; choose another file or pass --overwrite" in capsys.readouterr().err
    assert (home / "evals" / "TOFU_SUMMARY.json").read_text() == "mine"
    assert cli.main([*map(str, arguments), "--overwrite"]) == 0
    assert read(home / "evals", "TOFU")[1].keys() == {"forget_Q_A_Prob"}


def test_an_evaluation_that_is_stopped_as_it_writes_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = {"metrics": ["forget_Q_A_Prob"], "out": home / "r.json"}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("perta_fast.files.kept_parts.KeptParts.finish", stop)
        laid_out(home, home / "evals", **options)
    assert read(home / "evals", "TOFU")[1].keys() == {"forget_Q_A_Prob"}
    laid_out(home, home / "evals", **options)
    assert content(home / "r.json")["metrics"].keys() == {"forget_Q_A_Prob"}
