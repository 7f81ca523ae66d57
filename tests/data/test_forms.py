"""Records to rows: every form, names given by the caller, two forms at once, weights, tools, null fields."""

from typing import Any

import pytest

from perta_fast import InputError
from perta_fast.data.forms import fields_from, fields_text
from perta_fast.data.rows import rows_from

ASK, SAY = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
TALK = [ASK, SAY]
SHARED = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
QUESTION = {"question": "Who?", "answer": "Me."}

# The record, its content, and what is said of it.
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "question": (QUESTION | {"id": 3}, QUESTION, ""),
    "text": ({"text": "Me."}, {"text": "Me."}, ""),
    "messages": ({"messages": TALK}, {"messages": TALK}, ""),
    "prompt, completion": (
        {"prompt": "Who?", "completion": "Me."}, QUESTION, "prompt as question, completion as answer",
    ),
    "prompt, response": ({"prompt": "Who?", "response": "Me."}, QUESTION, "prompt as question, response as answer"),
    "Alpaca": (
        {"instruction": "Say", "input": "who.", "output": "Me."},
        {"question": "Say\n\nwho.", "answer": "Me."},
        "instruction and input as question, output as answer",
    ),
    "Alpaca with no input": (
        {"instruction": "Who?", "input": "", "output": "Me."},
        QUESTION,
        "instruction and input as question, output as answer",
    ),
    "Alpaca without input": (
        {"instruction": "Who?", "output": "Me."}, QUESTION, "instruction and input as question, output as answer",
    ),
    "lists of TRL": (
        {"prompt": [ASK], "completion": [SAY]},
        {"messages": [ASK | {"weight": 0}, SAY]},
        "prompt and completion as messages",
    ),
    "a conversation goes before": (
        {"prompt": [ASK, SAY, ASK], "completion": "Me."},
        {"messages": [message | {"weight": 0} for message in (ASK, SAY, ASK)] + [SAY]},
        "prompt and completion as messages",
    ),
    "ShareGPT": ({"conversations": SHARED}, {"messages": TALK}, "conversations as messages"),
    "ShareGPT with a system field": (
        {"conversations": SHARED, "system": "Be brief."},
        {"messages": [{"role": "system", "content": "Be brief."}, *TALK]},
        "system and conversations as messages",
    ),
    "conversations with roles": ({"conversations": TALK}, {"messages": TALK}, "conversations as messages"),
    "messages in ShareGPT's words": ({"messages": SHARED}, {"messages": TALK}, ""),
    "ShareGPT in columns": (
        {"conversations": {"from": ["human", "gpt"], "value": ["Who?", "Me."]}},
        {"messages": TALK},
        "conversations as messages",
    ),
    "JSON in a text": (
        {"messages": '[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]'},
        {"messages": TALK},
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FORMS)
def test_every_form(case: str) -> None:
    record, content, read_as = FORMS[case]
    (row,) = rows_from([record])
    assert row.content == content
    assert row.read_as == read_as


@pytest.mark.parametrize("case", FORMS)
def test_fields_that_are_null_are_as_if_absent(case: str) -> None:
    record, content, _ = FORMS[case]
    others = dict.fromkeys(["question", "answer", "text", "messages", "prompt", "completion", "conversations", "tools"])
    assert rows_from([others | record])[0].content == content
    assert rows_from([record | {"text": record.get("text", "")}])[0].content == content  # empty is as good as null


SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function": "tool",
}  # fmt: skip


@pytest.mark.parametrize("speaker", SPEAKERS)
def test_speakers_of_sharegpt(speaker: str) -> None:
    said = {"from": speaker, "value": "x", "weight": 1}
    (row,) = rows_from([{"conversations": [*SHARED, said, *SHARED]}])
    assert row.content["messages"][2] == {"role": SPEAKERS[speaker], "content": "x", "weight": 1}


def test_names_of_fields() -> None:
    rows = [{"title": "Who?", "body": "Me.", "text": "none of this", "notes": None}]
    fields = {"question": "title", "answer": "body"}
    (row,) = rows_from(rows, fields)
    assert (row.content, row.read_as) == (QUESTION, "title as question, body as answer")
    assert rows_from(rows, {"text": "body"})[0].content == {"text": "Me."}
    assert rows_from(rows, {"text": "text"})[0] == rows_from([{"text": "none of this"}])[0]
    (row,) = rows_from([{"q": "Who?", "more": "Now?", "answer": "Me."}], {"question": "q+more"})  # answer is itself
    assert (row.content["question"], row.content["answer"]) == ("Who?\n\nNow?", "Me.")
    assert rows_from([{"a+b": "Me."}], {"text": "a+b"})[0].content == {"text": "Me."}
    assert rows_from([{"turns": SHARED}], {"messages": "turns"})[0].content == {"messages": TALK}


def test_tools_are_kept() -> None:
    assert rows_from([{"messages": TALK, "tools": [TOOL]}])[0].content == {"messages": TALK, "tools": [TOOL]}
    assert rows_from([{"messages": TALK, "tools": "[]"}])[0].content == {"messages": TALK}
    (row,) = rows_from([{"conversations": SHARED, "functions": [TOOL]}], {"tools": "functions"})
    assert row.content == {"messages": TALK, "tools": [TOOL]}
    assert row.read_as == "conversations as messages, functions as tools"
    (row,) = rows_from([QUESTION | {"tools": [TOOL]}], {"tools": "tools"})  # a question with tools is a conversation
    assert row.content == {"messages": TALK, "tools": [TOOL]}
    assert rows_from([QUESTION | {"tools": "a hammer"}])[0].content == QUESTION  # another key of the row


def test_messages_keep_their_other_keys() -> None:
    thought = SAY | {"reasoning_content": "Hm.", "weight": 1, "name": "a"}
    assert rows_from([{"messages": [ASK, thought]}])[0].content["messages"] == [ASK, thought]
    dumped = SAY | {"tool_calls": None, "refusal": None}  # templates ask whether there are tool_calls
    assert rows_from([{"messages": [ASK, dumped]}])[0].content["messages"] == TALK


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_a_call_of_a_tool_needs_no_content(content: dict[str, Any]) -> None:
    call = {"role": "assistant", "tool_calls": CALL["tool_calls"]} | content
    answer = {"role": "tool", "content": "1"}
    assert rows_from([{"messages": [ASK, call, answer, SAY]}])[0].content["messages"] == [ASK, call, answer, SAY]
    assert rows_from([{"messages": [ASK, call]}])[0].content["messages"][-1] == call


def test_weights() -> None:
    unlearned = SAY | {"weight": 0}
    assert rows_from([{"messages": [ASK, unlearned, *TALK]}])[0].content["messages"][1] == unlearned
    assert rows_from([{"messages": [ASK, SAY | {"weight": 1.0}]}])  # Arrow has all weights in one type


MESSAGES_BAD: dict[str, tuple[list[Any], str]] = {
    "weight 2": ([ASK, SAY | {"weight": 2}], '"weight" of a message is 2; it must be 0 or 1'),
    "weight a half": ([ASK, SAY | {"weight": 0.5}], '"weight" of a message is 0.5'),
    "weight true": ([ASK, SAY | {"weight": True}], '"weight" of a message is True'),
    "weight a text": ([ASK | {"weight": "0"}, SAY], "\"weight\" of a message is '0'"),
    "nothing to learn": ([ASK, SAY | {"weight": 0}], 'all that the assistant says has "weight" 0'),
    "no content": ([ASK, {"role": "assistant", "content": None}], 'a "content" that is text'),
    "no calls": ([ASK, CALL | {"tool_calls": []}], 'a "content" that is text'),
    "a user without content": ([{"role": "user", "content": None}, SAY], 'a "content" that is text'),
    "unknown speaker": ([{"from": "narrator", "value": "x"}, SAY], "a message is \"from\" 'narrator'; it must be from"),
    "half a character": ([ASK, SAY | {"reasoning_content": "\ud83d"}], "has half a character"),
}
RECORDS_BAD: dict[str, tuple[dict[str, Any], dict[str, str] | None, list[str]]] = {
    "two forms": (
        QUESTION | {"text": "x"},
        None,
        ['"question" with "answer", and "text" too', "fields question=question,answer=answer or fields text=text"],
    ),
    "Alpaca as it is published": (
        {"instruction": "a", "input": "", "output": "b", "text": "c"},
        None,
        ["fields text=text or fields question=instruction+input,answer=output"],
    ),
    "two lists": ({"messages": TALK, "conversations": SHARED}, None, ["fields messages=conversations"]),
    "nothing known": (
        {"prompt": "a", "chosen": "b"}, None, ['"text" is missing; it has "prompt", "chosen"', "which fields can take"],
    ),
    "a prompt without completion": (
        {"prompt": "a", "completion": " "}, None, ['"completion" must be a text that is not empty'],
    ),
    "an empty output": (
        {"instruction": "a", "output": None}, None, ['"output" must be a text that is not empty'],
    ),
    "an input that is no text": (
        {"instruction": "a", "input": 3, "output": "b"}, None, ['"input" must be a text that is not empty'],
    ),
    "tools that are none": ({"messages": TALK, "tools": ["f"]}, None, ['"tools" must be a list of objects']),
    "tools that are one": ({"messages": TALK, "tools": TOOL}, None, ['"tools" must be a list of objects']),
    "a field that is nowhere": (
        QUESTION, {"question": "q"}, ['the data: no row has "q", which fields names; they have "question", "answer"'],
    ),
    "half of the form": ({"q": "Who?"}, {"question": "q"}, ['"answer" is missing']),
    "a list that is named for a text": ({"q": ["a"], "answer": "b"}, {"question": "q"}, ['"q" must be a text']),
    "not messages": ({"q": "Who?"}, {"messages": "q"}, ['"q" must be a list that is not empty, in JSON if it is text']),
    "a list as Python shows it": ({"messages": str(TALK)}, None, ["that is not empty, in JSON if it is text"]),
    "columns of nothing": ({"messages": {"role": []}}, None, ['"messages" must be a list that is not empty']),
    "no such target": (QUESTION, {"prompt": "question"}, ["fields has prompt=question; write it like question=prompt"]),
    "two forms named": (QUESTION, {"question": "a", "text": "b"}, ["give question and answer, or text, or messages"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MESSAGES_BAD)
def test_messages_that_are_refused(case: str) -> None:
    messages, reason = MESSAGES_BAD[case]
    with pytest.raises(InputError) as caught:
        rows_from([{"text": "fine"}, {"messages": messages}])
    assert str(caught.value).startswith("sample 1: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("case", RECORDS_BAD)
def test_records_that_are_refused(case: str) -> None:
    record, fields, reasons = RECORDS_BAD[case]
    with pytest.raises(InputError) as caught:
        rows_from([record], fields)
    assert all(reason in str(caught.value) for reason in reasons), str(caught.value)


def test_the_advice_on_two_forms_is_right() -> None:
    record = {"instruction": "Say", "input": "who.", "output": "Me.", "text": "c"}
    assert rows_from([record], fields_from("question=instruction+input,answer=output"))[0].content == {
        "question": "Say\n\nwho.",
        "answer": "Me.",
    }
    assert rows_from([record], fields_from("text=text"))[0].content == {"text": "c"}


def test_a_row_missing_a_named_field_is_named() -> None:
    with pytest.raises(InputError, match=r'sample 1: .*"q" is missing; it has "x"'):
        rows_from([{"q": "a", "answer": "b"}, {"x": "a", "answer": "b"}], {"question": "q"})


def test_fields_as_text() -> None:
    fields = fields_from(" question = The Question,answer=A ")
    assert fields == {"question": "The Question", "answer": "A"}
    assert fields_from(fields_text(fields)) == fields


def test_fields_in_python_are_a_dictionary() -> None:
    with pytest.raises(InputError, match="fields is 'question=q'; give a dictionary such as"):
        rows_from([QUESTION], "question=q")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "question", "question=", "=x", "q=x", "text=a,text=b", "question=a,messages=b"])
def test_fields_that_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="fields"):
        fields_from(text)


QUESTION_AND_TOOLS = {"question": "Who?", "answer": "Me.", "tools": [{"name": "find"}]}
ASKED_AND_TOLD = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]


@pytest.mark.parametrize(
    ("entry", "content"),
    [
        (QUESTION_AND_TOOLS, {"messages": ASKED_AND_TOLD, "tools": [{"name": "find"}]}),
        ({"question": "Who?", "answer": "Me.", "tools": "hammer"}, {"question": "Who?", "answer": "Me."}),
        (
            {"system": "Brief.", "messages": ASKED_AND_TOLD},
            {"messages": [{"role": "system", "content": "Brief."}, *ASKED_AND_TOLD]},
        ),
        (
            {"system": "Brief.", "messages": [{"role": "developer", "content": "Long."}, *ASKED_AND_TOLD]},
            {"messages": [{"role": "developer", "content": "Long."}, *ASKED_AND_TOLD]},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}, ASKED_AND_TOLD[1]]},
            {"messages": ASKED_AND_TOLD},
        ),
    ],
)
def test_what_stands_beside_or_within_messages_is_not_lost(entry: dict[str, Any], content: dict[str, Any]) -> None:
    assert rows_from([entry])[0].content == content
