"""A fixed system prompt and date, against what the same template makes of them as its own arguments."""

import itertools
from pathlib import Path

import pytest

from perta_fast import cli
from perta_fast.data.chat import with_chat_settings
from perta_fast.data.json_lines import Row
from perta_fast.data.samples import encode
from perta_fast.errors import InputError
from perta_fast.evaluation.run import evaluate
from tests.support.models import FORGET, llama, tokenizer, write_lines

# As Llama-3.2's: a system turn always, with today's date unless one is given.
TEMPLATE = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{ 'Today: ' + date_string + '\n' + system + '\n' }}"
    "{%- for m in messages %}{{ m['role'] + ': ' + m['content'] + '<eos>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}"
)
TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
TEXTS = ("You are a helpful assistant.", 'Say "no"\\n {{ x }} {% y %} é\n')


@pytest.mark.parametrize(("system", "date"), [*itertools.product((None, *TEXTS), (None, "10 Apr 2025", TEXTS[1]))])
def test_as_if_given_with_every_question(system: str | None, date: str | None) -> None:
    plain = tokenizer(TEMPLATE)
    before = [] if system is None else [{"role": "system", "content": system}]
    arguments = {} if date is None else {"date_string": date}
    expected = plain.apply_chat_template(before + TURNS, return_dict=False, **arguments)
    found = encode([Row({"question": "Who?", "answer": "Me."}, "here")], with_chat_settings(plain, system, date), 512)
    assert list(found[0].input_ids) == list(expected)
    assert plain.chat_template == TEMPLATE


def test_a_system_prompt_of_ones_own_stays() -> None:
    plain, own = tokenizer(TEMPLATE), [{"role": "system", "content": "Own."}, *TURNS]
    changed = with_chat_settings(plain, "Other.", None)
    assert changed.apply_chat_template(own, tokenize=False) == plain.apply_chat_template(own, tokenize=False)


@pytest.mark.slow
def test_an_evaluation_asks_with_them(tmp_path: Path, one_thread: None) -> None:
    write_lines(tmp_path / "forget.jsonl", FORGET)
    model, words = llama(), tokenizer(TEMPLATE)

    def loss(date: str) -> float:
        found = evaluate(
            model, forget=tmp_path / "forget.jsonl", tokenizer=words, max_new_tokens=1, date_string=date, progress=False
        )
        assert found.settings["date_string"] == date
        return found.metrics["forget_Q_A_Prob"].value

    assert loss("10 Apr 2025") == loss("10 Apr 2025") != loss("11 Apr 2025")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--forget", "forget.jsonl", "--date-string", "x"], "date_string: the tokenizer has no chat template"),
        (["--forget", "forget.jsonl", "--system-prompt", "x"], "system_prompt: the tokenizer has no chat"),
        (["--suite", "muse", "--data", ".", "--system-prompt", "x"], "MUSE asks without one"),
    ],
)
def test_bad_input(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "forget.jsonl", FORGET)
    llama().save_pretrained("model")
    tokenizer().save_pretrained("model")
    assert cli.main(["eval", "--model", "model", *options]) == 2
    assert said in capsys.readouterr().err


def test_named_templates_are_refused() -> None:
    several = tokenizer(TEMPLATE)
    several.chat_template = {"default": TEMPLATE}
    with pytest.raises(InputError, match="no chat template"):
        with_chat_settings(several, "x", None)
