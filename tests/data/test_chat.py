"""A fixed system prompt and date, against what the same template makes of them as its own arguments.

The templates are small ones that ask for the date as the templates of real models do.
"""

import datetime
import itertools
from pathlib import Path
from typing import Any

import pytest

from perta_fast import cli
from perta_fast.data import chat
from perta_fast.data.chat import ChatSettings, Told, parse_date, told
from perta_fast.data.rows import Row
from perta_fast.data.samples import encode
from perta_fast.errors import InputError
from perta_fast.runs.evaluate import evaluate
from tests.support.models import CHAT_TEMPLATE, FORGET, llama, tokenizer, write_lines

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
DAY = datetime.date(2025, 4, 1)  # a date in the past, on the first of a month
REST = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def with_chat_settings(given: Any, system_prompt: str | None, date: str | None, day: Any = None) -> Any:
    return ChatSettings.of(system_prompt, date, day).given_to(given)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_clock", lambda: datetime.datetime.combine(DAY, datetime.time(23, 59)))


@pytest.mark.parametrize(
    ("system", "date"), [*itertools.product((None, *TEXTS), (None, "10 Apr 2025", "April 10, 2025"))]
)
def test_as_if_given_with_every_question(system: str | None, date: str | None) -> None:
    plain = tokenizer(TEMPLATE)
    before = [] if system is None else [{"role": "system", "content": system}]
    arguments = {"date_string": "01 Apr 2025" if date is None else date}
    expected = plain.apply_chat_template(before + TURNS, return_dict=False, **arguments)
    found = encode([Row({"question": "Who?", "answer": "Me."}, "here")], with_chat_settings(plain, system, date), 512)
    assert list(found[0].input_ids) == list(expected)
    assert plain.chat_template == TEMPLATE


# Each way of asking for a date, and what the template then says: on 1 April 2025, with 10 Apr 2025, and what is noted.
ASKING = {
    "gpt-oss": ("{{ strftime_now('%Y-%m-%d') }}", "2025-04-01", "2025-04-10", "2025-04-01"),
    "Granite": ("{% if true %}{{ strftime_now('%B %d, %Y') }}{% endif %}", "April 01, 2025", "April 10, 2025", None),
    "SmolLM3": ("{%- set today = strftime_now('%d %B %Y') -%}{{ today }}", "01 April 2025", "10 April 2025", None),
    "a macro": (
        "{%- macro day() -%}{{ strftime_now('%d %b %Y') }}{%- endmacro -%}{{ day() }}",
        "01 Apr 2025",
        "10 Apr 2025",
        None,
    ),
    "if there is a clock": (
        "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}",
        "2025",
        "2025",
        "2025-04-01",
    ),
    "in pieces, as Mistral's yesterday": (
        "{%- set day = strftime_now('%d')|int -%}{{ strftime_now('%Y-%m-') ~ '%02d' % (day - 1 if day > 1 else 31) }}",
        "2025-04-31",
        "2025-04-09",
        "2025-04-01",
    ),
    "by name": ("{{ strftime_now(format='%d %B %Y') }}", "01 April 2025", "10 April 2025", None),
    "under another name": (
        "{%- set today = strftime_now -%}{{ today('%b %d, %Y') }}",
        "Apr 01, 2025",
        "Apr 10, 2025",
        None,
    ),
    "a time": ("{{ strftime_now('%Y-%m-%d %H:%M') }}", "2025-04-01 00:00", "2025-04-10 00:00", "2025-04-01"),
    "a loop": ("{% for k in [1, 2] %}{{ strftime_now('%d') }}{% endfor %}", "0101", "1010", "2025-04-01"),
    "a fixed date, as Llama-3.1's": ("{{ date_string|default('26 Jul 2024') }}", "26 Jul 2024", "10 Apr 2025", ""),
    "another variable, as Apertus's": ("{{ current_date|default('2025-11-06') }}", "2025-11-06", "2025-04-10", ""),
    "a variable or else the clock": (
        "{% if current_date %}{{ current_date }}{% else %}{{ strftime_now('%Y-%m-%d') }}{% endif %}",
        "2025-04-01",
        "2025-04-10",
        None,
    ),
    "no date": ("none", "none", "none", ""),
}


@pytest.mark.parametrize(("start", "now", "given", "noted"), ASKING.values(), ids=ASKING)
def test_every_way_of_asking_for_a_date(start: str, now: str, given: str, noted: str | None) -> None:
    plain = tokenizer(start + "|" + REST)
    own = plain.apply_chat_template(TURNS, tokenize=False)
    by_clock, by_hand = with_chat_settings(plain, None, None), with_chat_settings(plain, None, "10 Apr 2025")
    assert by_clock.apply_chat_template(TURNS, tokenize=False) == now + "|user: Who?<eos>assistant: Me.<eos>"
    assert by_hand.apply_chat_template(TURNS, tokenize=False) == given + "|user: Who?<eos>assistant: Me.<eos>"
    assert told(by_clock) == Told(True, None, None, (now if noted is None else noted) or None)
    assert told(by_hand) == (Told(True) if start == "none" else Told(True, None, "10 Apr 2025", "10 Apr 2025"))
    assert told(plain) == Told()
    assert plain.apply_chat_template(TURNS, tokenize=False) == own  # by the clock of the system, as before


def test_what_is_noted_of_a_clock_can_be_given() -> None:
    plain = tokenizer(TEMPLATE)
    first = with_chat_settings(plain, None, None)
    text = first.apply_chat_template(TURNS, tokenize=False)
    again = with_chat_settings(plain, None, told(first).date, datetime.date(2030, 1, 1))
    assert again.apply_chat_template(TURNS, tokenize=False) == text


def test_a_date_is_noted_only_once_it_is_asked_for() -> None:
    only_at_first = "{% if messages[0].role != 'system' %}{{ strftime_now('%d %b %Y') }}{% endif %}" + REST
    changed = with_chat_settings(tokenizer(only_at_first), None, None)
    assert told(changed) == Told()
    changed.apply_chat_template([{"role": "system", "content": "Own."}, *TURNS], tokenize=False)
    assert told(changed) == Told(chat_template=True)
    changed.apply_chat_template(TURNS, tokenize=False)
    assert told(changed) == Told(True, None, None, "01 Apr 2025")


def test_a_template_that_fails_has_its_own_clock_afterwards() -> None:
    plain = tokenizer(
        "{% if messages[0].content == '!' %}{{ raise_exception('no') }}{% endif %}{{ strftime_now('%Y') }}"
    )
    changed = with_chat_settings(plain, None, "1999-12-31")
    with pytest.raises(Exception, match="no"):
        changed.apply_chat_template([{"role": "user", "content": "!"}], tokenize=False)
    assert plain.apply_chat_template(TURNS, tokenize=False) != "1999"
    assert changed.apply_chat_template(TURNS, tokenize=False) == "1999"


def test_all_arguments_of_the_tokenizer_itself() -> None:
    template = "{{ strftime_now('%Y') }}{{ tools|length if tools else 0 }}" + REST.replace(
        "{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"
    )
    plain = tokenizer(template)
    changed = with_chat_settings(plain, "Be.", None)
    prompted = [{"role": "system", "content": "Be."}, *TURNS]
    tools = [{"type": "function", "function": {"name": "look"}}]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("transformers.utils.chat_template_utils.datetime", datetime_of(DAY))
        settings = {"tools": tools, "return_dict": True, "return_assistant_tokens_mask": True}
        expected = plain.apply_chat_template(prompted, **settings)
        texts = plain.apply_chat_template([prompted, prompted], tokenize=False)
        other = plain.apply_chat_template(prompted, chat_template="{{ strftime_now('%m') }}", tokenize=False)
    assert dict(changed.apply_chat_template(TURNS, **settings)) == dict(expected)
    assert sum(expected["assistant_masks"]) > 0
    assert changed.apply_chat_template([TURNS, TURNS], tokenize=False) == texts
    assert changed.apply_chat_template(TURNS, None, None, "{{ strftime_now('%m') }}", tokenize=False) == other == "04"


def datetime_of(day: datetime.date) -> type[datetime.datetime]:
    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Fixed":
            return cls(day.year, day.month, day.day)

    return Fixed


def test_named_templates() -> None:
    several = tokenizer()
    several.chat_template = {"default": TEMPLATE, "tool_use": "tools: {{ strftime_now('%d') }}" + TEMPLATE}
    changed = with_chat_settings(several, "Be brief.", None)
    plain = tokenizer(TEMPLATE)
    prompted = [{"role": "system", "content": "Be brief."}, *TURNS]
    expected = plain.apply_chat_template(prompted, tokenize=False, date_string="01 Apr 2025")
    assert changed.apply_chat_template(TURNS, tokenize=False) == expected
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert changed.apply_chat_template(TURNS, tools=tools, tokenize=False) == "tools: 01" + expected
    assert changed.apply_chat_template(TURNS, chat_template="tool_use", tokenize=False) == "tools: 01" + expected
    row = Row({"question": "Who?", "answer": "Me."}, "here")
    assert encode([row], changed, 512)[0].input_ids == tuple(several(expected, add_special_tokens=False)["input_ids"])
    assert isinstance(several.chat_template, dict)


def test_named_templates_without_a_default() -> None:
    several = tokenizer()
    several.chat_template = {"rag": TEMPLATE}
    changed = with_chat_settings(several, "Be brief.", "10 Apr 2025")
    with pytest.raises(InputError, match="no default"):
        encode([Row({"question": "Who?", "answer": "Me."}, "here")], changed, 512)


def test_settings_replace_earlier_ones() -> None:
    plain = tokenizer(TEMPLATE)
    changed = with_chat_settings(with_chat_settings(plain, "First.", "2020-01-01"), None, "10 Apr 2025")
    expected = plain.apply_chat_template(TURNS, tokenize=False, date_string="10 Apr 2025")
    assert changed.apply_chat_template(TURNS, tokenize=False) == expected


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_prompt_of_ones_own_stays(role: str) -> None:
    plain, own = tokenizer(REST), [{"role": role, "content": "Own."}, *TURNS]
    changed = with_chat_settings(plain, "Other.", None)
    assert changed.apply_chat_template(own, tokenize=False) == plain.apply_chat_template(own, tokenize=False)


def test_a_system_prompt_before_no_message() -> None:
    changed = with_chat_settings(tokenizer(REST), "Other.", None)
    assert changed.apply_chat_template([], tokenize=False) == "system: Other.<eos>"


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + REST
DROPPING = "{% for m in messages if m.role != 'system' %}{{ m.content }}<eos>{% endfor %}"
DEFAULT = "{% if messages[0].role != 'system' %}system: Be kind.<eos>{% endif %}" + REST  # as Qwen2.5's


def test_a_system_prompt_that_the_template_does_not_take() -> None:
    with pytest.raises(InputError, match=r"takes none \(System role not supported\); leave it out, or begin"):
        with_chat_settings(tokenizer(REFUSING), "Be kind.", None)
    with pytest.raises(InputError, match="leaves it out of what the model reads"):
        with_chat_settings(tokenizer(DROPPING), "Be kind.", None)
    for template in (REFUSING, DROPPING):
        with_chat_settings(tokenizer(template), None, "2025-04-10")
    # Not mistaken for one that drops it: the same prompt as the template's own, and an empty one in its place.
    assert with_chat_settings(tokenizer(DEFAULT), "Be kind.", None)
    emptied = with_chat_settings(tokenizer(DEFAULT), "", None)
    assert emptied.apply_chat_template(TURNS[:1], tokenize=False) == "system: <eos>user: Who?<eos>"
    assert told(emptied).system_prompt == ""


@pytest.mark.parametrize(
    "text", ["2025-04-10", "10 Apr 2025", "10 April 2025", "April 10, 2025", "Apr 10, 2025", " 10 apr 2025 "]
)
def test_forms_of_a_date(text: str) -> None:
    assert parse_date(text) == datetime.date(2025, 4, 10)


@pytest.mark.parametrize("text", ["", "x", "today", "2025-13-01", "31 Feb 2025", "10/04/2025", "2025", None])
def test_what_is_no_date(text: str) -> None:
    with pytest.raises(InputError, match="forms 2025-04-10, 10 Apr 2025, 10 April 2025, April 10, 2025"):
        parse_date(text)


@pytest.mark.parametrize("text", ["\udcff", 5])
def test_what_is_no_system_prompt(text: str) -> None:
    with pytest.raises(InputError, match="no text that a tokenizer can read"):
        with_chat_settings(tokenizer(CHAT_TEMPLATE), text, None)


@pytest.mark.slow
def test_an_evaluation_asks_with_them(tmp_path: Path, one_thread: None) -> None:
    write_lines(tmp_path / "forget.jsonl", FORGET)
    model, words = llama(), tokenizer(TEMPLATE)

    def loss(date: str | None, told: str) -> float:
        found = evaluate(
            model, forget=tmp_path / "forget.jsonl", tokenizer=words, max_new_tokens=1, date_string=date, progress=False
        )
        assert (found.settings["date_string"], found.settings["date"]) == (date, told)
        return found.metrics["forget_Q_A_Prob"].value

    assert (
        loss("10 Apr 2025", "10 Apr 2025") == loss("10 Apr 2025", "10 Apr 2025") != loss("11 Apr 2025", "11 Apr 2025")
    )
    assert loss(None, "01 Apr 2025") == loss("01 Apr 2025", "01 Apr 2025")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--forget", "forget.jsonl", "--date-string", "x"], "--date-string is 'x'; write a date in one of the forms"),
        (
            ["--forget", "forget.jsonl", "--date-string", "10 Apr 2025"],
            "--date-string: the tokenizer has no chat template",
        ),
        (["--forget", "forget.jsonl", "--system-prompt", "x"], "--system-prompt: the tokenizer has no chat"),
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
