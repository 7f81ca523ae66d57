"""``stress``: the teacher-forced metrics of a model that is rounded, or that relearns, for a moment."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from perta_fast import Evaluation, cli, evaluate, resume, unlearn
from perta_fast.data.rows import rows_from
from perta_fast.errors import InputError, Interrupted
from perta_fast.evaluation import stress
from perta_fast.models.loading import Subject, samples_for
from perta_fast.models.relearning import relearn_
from perta_fast.models.rounding import codes, rounded_
from tests.evaluation.test_muse_files import publish
from tests.evaluation.test_suites import WORDS, write_tofu
from tests.support.checkpoints import fingerprint
from tests.support.models import FORGET, RETAIN, Job, llama, nudge_, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

MANY = [{"question": f"Who is {k}?", "answer": f"Number {k} is {k * k}."} for k in range(25)]
ALL = ["int8", "int4", "relearn=2"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return write_job(tmp_path_factory.mktemp("job"))


def own(model: LlamaForCausalLM, folder: Path, rows: list[dict[str, str]] = MANY, **changes: Any) -> Evaluation:
    forget, retain = write_lines(folder / "f.jsonl", rows), write_lines(folder / "r.jsonl", RETAIN)
    settings = {"tokenizer": WORDS, "progress": False, "metrics": ["*_loss"], "retain": retain}
    return evaluate(model, forget=forget, **settings | changes)


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().view(torch.uint8).clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_are_those_of_a_changed_model_and_it_stays_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = llama(1).to(dtype)
    nudge_(model, 3, 0.1)
    with torch.no_grad():
        model.lm_head.weight[0, :2] = torch.tensor([0.0, -0.0])
    before = bits(model)
    result = own(model, tmp_path, stress=ALL)
    after = bits(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.grad is not None for parameter in model.parameters())

    scores, relearned = result.stress["scores"], result.stress["relearned"]
    assert list(scores) == ["before", *ALL]
    assert result.stress["rows"] == {"forget": 25, "retain": 7, "forget_not_relearned": 23}
    assert len(relearned["rows"]) == 2
    changed = {word: llama(1).to(dtype) for word in ALL}
    for word, other in changed.items():
        other.load_state_dict(model.state_dict())
        if word == "relearn=2":
            samples = samples_for(Subject(other, WORDS, ""), rows_from(MANY), None)
            some = [samples[row] for row in relearned["rows"]]
            relearn_(other, some, 2, relearned["rate"], relearned["batch_size"], relearned["seed"])
        else:
            rounded_(other, int(word[3:]))
        metrics = own(other, tmp_path, metrics=None, max_new_tokens=1).metrics
        for role in ("forget", "retain"):
            assert scores[word][role] == {
                "loss": metrics[f"{role}_loss"].value,
                "probability": metrics[f"{role}_Q_A_Prob"].value,
                "extraction_strength": metrics[f"{role}_extraction_strength"].value,
                "exact_memorization": metrics[f"{role}_exact_memorization"].value,
            }
        assert scores[word] != scores["before"]
    assert scores["before"]["forget"]["loss"] == result["forget_loss"]
    rest = [row for k, row in enumerate(MANY) if k not in relearned["rows"]]
    assert own(model, tmp_path, rest)["forget_loss"] == pytest.approx(scores["before"]["forget_not_relearned"]["loss"])
    again = own(changed["relearn=2"], tmp_path, rest)["forget_loss"]
    assert again == pytest.approx(scores["relearn=2"]["forget_not_relearned"]["loss"], rel=1e-5)
    assert "forget_not_relearned" not in scores["int8"]


def test_every_step_is_a_phase(tmp_path: Path) -> None:
    phases: list[str] = []
    own(llama(1), tmp_path, stress=ALL, progress=lambda event: phases.append(event.phase))
    assert list(dict.fromkeys(phases)) == [
        *("forget", "retain", "int8", "forget int8", "retain int8", "int4", "forget int4", "retain int4"),
        *("relearn=2", "forget relearn=2", "retain relearn=2"),
    ]


def test_more_relearning_brings_more_back(tmp_path: Path) -> None:
    scores = own(llama(1), tmp_path, stress=["relearn=1", "relearn=30"]).stress["scores"]
    losses = [scores[word]["forget"]["loss"] for word in ("before", "relearn=1", "relearn=30")]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


@pytest.mark.parametrize("suite", ["tofu", "muse"])
def test_suites_have_a_forget_and_a_retain_set(tmp_path: Path, suite: str) -> None:
    (write_tofu if suite == "tofu" else publish)(tmp_path)
    settings: dict[str, Any] = {"tokenizer": WORDS, "progress": False, "max_new_tokens": 2, "stress": ALL}
    result = evaluate(llama(0).eval(), suite=suite, data=tmp_path, split="forget01", **settings)
    scores = result.stress["scores"]
    assert list(scores) == ["before", *ALL]
    assert all({"forget", "retain"} <= sets.keys() for sets in scores.values())
    assert all(
        math.isfinite(value) for sets in scores.values() for of_set in sets.values() for value in of_set.values()
    )
    named = {"extraction_strength": "extraction_strength", "exact_memorization": "exact_memorization"}
    if suite == "tofu":
        named["probability"] = "forget_Q_A_Prob"
    assert {name: scores["before"]["forget"][name] for name in named} == {
        name: result[metric] for name, metric in named.items()
    }


def test_muse_without_passages_is_refused_and_without_retain_questions_has_one_set(tmp_path: Path) -> None:
    publish(tmp_path)
    settings: dict[str, Any] = {"tokenizer": WORDS, "progress": False, "stress": ["int8"], "metrics": ["mia_loss"]}
    shutil.rmtree(tmp_path / "knowmem")
    result = evaluate(llama(0).eval(), suite="muse", data=tmp_path, **settings)
    assert list(result.stress["scores"]["int8"]) == ["forget"]
    shutil.rmtree(tmp_path / "verbmem")
    with pytest.raises(InputError, match="stress needs the file verbmem/forget"):
        evaluate(llama(0).eval(), suite="muse", data=tmp_path, **settings)


def test_one_forget_row_is_relearned_and_there_are_no_others(tmp_path: Path) -> None:
    result = own(llama(1), tmp_path, MANY[:1], retain=None, stress=["relearn=1"])
    assert result.stress["relearned"]["rows"] == [0]
    assert result.stress["rows"] == {"forget": 1}
    assert [*result.stress["scores"]["relearn=1"]] == ["forget"]
    assert any("there are no others" in note for note in result.notes)


BAD = {
    "int5": "'int5' is none; there are int8, int4 and relearn=K, with K steps, at least 1",
    "relearn": "'relearn' is none",
    "relearn=": "'relearn=' is none",
    "relearn=0": "'relearn=0' is none",
    "relearn=-3": "'relearn=-3' is none",
    "relearn=1.5": r"'relearn=1\.5' is none",
    "relearn=٣": "is none",
    "relearn=9999999999": "is none",
    "INT8": "'INT8' is none",
    "": "'' is none",
}


@pytest.mark.parametrize("word", BAD)
def test_bad_words_are_refused_before_anything_is_read(tmp_path: Path, word: str) -> None:
    with pytest.raises(InputError, match=f"stress: .*{BAD[word]}"):
        evaluate(tmp_path / "no model", forget=tmp_path / "none.jsonl", stress=["int8", word])


def test_words_are_taken_once(tmp_path: Path) -> None:
    result = own(llama(1), tmp_path, stress=["int8", "relearn=01", "int8", "relearn=1"])
    assert list(result.stress["scores"]) == ["before", "int8", "relearn=1"]
    assert result.settings["stress"] == ["int8", "relearn=1"]
    with pytest.raises(InputError, match="stress names none"):
        own(llama(1), tmp_path, stress=[])


def test_models_that_cannot_be_changed_are_refused(tmp_path: Path, job: Job) -> None:
    with pytest.raises(InputError, match="no parameter that requires a gradient"):
        own(llama(1).requires_grad_(False), tmp_path, stress=["relearn=1"])
    model = llama(1)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.inf
    with pytest.raises(InputError, match=r"parameter lm_head\.weight has values that are not finite"):
        own(model, tmp_path, stress=["int4"])
    quantised = Path(shutil.copytree(job.model, tmp_path / "quantised"))
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    for word in ("int8", "relearn=1"):
        with pytest.raises(InputError, match=r"quantised: is quantised \(fp8"):
            evaluate(quantised, forget=job.forget, stress=[word], progress=False)


def test_a_loss_that_is_not_finite_is_noted(tmp_path: Path) -> None:
    model = llama(1)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    result = own(model, tmp_path, stress=["int8", "relearn=1"], out=tmp_path / "r.json")
    assert result.stress["scores"]["relearn=1"] == {}
    assert math.isnan(result.stress["scores"]["int8"]["forget"]["loss"])
    assert "relearn=1: the loss of step 1 of relearning is not finite, so there are no scores" in result.notes
    assert "forget int8: has scores that are not finite" in result.notes
    assert json.loads((tmp_path / "r.json").read_text())["stress"]["scores"]["int8"]["forget"]["loss"] is None
    assert "relearn=1: the loss" in result.summary()


def test_finished_stresses_are_kept(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "forget": job.forget,
        "retain": job.retain,
        "stress": ALL,
        "against": job.base,
        "metrics": ["*_loss"],
        "progress": False,
    }
    whole = evaluate(job.model, out=tmp_path / "whole.json", **settings)
    beside = fingerprint(tmp_path)
    done: list[str] = []
    real = stress._changed

    def counted(module: Any, word: str, *others: Any) -> Any:
        if word == "relearn=2" and "int4" in done and "stopped" not in done:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(word)
        return real(module, word, *others)

    monkeypatch.setattr(stress, "_changed", counted)
    with pytest.raises(Interrupted, match="what was done is kept"):
        evaluate(job.model, out=tmp_path / "r.json", **settings)
    assert done == ["int8", "int4", "stopped"]
    with pytest.raises(InputError, match="another run to this place was stopped"):
        evaluate(job.model, out=tmp_path / "r.json", **settings | {"stress": ["int8"]})
    result = resume(tmp_path / "r.json", progress=False)
    assert isinstance(result, Evaluation)
    assert done[3:] == ["relearn=2"]
    assert result.stress == whole.stress
    assert [json.loads((tmp_path / name).read_text())["stress"] for name in ("r.json", "whole.json")] == [
        whole.stress
    ] * 2
    (tmp_path / "r.json").unlink()
    assert fingerprint(tmp_path) == beside


def test_codes_against_the_model_before(job: Job, tmp_path: Path) -> None:
    own_model, other = (LlamaForCausalLM.from_pretrained(path) for path in (job.model, job.base))
    result = evaluate(job.model, forget=job.forget, stress=["relearn=1"], against=job.base, metrics=["*_loss"])
    counted = result.stress["codes"]
    assert counted["before"] == str(job.base)
    names = {name for name, _ in own_model.named_parameters() if name.endswith("proj.weight")} | {"lm_head.weight"}
    assert set(counted["tensors"]) == names
    sums = {"elements": 0, "int8": 0, "int4": 0}
    for name, row in counted["tensors"].items():
        weights = own_model.get_parameter(name).detach(), other.get_parameter(name).detach()
        expected = {f"int{n}": int((codes(weights[0], n)[0] != codes(weights[1], n)[0]).sum()) for n in (8, 4)}
        assert row == {"elements": weights[0].numel(), **expected}
        sums = {key: total + row[key] for key, total in sums.items()}
    assert 0 < counted["share"]["int4"] < counted["share"]["int8"] < 1
    assert counted["share"] == {kind: sums[kind] / sums["elements"] for kind in ("int8", "int4")}
    line = next(line for line in result.summary().splitlines() if line.startswith("codes"))
    assert f"{100 * counted['share']['int4']:.2f} % as int4" in line and str(job.base) in line


def test_codes_of_experts_and_of_gpt2_are_counted_as_they_are_stored(tmp_path: Path) -> None:
    small: dict[str, Any] = {"vocab_size": 300, "hidden_size": 40, "intermediate_size": 24, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    experts = MixtralForCausalLM(MixtralConfig(**small))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=40, n_layer=1, n_head=2))
    for kind, model, weight in (
        ("experts", experts, "model.layers.0.mlp.experts.down_proj"),
        ("gpt2", gpt2, "transformer.h.0.mlp.c_fc.weight"),
    ):
        for name in ("before", "after"):
            model.save_pretrained(tmp_path / kind / name)
            WORDS.save_pretrained(tmp_path / kind / name)
            with torch.no_grad():
                one = model.get_parameter(weight)
                (one[1] if one.ndim == 3 else one)[:, :3].mul_(-1)
        forget = write_lines(tmp_path / "f.jsonl", FORGET)
        after, before = tmp_path / kind / "after", tmp_path / kind / "before"
        settings: dict[str, Any] = {"forget": forget, "metrics": ["*_loss"], "progress": False}
        counted = evaluate(after, stress=["int8"], against=before, **settings).stress["codes"]
        changed = {name: row for name, row in counted["tensors"].items() if row["int4"]}
        stored = {"experts": "model.layers.0.block_sparse_moe.experts.1.w2.weight", "gpt2": weight}[kind]
        assert list(changed) == [stored]
        assert changed[stored]["elements"] == (40 * 24 if kind == "experts" else 40 * 160)
        assert 0.7 * 120 < changed[stored]["int4"] <= changed[stored]["int8"] <= 120


def test_the_model_of_the_report_is_taken(job: Job, tmp_path: Path) -> None:
    before = Path(shutil.copytree(job.model, tmp_path / "before"))
    unlearn(before, job.base, job.tuned, job.forget, job.retain, rule="tv", lam=1.0, out=tmp_path / "u", progress=False)

    def measured(**changes: Any) -> Evaluation:
        settings = {"forget": job.forget, "stress": ["int4"], "metrics": ["*_loss"], "progress": False}
        return evaluate(tmp_path / "u", **settings | changes)

    assert measured().stress["codes"]["before"] == str(before)
    assert measured(against=job.base).stress["codes"]["before"] == str(job.base)
    assert "codes" not in measured(stress=["relearn=1"]).stress
    assert evaluate(before, forget=job.forget, stress=["int4"], progress=False, metrics=["*_loss"]).stress.keys() == {
        "rows",
        "scores",
    }
    shutil.rmtree(before)
    assert "codes" not in measured().stress
    llama(0, hidden_size=64).save_pretrained(before)  # another model of the same name
    result = measured()
    assert "codes" not in result.stress
    assert any("codes were not compared with" in note for note in result.notes)
    with pytest.raises(InputError, match=r"has shape \[.*\], the model's has"):
        measured(against=before)


def test_against_is_refused_where_it_has_no_meaning(job: Job, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name what to measure with stress too"):
        evaluate(job.model, forget=job.forget, against=job.base)
    with pytest.raises(InputError, match="the model is one in memory"):
        own(llama(1), tmp_path, stress=["int8"], against=job.base)
    with pytest.raises(InputError, match="no such directory"):
        evaluate(job.model, forget=job.forget, against=tmp_path / "none", stress=["int8"])
    with pytest.raises(InputError, match="holds neither"):
        evaluate(job.model, forget=job.forget, against=tmp_path, stress=["int8"])


def test_the_command_prints_a_table(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", job.model, "--forget", job.forget, "--retain", job.retain, "--metrics", "forget_loss"]
    status = cli.main(["eval", *map(str, given), "--stress", "int8, int4,relearn=2", "--out", str(tmp_path / "r.json")])
    assert status == 0
    printed = capsys.readouterr().out
    heads = [line for line in printed.splitlines() if line.startswith("under stress")]
    assert heads == [
        "under stress: forget, 5 rows",
        "under stress: forget without those relearned, 4 rows",
        "under stress: retain, 7 rows",
    ]
    assert [line.split()[0] for line in printed.splitlines()[2:6]] == ["loss", "before", "int8", "int4"]
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored["settings"]["stress"] == ["int8", "int4", "relearn=2"]
    assert f"{stored['stress']['scores']['int4']['forget']['loss']:.4g}" in printed
    assert cli.main(["eval", *map(str, given), "--stress", "int5"]) == 2
    assert "stress: 'int5' is none" in capsys.readouterr().err
    assert cli.main(["eval", *map(str, given), "--stress", ""]) == 2


def test_results_without_stress_are_as_before(job: Job, tmp_path: Path) -> None:
    result = evaluate(job.model, forget=job.forget, metrics=["forget_loss"], progress=False)
    assert result.stress == {} and not {"stress", "against"} & result.settings.keys()
    assert "stress" not in result.summary()
