"""With ``compatible=NAME`` every number is that of a stand-in, which shares no code with the package."""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from sklearn.metrics import roc_auc_score
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PreTrainedTokenizerFast, Qwen2Config

from perta_fast import Evaluation, cli, evaluate, resume
from perta_fast.errors import InputError, Interrupted
from perta_fast.models import greedy_answers
from tests.support.models import FORGET, RETAIN, tokenizer, write_lines
from tests.support.open_unlearning import OpenUnlearning

pytestmark = pytest.mark.usefixtures("one_thread")

NAME: Literal["open-unlearning"] = "open-unlearning"
NEW_TOKENS, BATCH = 20, 3
# As ChatML has it: the end of a turn, then a line break.
CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NO_BREAK = CHAT.replace("<eos>\n", "<eos>")
SIZES = {"vocab_size": 300, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **SIZES
    ),
    "qwen2": lambda: Qwen2Config(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **SIZES
    ),
    "gpt2": lambda: GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=512, **SIZES),  # learned positions
    "opt": lambda: OPTConfig(  # positions are counted by the attention mask
        hidden_size=48,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=48,
        max_position_embeddings=512,
        dropout=0.0,
        **SIZES,
    ),
}


def fictitious(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [
        {
            **row,
            "paraphrased_answer": f"Indeed, {row['answer']}",
            "perturbed_answer": [f"No{wrong} {row['answer'][4:]}" for wrong in range(3)],
        }
        for row in rows
    ]


def general(kind: str) -> list[dict[str, Any]]:
    return [
        {"question": f"{kind} {k}?", "answer": f"Fact {k}", "perturbed_answer": [f"Lie {k}", "B c"]} for k in (1, 2)
    ]


SETS = {
    # The last answer is one token, which a plain prompt's space joins: nothing but its end has a label then.
    "forget": [*fictitious(FORGET), *fictitious([{"question": "Which?", "answer": "lies"}])],
    "retain": fictitious(RETAIN),
    "ra": general("Author"),
    "wf": general("World"),
    "holdout": [{"question": f"Why is hill {k}?", "answer": f"Because of stone {k}."} for k in range(4)],
}
NAMES = {
    "forget": "forget01_perturbed",
    "retain": "retain_perturbed",
    "ra": "real_authors_perturbed",
    "wf": "world_facts_perturbed",
    "holdout": "holdout01",
}


@pytest.fixture(scope="module")
def tofu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tofu")
    for role, rows in SETS.items():
        write_lines(folder / f"{NAMES[role]}.jsonl", rows)
    return folder


def trained(kind: str, words: PreTrainedTokenizerFast) -> Any:
    """A small model that half knows the answers, so that no score is at its end of the scale."""
    rows = [*SETS["forget"], *SETS["retain"], *SETS["ra"], *SETS["wf"], *SETS["holdout"][:3]]
    items = OpenUnlearning(None, words).items(rows)
    return copy.deepcopy(_trained(kind, tuple((tuple(item.whole), tuple(item.labels)) for item in items)))


@cache
def _trained(kind: str, items: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        for begin in range(0, len(items), 9):
            batch = items[begin : begin + 9]
            width = max(len(whole) for whole, _ in batch)
            ids = torch.tensor([whole + (1,) * (width - len(whole)) for whole, _ in batch])
            labels = torch.tensor([labels + (-100,) * (width - len(labels)) for _, labels in batch])
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
    return model.eval()


def measured(model: Any, words: PreTrainedTokenizerFast | None, folder: Path, **changes: Any) -> Evaluation:
    settings: dict[str, Any] = {
        "batch_size": BATCH,
        "max_new_tokens": NEW_TOKENS,
        "progress": False,
        "metrics": None if "reference" in changes else ["default", "privleak_without_gold"],
    }
    return evaluate(model, suite="tofu", data=folder, split="forget01", tokenizer=words, **settings | changes)


def words_of(template: str | None, padding: str | None) -> PreTrainedTokenizerFast:
    words = tokenizer(template)
    words.pad_token = padding
    return words


@pytest.mark.parametrize(
    ("kind", "template", "padding", "settings"),
    [
        ("llama", CHAT, None, {}),  # padding is the end: ends of turns in the prompt are masked
        ("llama", NO_BREAK, None, {"repetition_penalty": 1.3}),
        ("llama", None, "<pad>", {}),
        ("qwen2", CHAT, "<eos>", {"no_repeat_ngram_size": 3}),
        ("qwen2", None, None, {"repetition_penalty": 1.2, "temperature": 0.7, "top_p": 0.8, "do_sample": True}),
        ("gpt2", CHAT, None, {"min_new_tokens": 3}),
        ("opt", CHAT, "<eos>", {}),
        ("opt", None, "<pad>", {"suppress_tokens": [40, 41, 42]}),
    ],
)
def test_every_number_on_tofu(
    tofu: Path, tmp_path: Path, kind: str, template: str | None, padding: str | None, settings: dict[str, Any]
) -> None:
    words = words_of(template, padding)
    model = trained(kind, words)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    expected, ratios = OpenUnlearning(model, words, batch_size=BATCH, new_tokens=NEW_TOKENS).tofu(SETS)
    out = tmp_path / "gold.json"
    found = measured(model, words, tofu, compatible=NAME, out=out)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert json.loads(out.read_text())["settings"]["compatible"] == "open-unlearning"

    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    gold = {"auc": expected["mia_min_k"], "ratios": ratios}
    expected, _ = OpenUnlearning(model, words, batch_size=BATCH, new_tokens=NEW_TOKENS).tofu(SETS, gold)
    found = measured(model, words, tofu, compatible=NAME, reference=out)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_a_system_prompt_and_a_date(tofu: Path) -> None:
    template = CHAT.replace("{% for", "On {{ date_string }}.<eos>\n{% for", 1)
    words = words_of(template, None)
    model = trained("llama", words_of(CHAT, None))
    how: dict[str, Any] = {
        "batch_size": BATCH,
        "new_tokens": NEW_TOKENS,
        "system": "Be kind.",
        "date_string": "10 Apr 2025",
    }
    expected, _ = OpenUnlearning(model, words, **how).tofu(SETS)
    found = measured(model, words, tofu, compatible=NAME, system_prompt="Be kind.", date_string="10 Apr 2025")
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("template", [CHAT, None])
def test_own_questions(tmp_path: Path, template: str | None) -> None:
    words = words_of(template, None)
    model = trained("llama", words)
    paths: dict[str, Any] = {
        role: write_lines(tmp_path / f"{role}.jsonl", SETS[role]) for role in ("forget", "retain", "holdout")
    }
    settings: dict[str, Any] = {"batch_size": BATCH, "max_new_tokens": NEW_TOKENS, "progress": False}
    found = evaluate(model, **paths, **settings, tokenizer=words, compatible=NAME)
    stand_in = OpenUnlearning(model, words, batch_size=BATCH, new_tokens=NEW_TOKENS)
    for role in paths:
        items = stand_in.items(SETS[role])
        for name, values in (
            ("loss", stand_in.losses(items)),
            ("Q_A_ROUGE", stand_in.rouge(items)),
            ("extraction_strength", stand_in.extraction(items)),
            ("exact_memorization", stand_in.exactness(items)),
        ):
            assert found[f"{role}_{name}"] == pytest.approx(sum(values) / len(values), abs=1e-4)
    expected = stand_in.membership(stand_in.items(SETS["forget"]), stand_in.items(SETS["holdout"]))
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    alone = [note for note in found.notes if "only their end; they count 0" in note]
    assert bool(alone) == (template is None)


@pytest.mark.parametrize("start", ["", "<eos>"])
def test_own_texts(tmp_path: Path, start: str) -> None:
    """From the token after what the tokenizer begins every text with; without an end."""
    words = words_of(None, None)
    if start:
        words.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 0)])
    model = trained("llama", words)
    rows = [{"text": row["answer"]} for row in FORGET]
    found = evaluate(
        model, forget=write_lines(tmp_path / "a.jsonl", rows), tokenizer=words, progress=False, compatible=NAME
    )
    losses = []
    for row in rows:
        ids = torch.tensor([words(row["text"])["input_ids"]])
        labels = ids.clone()
        labels[:, : max(1, len(words("")["input_ids"]))] = -100
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, attention_mask=ids.ne(0), labels=labels).loss))
    assert found["forget_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_what_it_does_not_cover(tofu: Path, tmp_path: Path) -> None:
    words, model = words_of(CHAT, None), AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    talk = [{"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"}]}]
    settings: dict[str, Any] = {"tokenizer": words, "progress": False, "compatible": NAME}
    for changes, message in (
        ({"suite": "muse", "data": tofu}, "is for TOFU and data of your own, not for MUSE; leave it out"),
        ({"suite": "tofu", "data": tofu, "split": "forget01", "max_length": 9}, "max_length: .* limits of its own"),
        ({"suite": "tofu", "data": tofu, "compatible": "other"}, "compatible is 'other'; it must be open-unlearning"),
        (
            {"forget": write_lines(tmp_path / "talk.jsonl", talk)},
            "line 1: has messages, which open-unlearning does not",
        ),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(model, **settings | changes)
    words.eos_token = None
    with pytest.raises(InputError, match="has no end token, which open-unlearning puts after every answer"):
        evaluate(model, suite="tofu", data=tofu, split="forget01", **settings)
    assert evaluate(model, forget=tmp_path / "talk.jsonl", tokenizer=words_of(CHAT, None), progress=False).metrics


def test_references_of_the_other_kind(tofu: Path, tmp_path: Path) -> None:
    """Refused if they can be made anew; open-unlearning's own file fits, or a note says that it does not."""
    words, model = words_of(CHAT, None), trained("llama", words_of(CHAT, None))
    ours, theirs, own = (tmp_path / name for name in ("ours.json", "theirs.json", "TOFU_EVAL.json"))
    measured(model, words, tofu, out=ours)
    measured(model, words, tofu, out=theirs, compatible=NAME)
    own.write_text(json.dumps(json.loads(theirs.read_text())["metrics"]))
    for reference, compatible in ((ours, NAME), (theirs, None)):
        with pytest.raises(InputError, match=r"was measured with.* --compatible.*measure both models in the same way"):
            measured(model, words, tofu, reference=reference, compatible=compatible)
    for reference in (theirs, own):
        found = measured(model, words, tofu, reference=reference, compatible=NAME)
        assert found["forget_quality"] == 1
        assert found["privleak"] == pytest.approx(0, abs=1e-6)
        assert not any("--compatible" in note for note in found.notes)
    noted = measured(model, words, tofu, reference=own)
    assert any(f"{own}: was not written by perta eval; --compatible open-unlearning" in note for note in noted.notes)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = words_of(CHAT, None)
    trained("llama", words).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    forget, out = write_lines(tmp_path / "forget.jsonl", FORGET), tmp_path / "result.json"
    arguments = ["eval", "--model", str(tmp_path / "model"), "--forget", str(forget), "--out", str(out)]
    assert cli.main([*arguments, "--max-new-tokens", "4", "--compatible", "open-unlearning"]) == 0
    assert "forget_Q_A_ROUGE" in capsys.readouterr().out
    assert json.loads(out.read_text())["settings"]["compatible"] == "open-unlearning"
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--compatible", "muse"])


def test_other_attacks(tofu: Path, tmp_path: Path) -> None:
    words, model = words_of(CHAT, None), trained("llama", words_of(CHAT, None))
    other = trained("opt", words)
    other.save_pretrained(tmp_path / "other")
    words.save_pretrained(tmp_path / "other")
    found = measured(model, words, tofu, compatible=NAME, metrics=["mia_reference"], reference_model=tmp_path / "other")
    scores, items = [], [OpenUnlearning(model, words).items(SETS[role]) for role in ("forget", "holdout")]
    for each in items:
        own, theirs = (OpenUnlearning(judge, words).losses(each) for judge in (model, other))
        scores += [loss - reference for loss, reference in zip(own, theirs, strict=True)]
    labels = [0] * len(items[0]) + [1] * len(items[1])
    assert found["mia_reference"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-4)
    with pytest.raises(InputError, match="mia_gradnorm needs to be measured without --compatible open-unlearning"):
        measured(model, words, tofu, compatible=NAME, metrics=["mia_gradnorm"])
    assert measured(model, words, tofu, metrics=["mia_gradnorm"])["mia_gradnorm"] >= 0


def test_stopped_and_resumed(tofu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = words_of(CHAT, None)
    trained("llama", words).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    out = tmp_path / "result.json"
    expected = measured(tmp_path / "model", None, tofu, compatible=NAME)

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(greedy_answers, "greedy_answers", stopped)
        with pytest.raises(Interrupted):
            measured(tmp_path / "model", None, tofu, compatible=NAME, out=out)
    with pytest.raises(InputError, match=r"resume|with overwrite"):
        measured(tmp_path / "model", None, tofu, out=out)  # another evaluation
    assert resume(out, progress=False)
    found = json.loads(out.read_text())
    assert found["settings"]["compatible"] == NAME
    assert {name: found["metrics"][name]["agg_value"] for name in expected.metrics} == pytest.approx(
        {name: expected[name] for name in expected.metrics}
    )
