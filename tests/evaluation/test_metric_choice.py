"""Metrics that are chosen by name: what is computed, and what is not done."""

from pathlib import Path
from typing import Any

import pytest

from perta_fast import Evaluation, cli, evaluate
from perta_fast.errors import InputError
from perta_fast.evaluation.attacks import offer_attacks
from perta_fast.evaluation.conventions import OURS
from perta_fast.evaluation.examinee import Examinee
from perta_fast.evaluation.tofu import TofuMetrics, read_tofu
from tests.evaluation.test_suites import WORDS, write_tofu
from tests.support.models import FORGET, RETAIN, llama, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "progress": False, "tokenizer": WORDS}


@pytest.fixture(scope="module")
def tofu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tofu(tmp_path_factory.mktemp("tofu"))


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model is run on."""
    done: list[str] = []
    score, answer = Examinee.score, Examinee.answer

    def scoring(self: Examinee, samples: Any, role: str, **options: Any) -> Any:
        done.append(role)
        return score(self, samples, role, **options)

    def answering(self: Examinee, prompts: Any, role: str, *options: Any) -> Any:
        done.append(f"{role} answers")
        return answer(self, prompts, role, *options)

    monkeypatch.setattr(Examinee, "score", scoring)
    monkeypatch.setattr(Examinee, "answer", answering)
    return done


def on_tofu(folder: Path, metrics: list[str] | None, **changes: Any) -> Evaluation:
    options = SETTINGS | {"suite": "tofu", "data": folder, "split": "forget01", "metrics": metrics} | changes
    return evaluate(llama(1).eval(), **options)


@pytest.mark.parametrize(
    ("metrics", "expected", "passes"),
    [
        (["forget_Q_A_Prob", "extraction_strength"], ["forget_Q_A_Prob", "extraction_strength"], ["forget"]),
        (["forget_Q_A_ROUGE"], ["forget_Q_A_ROUGE"], ["forget answers"]),
        (["ra_Truth_Ratio"], ["ra_Truth_Ratio"], ["ra", "ra perturbed"]),
        (["forget_truth_ratio"], ["forget_truth_ratio"], ["forget paraphrased", "forget perturbed"]),
        (["mia_loss"], ["mia_loss"], ["forget", "holdout"]),
        (
            ["memorization"],
            ["extraction_strength", "exact_memorization", "retain_extraction_strength", "retain_exact_memorization"],
            ["forget", "retain"],
        ),
        (["mia_min*", "mia_loss"], ["mia_loss", "mia_min_k", "mia_min_k_plus_plus"], ["forget", "holdout"]),
    ],
)
def test_no_work_that_is_not_needed(
    tofu: Path, work: list[str], metrics: list[str], expected: list[str], passes: list[str]
) -> None:
    result = on_tofu(tofu, metrics)
    assert list(result.metrics) == expected
    assert work == passes
    assert result.settings["metrics"] == metrics
    whole = on_tofu(tofu, None)
    for name in expected:
        assert result.metrics[name] == whole.metrics[name]


def test_one_name_need_be_no_list(tofu: Path, work: list[str]) -> None:
    one = on_tofu(tofu, "extraction_strength")  # type: ignore[arg-type]
    assert list(one.metrics) == ["extraction_strength"] and work == ["forget"]
    assert one.settings["metrics"] == ["extraction_strength"]


def test_utility_alone_has_what_it_is_made_of(tofu: Path, work: list[str]) -> None:
    result = on_tofu(tofu, ["model_utility"])
    assert list(result.metrics) == ["model_utility"]
    assert not any(role.startswith("forget") for role in work)
    assert result["model_utility"] == on_tofu(tofu, None)["model_utility"]


def test_the_default_is_all(tofu: Path) -> None:
    assert list(on_tofu(tofu, ["default"]).metrics) == list(on_tofu(tofu, None).metrics)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["forget_Q_A_prob"], "'forget_Q_A_prob' is no metric of this data; did you mean forget_Q_A_Prob?"),
        (["rogue"], "did you mean rouge?"),
        (["zzz"], r"'zzz' is no metric of this data\. There are: forget_Q_A_Prob, "),
        (["retain_verbmem*"], "is no metric"),
        ([], "metrics: names none"),
        (["forget_quality"], "forget_quality needs --reference"),
        (["privleak"], "privleak needs --reference"),
    ],
)
def test_names_that_are_not_known(tofu: Path, metrics: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        on_tofu(tofu, metrics)


def test_a_reference_is_asked_for_what_is_chosen_alone(tofu: Path, tmp_path: Path) -> None:
    gold = tmp_path / "gold.json"
    on_tofu(tofu, ["forget_truth_ratio"], out=gold)
    result = on_tofu(tofu, ["forget_quality"], reference=gold)
    assert result["forget_quality"] == 1
    with pytest.raises(InputError, match="lacks mia_min_k"):
        on_tofu(tofu, ["privleak"], reference=gold)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(0).save_pretrained(tmp_path / "model")
    WORDS.save_pretrained(tmp_path / "model")
    data = {
        "--forget": write_lines(tmp_path / "f.jsonl", FORGET),
        "--retain": write_lines(tmp_path / "r.jsonl", RETAIN),
    }
    given = [str(part) for pair in data.items() for part in pair]
    arguments = ["eval", "--model", str(tmp_path / "model"), *given]
    assert cli.main([*arguments, "--metrics", "*_loss, forget_exact_memorization"]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert shown[:3] == ["forget_loss", "forget_exact_memorization", "retain_loss"]
    assert cli.main([*arguments, "--metrics", "forget_los"]) == 2
    assert "did you mean forget_loss?" in capsys.readouterr().err
    assert cli.main([*arguments, "--metrics", ","]) == 2
    assert "metrics: names none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metrics", "expected", "rest"),
    [
        (["forget_*"], ["forget_Q_A_Prob", "forget_truth_ratio"], ["forget_Q_A_ROUGE"]),
        (["ra_Q_A_Prob"], ["ra_Q_A_Prob"], []),
        (["mia_loss", "mia_g*"], ["mia_loss"], ["mia_gradnorm"]),
    ],
)
def test_what_is_made_of_token_scores(tofu: Path, metrics: list[str], expected: list[str], rest: list[str]) -> None:
    table = TofuMetrics(read_tofu(tofu, "forget01"), None)
    offer_attacks(table, None, OURS)
    assert table.chosen_of_scores(metrics) == (expected, rest)


def test_what_needs_generated_text_is_left_out_by_default(tofu: Path) -> None:
    names, rest = TofuMetrics(read_tofu(tofu, "forget01"), None).chosen_of_scores(None)
    assert rest == ["forget_Q_A_ROUGE", "retain_Q_A_ROUGE", "ra_Q_A_ROUGE", "wf_Q_A_ROUGE", "model_utility"]
    assert not any("ROUGE" in name for name in names)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["default", "model_utility"], "model_utility needs generated text"),
        (["rouge"], "forget_Q_A_ROUGE needs generated text"),
        (["all", "mia_gradnorm"], "mia_gradnorm needs gradients"),
        (["rogue"], "is no metric"),
    ],
)
def test_what_token_scores_do_not_give(tofu: Path, metrics: list[str], message: str) -> None:
    table = TofuMetrics(read_tofu(tofu, "forget01"), None)
    offer_attacks(table, None, OURS)
    with pytest.raises(InputError, match=message):
        table.chosen_of_scores(metrics)
