"""Whole evaluations of small models on small data in the benchmarks' forms."""

import copy
import json
import math
import os
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import hmean
from sklearn.metrics import roc_auc_score
from transformers import LlamaForCausalLM

from perta_fast import Evaluation, cli, evaluate
from perta_fast.data.batches import Batch
from perta_fast.data.rows import rows_from
from perta_fast.data.samples import encode
from perta_fast.errors import InputError
from perta_fast.evaluation.results import EvaluationFile
from perta_fast.models.losses import per_sample_losses
from tests.support.checkpoints import fingerprint
from tests.support.models import CHAT_TEMPLATE, FORGET, RETAIN, llama, tokenizer, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")
RougeScorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer

WORDS = tokenizer()
Row = dict[str, Any]


def fictitious(rows: list[dict[str, str]]) -> list[Row]:
    return [
        {
            **row,
            "paraphrased_answer": f"Indeed, {row['answer']}",
            "perturbed_answer": [f"No{wrong} {row['answer'][4:]}" for wrong in range(5)],
        }
        for row in rows
    ]


def general(kind: str) -> list[Row]:
    return [
        {"question": f"{kind} {k}?", "answer": f"Fact {k}", "perturbed_answer": [f"Lie {k}", "A", "B c"]}
        for k in range(4)
    ]


TOFU = {
    "forget01_perturbed": fictitious(FORGET),
    "retain_perturbed": fictitious(RETAIN),
    "real_authors_perturbed": general("Author"),
    "world_facts_perturbed": general("World"),
}
HOLDOUT = [{"question": f"Why is hill {k}?", "answer": f"Because of stone {k}."} for k in range(6)]


def write_tofu(folder: Path) -> Path:
    """TOFU's files in ``folder``, and a holdout set."""
    for name, rows in TOFU.items():
        write_lines(folder / f"{name}.jsonl", rows)
    write_lines(folder / "holdout01.json", HOLDOUT)
    return folder


@pytest.fixture(scope="module")
def tofu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tofu(tmp_path_factory.mktemp("tofu"))


@pytest.fixture(scope="module")
def knowing() -> LlamaForCausalLM:
    """A model that has learned the forget answers by heart."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # this fixture is made before ``one_thread``
    torch.manual_seed(0)
    model = llama(1)
    batch = Batch.of(encode(rows_from(FORGET), WORDS, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = per_sample_losses(model, batch)
    for _ in range(1000):  # how many it takes depends on how the processor rounds
        if losses.max() < 1e-3:
            break
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        losses = per_sample_losses(model, batch)
    assert losses.max() < 1e-3
    torch.set_num_threads(threads)
    return model.eval()


SETTINGS: dict[str, Any] = {"max_new_tokens": 24, "progress": False, "tokenizer": WORDS}


def on_tofu(model: LlamaForCausalLM, folder: Path, **changes: Any) -> Evaluation:
    return evaluate(model, suite="tofu", data=folder, split="forget01", **SETTINGS | changes)


def losses(model: LlamaForCausalLM, rows: list[Mapping[str, str]]) -> list[float]:
    """Each answer's mean loss, by transformers' own loss, one sample at a time."""
    found = []
    for sample in encode(rows_from(rows), WORDS, 128):
        with torch.no_grad():
            ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
            found.append(float(model(input_ids=ids, labels=labels).loss))
    return found


def test_tofu_by_its_definitions(tofu: Path, knowing: LlamaForCausalLM) -> None:
    result = on_tofu(knowing, tofu)
    for name, rows, truthful in (
        ("forget", TOFU["forget01_perturbed"], "paraphrased_answer"),
        ("retain", TOFU["retain_perturbed"], "paraphrased_answer"),
        ("ra", TOFU["real_authors_perturbed"], "answer"),
        ("wf", TOFU["world_facts_perturbed"], "answer"),
    ):
        own = losses(knowing, rows)
        right = losses(knowing, [{"question": r["question"], "answer": r[truthful]} for r in rows])
        wrong = [
            losses(knowing, [{"question": r["question"], "answer": w} for w in r["perturbed_answer"]]) for r in rows
        ]
        probabilities = [math.exp(-loss) for loss in own]
        assert result[f"{name}_Q_A_Prob"] == pytest.approx(sum(probabilities) / len(rows), rel=1e-4)
        ratios = [math.exp(-sum(w) / len(w)) / math.exp(-r) for r, w in zip(right, wrong, strict=True)]
        if name == "forget":
            expected = [min(ratio, 1 / ratio) for ratio in ratios]
            assert result["forget_truth_ratio"] == pytest.approx(sum(expected) / len(rows), rel=1e-4)
            continue
        expected = [max(0, 1 - ratio) for ratio in ratios]
        found = result[f"{name}_Truth_Ratio"]
        assert found == pytest.approx(sum(expected) / len(rows), rel=1e-4, abs=1e-6)
        if name in ("ra", "wf"):
            shares = [p / (p + sum(math.exp(-loss) for loss in w)) for p, w in zip(probabilities, wrong, strict=True)]
            found = result[f"{name}_Q_A_Prob_normalised"]
            assert found == pytest.approx(sum(shares) / len(rows), rel=1e-4)
    nine = [
        result[f"{role}_{name}"]
        for role, first in (("retain", "Q_A_Prob"), ("ra", "Q_A_Prob_normalised"), ("wf", "Q_A_Prob_normalised"))
        for name in (first, "Q_A_ROUGE", "Truth_Ratio")
    ]
    assert result["model_utility"] == pytest.approx(hmean(nine))


def test_a_model_that_knows_and_one_that_does_not(tofu: Path, knowing: LlamaForCausalLM) -> None:
    known, unknown = on_tofu(knowing, tofu), on_tofu(llama(2).eval(), tofu)
    assert known["forget_Q_A_Prob"] > 0.95
    assert known["extraction_strength"] > 0.95
    assert known["exact_memorization"] > 0.95
    assert known["forget_Q_A_ROUGE"] > 0.95
    assert known["mia_loss"] == known["mia_min_k"] == 1
    assert unknown["forget_Q_A_Prob"] < 0.01
    assert unknown["extraction_strength"] < 0.15  # 1 / L of answers of about 15 tokens
    assert unknown["exact_memorization"] < 0.15
    assert unknown["forget_Q_A_ROUGE"] < 0.2


def test_gold_against_gold(tofu: Path, knowing: LlamaForCausalLM, tmp_path: Path) -> None:
    gold = llama(3).eval()
    first = on_tofu(gold, tofu, out=tmp_path / "gold.json")
    again = on_tofu(gold, tofu, reference=tmp_path / "gold.json")
    assert again["forget_quality"] == 1
    assert again["forget_quality_log10"] == 0
    assert again["privleak"] == 0
    other = on_tofu(knowing, tofu, reference=tmp_path / "gold.json")
    assert other["forget_quality"] < 0.1
    assert other["forget_quality_log10"] == pytest.approx(math.log10(other["forget_quality"]))
    assert other["privleak"] == pytest.approx(-100)
    # open-unlearning's files have the metrics at the top.
    content = json.loads((tmp_path / "gold.json").read_text())
    (tmp_path / "TOFU_EVAL.json").write_text(json.dumps(content["metrics"]))
    assert on_tofu(knowing, tofu, reference=tmp_path / "TOFU_EVAL.json")["forget_quality"] == other["forget_quality"]
    scores = content["metrics"]["mia_zlib"]["value_by_index"].values()
    labels = [each["set"] == "holdout" for each in scores]
    assert first["mia_zlib"] == pytest.approx(roc_auc_score(labels, [each["score"] for each in scores]))


def test_texts_only_where_asked_for(tofu: Path, knowing: LlamaForCausalLM, tmp_path: Path) -> None:
    on_tofu(knowing, tofu, out=tmp_path / "private.json")
    private = (tmp_path / "private.json").read_text()
    assert not any(row["answer"] in private or row["question"] in private for row in FORGET)
    on_tofu(knowing, tofu, out=tmp_path / "shown.json", show_text=True)
    shown = json.loads((tmp_path / "shown.json").read_text())["metrics"]["forget_Q_A_ROUGE"]["value_by_index"]
    assert [each["ground_truth"] for each in shown.values()] == [row["answer"] for row in FORGET]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for each in shown.values():
        recall = scorer.score(each["ground_truth"], each["generation"])["rougeL"].recall
        assert each["rougeL_recall"] == pytest.approx(recall)


def test_results_do_not_depend_on_the_batch(tofu: Path, knowing: LlamaForCausalLM) -> None:
    one, many = on_tofu(knowing, tofu, batch_size=1), on_tofu(knowing, tofu, batch_size=64)
    assert one.metrics.keys() == many.metrics.keys()
    for name in one.metrics:
        assert one[name] == pytest.approx(many[name], rel=1e-4, abs=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_cuda(tofu: Path, knowing: LlamaForCausalLM) -> None:
    expected, found = on_tofu(knowing, tofu), on_tofu(copy.deepcopy(knowing).cuda(), tofu)
    assert found.metrics.keys() == expected.metrics.keys()
    for name in found.metrics:
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5)


def test_a_broken_model_gives_nulls(tofu: Path, tmp_path: Path) -> None:
    model = llama(0).eval()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    result = on_tofu(model, tofu, out=tmp_path / "broken.json")
    assert math.isnan(result["model_utility"])
    assert any("not finite" in note for note in result.notes)
    assert json.loads((tmp_path / "broken.json").read_text())["metrics"]["model_utility"]["agg_value"] is None


def write_muse(folder: Path) -> Path:
    """MUSE's files in ``folder``."""
    files: dict[str, list[Row]] = {
        "verbmem/forget": [{"prompt": f"Question: {row['question']}\nAnswer:", "gt": row["answer"]} for row in FORGET],
        "knowmem/forget_qa": list(FORGET),
        "knowmem/forget_qa_icl": [{"question": "A?", "answer": "B"}, {"question": "C?", "answer": "D"}],
        "knowmem/retain_qa": list(RETAIN),
        "knowmem/retain_qa_icl": [{"question": "A?", "answer": "B"}],
        "privleak/forget": [{"text": f"Question: {row['question']}\nAnswer: {row['answer']}"} for row in FORGET],
        "privleak/holdout": [{"text": f"{row['answer']} {row['question']}"} for row in HOLDOUT],
    }
    for name, rows in files.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows))  # a list, as the authors write it
    return folder


@pytest.fixture(scope="module")
def muse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_muse(tmp_path_factory.mktemp("muse"))


def test_muse(muse: Path, tmp_path: Path, knowing: LlamaForCausalLM) -> None:
    out = tmp_path / "gold.json"
    result = evaluate(knowing, suite="muse", data=muse, out=out, **SETTINGS)
    assert result["forget_verbmem_ROUGE"] > 0.95
    assert result["extraction_strength"] > 0.95  # of what follows the prompt, which alone was learned
    assert result["exact_memorization"] > 0.95
    assert 0 <= result["retain_knowmem_ROUGE"] <= 1
    assert result["mia_min_k"] > 0.8
    again = evaluate(knowing, suite="muse", data=muse, reference=out, **SETTINGS)
    assert again["privleak"] == 0


def test_no_more_of_a_text_is_scored_than_the_limit(
    muse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perta_fast.evaluation.muse.SCORED_TOKENS", 6)
    model = llama(2).eval()

    @torch.no_grad()
    def scored(prompt: str, text: str) -> tuple[list[float], list[bool]]:
        """Losses and hits of the first six tokens after the prompt."""
        begin = max(1, len(WORDS(prompt)["input_ids"]))
        ids = torch.tensor(WORDS(text)["input_ids"])
        every = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        places = range(begin, min(begin + 6, len(ids)))
        return (
            [-float(every[k - 1, ids[k]]) for k in places],
            [int(every[k - 1].argmax()) == int(ids[k]) for k in places],
        )

    out = tmp_path / "result.json"
    evaluate(model, suite="muse", data=muse, out=out, **SETTINGS)
    found = json.loads(out.read_text())["metrics"]
    for role in ("forget", "holdout"):
        own = [each["score"] for each in found["mia_loss"]["value_by_index"].values() if each["set"] == role]
        rows = json.loads((muse / f"privleak/{role}.json").read_text())
        expected = [sum(losses) / len(losses) for losses, _ in (scored("", row["text"]) for row in rows)]
        assert own == pytest.approx(expected, rel=1e-4)
    rows = json.loads((muse / "verbmem/forget.json").read_text())
    hits = [scored(row["prompt"], f"{row['prompt']} {row['gt']}")[1][:-1] for row in rows]
    exact = [each["score"] for each in found["exact_memorization"]["value_by_index"].values()]
    assert exact == pytest.approx([sum(each) / len(each) for each in hits])


def test_prompts_of_muse(muse: Path, knowing: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    generate = knowing.generate

    def listening(input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        asked.extend(WORDS.batch_decode(input_ids, skip_special_tokens=True))
        return generate(input_ids=input_ids, **settings)

    monkeypatch.setattr(knowing, "generate", listening)
    evaluate(knowing, suite="muse", data=muse, **SETTINGS)
    question = FORGET[0]["question"]
    shown = "Question: A?\nAnswer: B\n\nQuestion: C?\nAnswer: D\n\n"
    assert f"{shown}Question: {question}\nAnswer: " in asked
    assert f"Question: {question}\nAnswer:" in asked
    assert f"Question: A?\nAnswer: B\n\nQuestion: {RETAIN[0]['question']}\nAnswer: " in asked


def test_a_prompt_that_leaves_nothing_to_score(muse: Path) -> None:
    with pytest.raises(InputError, match=r"object 1: its prompt leaves no token to score within 5 tokens"):
        evaluate(llama(0), suite="muse", data=muse, max_length=5, **SETTINGS)


def test_own_data_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama(4)
    model.save_pretrained(tmp_path / "model")
    WORDS.save_pretrained(tmp_path / "model")
    paths = {
        "forget": write_lines(tmp_path / "forget.jsonl", FORGET[:1]),  # a single sample
        "retain": write_lines(tmp_path / "retain.jsonl", [{"text": "Rivers run to the sea."}]),
        "holdout": write_lines(tmp_path / "holdout.jsonl", HOLDOUT),
    }
    out = tmp_path / "result.json"
    options = [part for role, path in paths.items() for part in (f"--{role}", str(path))]
    arguments = ["eval", "--model", str(tmp_path / "model"), *options, "--out", str(out), "--max-new-tokens", "4"]
    assert cli.main(arguments) == 0
    assert "forget_Q_A_ROUGE" in capsys.readouterr().out
    found = json.loads(out.read_text())["metrics"]
    assert found["forget_loss"]["agg_value"] == pytest.approx(losses(model.eval(), FORGET[:1])[0], rel=1e-4)
    assert "retain_Q_A_ROUGE" not in found  # text has no question
    assert 0 <= found["mia_min_k_plus_plus"]["agg_value"] <= 1
    before = out.read_bytes()
    assert cli.main(arguments) == 2  # it exists
    assert out.read_bytes() == before


def test_answers_cut_by_the_length_limit_are_noted(tofu: Path) -> None:
    result = on_tofu(llama(0).eval(), tofu, max_length=30)
    assert any("cut to the length limit" in note for note in result.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "tofu", "data": "{tofu}", "split": "forget20"}, "split is 'forget20'"),
        ({"suite": "tofu", "data": "{tofu}"}, "has no file forget10_perturbed.jsonl"),
        ({"suite": "tofu"}, "data is missing"),
        ({"suite": "wmdp", "data": "{tofu}"}, "must be tofu or muse"),
        ({"suite": "muse", "data": "{tofu}"}, "has no file verbmem/forget.jsonl"),
        ({}, "forget is missing"),
        ({"suite": "tofu", "data": "{tofu}", "forget": "x.jsonl"}, "has its own sets"),
        ({"suite": "tofu", "data": "{tofu}", "split": "forget01", "reference": "nowhere"}, "cannot be read"),
        ({"suite": "tofu", "data": "{tofu}", "split": "forget01", "batch_size": 0}, "batch_size is 0"),
        ({"suite": "tofu", "data": "{tofu}", "out": "model.safetensors", "overwrite": True}, "ends in .json"),
        ({"suite": "tofu", "data": "{tofu}", "out": "{tofu}/no/a.json"}, "no: is not a directory"),
        ({"suite": "tofu", "data": "{tofu}", "split": "forget01", "max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_bad_arguments(tofu: Path, changes: dict[str, Any], message: str) -> None:
    given = {key: value.format(tofu=tofu) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(InputError, match=message):
        evaluate(llama(0), **{"progress": False, "tokenizer": WORDS} | given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a file of results"),
        ('{"metrics": {}}', "lacks forget_truth_ratio"),
        ('{"forget_truth_ratio": {"value_by_index": {"0": {"score": 1}}}}', "has 1 values .* 5 samples"),
        (
            json.dumps({"forget_truth_ratio": {"value_by_index": {str(k): {"score": None} for k in range(5)}}}),
            "not a finite number",
        ),
    ],
)
def test_bad_references(tofu: Path, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "gold.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        on_tofu(llama(0), tofu, reference=path)


def test_a_reference_that_is_a_pipe(tofu: Path, tmp_path: Path) -> None:
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "gold.json")
    with pytest.raises(InputError, match=r"gold\.json: cannot be read: Not a regular file"):
        on_tofu(llama(0), tofu, reference=tmp_path / "gold.json")


def test_a_file_written_by_0_1_0() -> None:
    file = EvaluationFile.read(Path(__file__).with_name("written_by_0_1_0") / "evaluation.json")
    assert file.model == "/data/base"
    assert file.data_hashes.keys() == {"forget", "retain"}
    assert file.value("forget_loss") == file.aggregates()["forget_loss"] == 5.701959860324859
    assert len(file.values("retain_loss", "avg_loss", 7)) == 7
    assert file.differences({"date": "01 Apr 2025"}, {}) == []  # it says nothing about a date


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1", "is not JSON"),
        ("3", "line 1: is not a JSON object"),
        ('{"question": "a", "answer": "", "perturbed_answer": ["b"]}', 'line 1: "answer"'),
        ('{"question": "a", "answer": "b", "perturbed_answer": []}', 'line 1: "perturbed_answer"'),
        ("", "holds no samples"),
    ],
)
def test_bad_rows(tofu: Path, tmp_path: Path, row: str, message: str) -> None:
    for path in tofu.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "world_facts_perturbed.jsonl").write_text(row)
    with pytest.raises(InputError, match=message):
        on_tofu(llama(0), tmp_path)


def test_the_module_is_left_as_it_was(tofu: Path) -> None:
    model = llama(0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    on_tofu(model, tofu)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_the_harness(tofu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"perta-fast\[lm-eval\]"):
        on_tofu(llama(0), tofu, lm_eval=["mmlu"])


def test_a_task_that_the_harness_lacks(tofu: Path) -> None:
    pytest.importorskip("lm_eval.models.huggingface", reason="lm-evaluation-harness is not installed")
    with pytest.raises(InputError, match=r"has no task nonesuch$"):
        on_tofu(llama(0), tofu, lm_eval=["arc_easy", "nonesuch"])


def test_evaluate_is_offered_at_the_top() -> None:
    import perta_fast

    assert perta_fast.evaluate is evaluate
    assert perta_fast.Evaluation is Evaluation
    assert {"evaluate", "Evaluation"} <= set(dir(perta_fast))


def test_no_input_is_replaced(tofu: Path, tmp_path: Path) -> None:
    """Whatever it is and by whatever path; but a result that lies beside a model is replaced."""
    job = write_job(tmp_path / "job")
    data = shutil.copytree(tofu, tmp_path / "data")
    gold, forget = tmp_path / "gold.json", tmp_path / "forget.json"
    gold.write_text(json.dumps({"format_version": 1, "metrics": {}, "general": {}}))
    os.link(job.forget, forget)
    (tmp_path / "link").symlink_to(job.model)
    before = fingerprint(tmp_path)
    suite = {"suite": "tofu", "data": data, "split": "forget10"}
    for settings, out in (
        ({"forget": job.forget}, job.model / "config.json"),
        ({"forget": job.forget}, tmp_path / "link" / "tokenizer.json"),
        ({"forget": job.forget}, forget),
        ({"forget": forget}, tmp_path / "link" / ".." / ".." / "forget.json"),
        ({"forget": job.forget, "holdout": job.retain, "reference": gold}, gold),
        (suite, next(data.glob("*.json"))),
    ):
        with pytest.raises(InputError, match=r"is the input .*choose another file"):
            evaluate(job.model, **settings, out=out, overwrite=True, progress=False)
        assert fingerprint(tmp_path) == before
    beside = job.model / "scores.json"
    for _ in range(2):
        evaluate(job.model, forget=job.forget, out=beside, overwrite=True, progress=False)
    assert EvaluationFile.read(beside).metrics


def test_a_reference_that_was_measured_in_another_way_is_noted(tmp_path: Path, one_thread: None) -> None:
    sets = {"forget": write_lines(tmp_path / "f.jsonl", FORGET), "holdout": write_lines(tmp_path / "h.jsonl", HOLDOUT)}
    chat = tokenizer(CHAT_TEMPLATE)
    how: dict[str, Any] = {"tokenizer": chat, "progress": False, "metrics": ["privleak", "membership"]}
    evaluate(llama(0), **sets, **how | {"metrics": ["membership"]}, out=tmp_path / "gold.json")
    same = evaluate(llama(0), **sets, **how, reference=tmp_path / "gold.json")
    assert same.notes == []
    write_lines(sets["holdout"], [*HOLDOUT, *FORGET])
    other = evaluate(llama(0), **sets, **how, reference=tmp_path / "gold.json", system_prompt="Brief.")
    assert [note.partition("gold.json: ")[2] for note in other.notes] == [
        "was measured with system_prompt None, this evaluation has 'Brief.'",
        "its holdout data is another file",
    ]


CLOCK = "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
VARIABLE = "{{ date_string|default('26 Jul 2024') }}" + CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("template", "gold_date", "date", "dates"),
    [
        (CLOCK, None, None, ("'01 Apr 2025'", "'02 Apr 2025'")),
        (CLOCK, None, "01 Apr 2025", None),
        (CLOCK, "03 Apr 2025", "03 Apr 2025", None),
        (VARIABLE, None, None, None),
        (VARIABLE, None, "03 Apr 2025", ("None", "'03 Apr 2025'")),
        (CHAT_TEMPLATE, None, None, None),
        (CHAT_TEMPLATE, None, "03 Apr 2025", None),  # it takes no date
    ],
)
def test_a_reference_whose_template_was_told_another_date_is_noted(
    template: str,
    gold_date: str | None,
    date: str | None,
    dates: tuple[str, str] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sets = {"forget": write_lines(tmp_path / "f.jsonl", FORGET), "holdout": write_lines(tmp_path / "h.jsonl", HOLDOUT)}
    gold = tmp_path / "gold.json"
    how: dict[str, Any] = {"tokenizer": tokenizer(template), "progress": False}
    monkeypatch.setattr("perta_fast.data.chat._clock", lambda: datetime(2025, 4, 1))
    evaluate(llama(0), **sets, **how, metrics=["membership"], date_string=gold_date, out=gold)
    monkeypatch.setattr("perta_fast.data.chat._clock", lambda: datetime(2025, 4, 2))
    found = evaluate(llama(0), **sets, **how, metrics=["privleak"], date_string=date, reference=gold)
    said = "was measured with date {}, this evaluation has {}"
    assert found.notes == ([] if dates is None else [f"{gold}: {said.format(*dates)}"])


def test_rows_without_rouge_are_noted(tmp_path: Path, one_thread: None) -> None:
    talk = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}
    chat = tokenizer(CHAT_TEMPLATE)
    mixed = write_lines(tmp_path / "mixed.jsonl", [*FORGET[:2], talk])
    result = evaluate(llama(0), forget=mixed, tokenizer=chat, progress=False)
    assert "forget_Q_A_ROUGE" not in result.metrics
    assert result.notes == [
        "forget: has no ROUGE, which is of questions and answers; 1 of 3 rows are no single questions"
    ]
    with pytest.raises(InputError, match="'membership' is no metric of this data: none of this group"):
        evaluate(llama(0), forget=mixed, tokenizer=chat, metrics=["membership"], progress=False)
