"""What an entry of a data file says: its form known by the names of its fields, and its content checked.

The content has "question" and "answer" (loss on the answer only), "text" (loss on all tokens) or "messages" (loss on
what the assistant says), with "tools" if the entry has them. Other names are taken for these as ``FORMS`` has them,
or as the caller's ``Fields`` say.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from perta_fast.errors import InputError

Fields = Mapping[str, str]  # the field of an entry, by what it is taken for; A+B joins two by a blank line

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SPEAKERS = {  # of ShareGPT
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
TARGETS = ("question", "answer", "text", "messages", "tools")
PLAIN: tuple[dict[str, str], ...] = (
    {"question": "question", "answer": "answer"},
    {"text": "text"},
    {"messages": "messages"},
)
FORMS: tuple[dict[str, str], ...] = (
    *PLAIN,
    {"question": "prompt", "answer": "completion"},
    {"question": "prompt", "answer": "response"},
    {"question": "instruction+input", "answer": "output"},
    {"messages": "conversations"},
)
PARAPHRASED = "paraphrased_question"  # which a question may have beside it; evaluations ask it too
# Of TOFU: the answer in other words, and a list of wrong ones.
TRUTH_RATIO = PARAPHRASED_ANSWER, PERTURBED_ANSWER = "paraphrased_answer", "perturbed_answer"
_NEEDED = 'needs "question" and "answer", or "text", or "messages"'


@dataclass(frozen=True)
class Row:
    """One checked entry: ``content`` has the keys of its form, ``where`` names file and line.

    Of what was tokenised when it was given, ``content`` has the ``samples``.
    read_as: what was taken for what, "" if the entry has these keys itself.
    """

    content: Mapping[str, Any]
    where: str
    read_as: str = ""

    @property
    def is_tokenised(self) -> bool:
        """Whether there is no text, but samples."""
        return "samples" in self.content


def fields_from(text: str) -> dict[str, str]:
    """Fields as on the command line, question=prompt,answer=completion. Raises InputError."""
    pairs = [part.partition("=") for part in text.split(",")]
    fields = {target.strip(): source.strip() for target, _, source in pairs}
    if len(fields) < len(pairs):
        raise InputError(f"‹fields› is {text!r}; it names one thing twice")
    check_fields(fields)
    return fields


def fields_text(fields: Fields) -> str:
    """The text that ``fields_from`` reads."""
    return ",".join(f"{target}={source}" for target, source in fields.items())


def check_fields(fields: Fields | None) -> None:
    """Raise InputError unless ``fields`` are those of one form."""
    if fields is not None and not isinstance(fields, Mapping):
        raise InputError(
            f"‹fields› is {fields!r}; give a dictionary such as {{'question': 'prompt', 'answer': 'reply'}}"
        )
    for target, source in (fields or {}).items():
        if target not in TARGETS or not isinstance(source, str) or not source.strip() or set(source) & set(",="):
            raise InputError(
                f"‹fields› has {target}={source}; write it like question=prompt,answer=completion, with names of "
                f"fields for {', '.join(TARGETS)}"
            )
    if fields and len([form for form in PLAIN if not form.keys().isdisjoint(fields)]) > 1:
        raise InputError(f"‹fields› is {fields_text(fields)}; give question and answer, or text, or messages")


def rows_of_entries(entries: Iterable[tuple[str, Any]], fields: Fields | None, name: str | Path) -> list[Row]:
    """Check entries, each with where it stands. name: of the data, for messages. Raises InputError, naming where."""
    check_fields(fields)
    entries = list(entries)
    if fields:
        _check_present(entries, fields, name)
    return [_row(entry, where, fields or {}) for where, entry in entries]


def read_as(rows: Iterable[Any]) -> str:
    """What was taken for what in these rows; "" if nothing but plain forms, or if they are samples."""
    return "; ".join(dict.fromkeys(row.read_as for row in rows if getattr(row, "read_as", "")))


def _check_present(entries: list[tuple[str, Any]], fields: Fields, name: str | Path) -> None:
    """Raise InputError if a field that ``fields`` names is in no entry."""
    known = dict.fromkeys(key for _, entry in entries if isinstance(entry, Mapping) for key in entry)
    for source in fields.values():
        for part in [source] if source in known else source.split("+"):
            if part not in known:
                raise InputError(f'{name}: no row has "{part}", which ‹fields› names; they have {_listed(known)}')


def _row(entry: Any, where: str, fields: Fields) -> Row:
    if not isinstance(entry, Mapping):
        hint = ', but a text; give it a name, as in {"text": "..."}' if isinstance(entry, str) else ""
        raise InputError(f"{where}: is not a JSON object{hint}")
    form = _form_of(entry, where, fields)
    for source in form.values():
        if _first(entry, source) not in entry:
            has = f"; it has {_listed(entry)}, which ‹fields› can take for these" if entry else ""
            raise InputError(f'{where}: {_NEEDED}; "{source}" is missing{has}')
    values = {target: _value(entry, source, where) for target, source in form.items()}
    tools_name = fields.get("tools", "tools")
    tools = _decoded(entry.get(tools_name))
    has_tools = "tools" in fields or (isinstance(tools, list) and bool(tools))
    content: dict[str, Any]
    if "messages" in form:
        content = {"messages": _turns(values["messages"], form["messages"], where)}
        system = entry.get("system")
        if isinstance(system, str) and system.strip() and _role(content["messages"]) not in ("system", "developer"):
            content["messages"].insert(0, {"role": "system", "content": system})
            form = {"messages": f"system+{form['messages']}"}
    elif "question" in form and (has_tools or any(map(_is_spoken, values.values()))):
        content = {"messages": _exchange(values, form, where)}
        form = {"messages": "+".join(form.values())}
    else:
        for target, source in form.items():
            check_text(values[target], source, where)
        if "question" in form:
            values |= {name: entry[name] for name, texts in _texts_beside(entry).items() if _are_texts(texts)}
        return Row(values, where, _described(form))
    _check_messages(content["messages"], where)
    if _is_given(tools):
        content["tools"] = _checked_tools(tools, tools_name, where)
        form = {**form, **{key: source for key, source in fields.items() if key == "tools"}}
    return Row(content, where, _described(form))


def _texts_beside(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The texts of the fields that evaluations read beside a question and its answer."""
    single = {name: [entry.get(name)] for name in (PARAPHRASED, PARAPHRASED_ANSWER)}
    return single | {PERTURBED_ANSWER: entry.get(PERTURBED_ANSWER)}


def _are_texts(values: Any) -> bool:
    """Whether these could be questions or answers; another program may mean something else by the name."""
    if not isinstance(values, list):
        return False
    try:
        for text in values:
            check_text(text, "", "")
    except InputError:
        return False
    return bool(values)


def _described(form: Mapping[str, str]) -> str:
    if all(target == source for target, source in form.items()):
        return ""
    return ", ".join(f"{source.replace('+', ' and ')} as {target}" for target, source in form.items())


def _form_of(entry: Mapping[str, Any], where: str, fields: Fields) -> Mapping[str, str]:
    """The form that ``fields`` names; or the one that the entry has, or seems to be meant to have.

    Raises InputError if it has two.
    """
    for form in PLAIN:
        if not form.keys().isdisjoint(fields):
            return {target: fields.get(target, target) for target in form}
    possible = _possible(tuple(entry))
    whole = [form for form in possible if all(_is_given(entry[_first(entry, source)]) for source in form.values())]
    if len(whole) > 1:
        first, second = whole[:2]
        raise InputError(
            f"{where}: has {_quoted(first)}, and {_quoted(second)} too; choose with ‹fields› {fields_text(first)} or "
            f"‹fields› {fields_text(second)}"
        )
    half_asked = any(entry.get(key) is not None for key in PLAIN[0])
    if whole and not (half_asked and "text" in whole[0]):
        return whole[0]
    if entry.get("messages") is not None:
        return {"messages": "messages"}
    if half_asked:
        return PLAIN[0]
    return next(iter(possible), {"text": "text"})


@lru_cache(maxsize=64)  # most rows of a file have the same fields
def _possible(names: tuple[str, ...]) -> tuple[Mapping[str, str], ...]:
    """The forms that an entry with fields of these names may have."""
    known = dict.fromkeys(names)
    return tuple(form for form in FORMS if all(_first(known, source) in known for source in form.values()))


def _first(entry: Mapping[str, Any], source: str) -> str:
    """The field that a row must have for ``source``: of several that are joined, the first."""
    return source if source in entry else source.split("+")[0]


def _value(entry: Mapping[str, Any], source: str, where: str) -> Any:
    if source in entry or "+" not in source:
        return entry[source]
    parts = {name: entry[name] for name in source.split("+") if _is_given(entry.get(name))}
    for name, text in parts.items():
        check_text(text, name, where)
    return "\n\n".join(parts.values())


def _is_given(value: Any) -> bool:
    """Whether a value is neither null nor empty."""
    return value is not None and value != [] and not (isinstance(value, str) and not value.strip())


def _is_spoken(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) for message in value)


def _decoded(value: Any) -> Any:
    """A list, also where it is JSON in a text, as in CSV."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _turns(value: Any, name: str, where: str) -> list[Any]:
    """Messages with role and content, without fields that are null, which templates would take for given."""
    messages = _decoded(value)
    if isinstance(messages, Mapping) and messages and all(isinstance(column, list) for column in messages.values()):
        # Older versions of the library datasets keep a list of objects as an object of lists.
        columns = zip_longest(*messages.values())
        messages = [dict(zip(messages, cells, strict=True)) for cells in columns]
    if not isinstance(messages, list) or not messages:
        hint = ", in JSON if it is text" if isinstance(messages, str) else ""
        raise InputError(f'{where}: "{name}" must be a list that is not empty{hint}')
    return [_turn(message, where) for message in messages]


def _turn(message: Any, where: str) -> Any:
    if not isinstance(message, Mapping):
        return message
    turn = {key: value for key, value in message.items() if value is not None or key == "content"}
    if _is_parts(turn.get("content")):
        turn["content"] = "".join(part["text"] for part in turn["content"])
    if "from" in turn and "role" not in turn:
        speaker = turn.pop("from")
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise InputError(
                f'{where}: a message is "from" {reprlib.repr(speaker)}; it must be from one of {", ".join(_SPEAKERS)}'
            )
        turn = {"role": _SPEAKERS[speaker], "content": turn.pop("value", None), **turn}
    return turn


def _is_parts(content: Any) -> bool:
    """Whether a content is a list of parts that are all text."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(
            isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        )
    )


def _role(messages: list[Any]) -> Any:
    return messages[0].get("role") if isinstance(messages[0], Mapping) else None


def _exchange(values: Mapping[str, Any], form: Mapping[str, str], where: str) -> list[Any]:
    """Question and answer as messages. What the assistant says in the question is not learnt."""
    turns = []
    for (target, value), role in zip(values.items(), ("user", "assistant"), strict=True):
        if _is_spoken(value):
            turns += [_turn(message, where) | ({"weight": 0} if target == "question" else {}) for message in value]
        else:
            check_text(value, form[target], where)
            turns.append({"role": role, "content": value})
    return turns


def _check_messages(messages: list[Any], where: str) -> None:
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES or not _has_content(message):
            raise InputError(f'{where}: each message needs a "role" ({", ".join(_ROLES)}) and a "content" that is text')
        weight = message.get("weight", 1)
        if isinstance(weight, bool) or weight not in (0, 1):
            raise InputError(f'{where}: "weight" of a message is {reprlib.repr(weight)}; it must be 0 or 1')
    _check_unicode(messages, where)
    said = [message for message in messages if message["role"] == "assistant" and _says_something(message)]
    if not said:
        raise InputError(f"{where}: the assistant says nothing, so there is nothing to learn from")
    if messages[0]["role"] == "assistant":
        raise InputError(f"{where}: the assistant speaks first; put what it answers to before it")
    if all(message.get("weight") == 0 for message in said):
        raise InputError(f'{where}: all that the assistant says has "weight" 0, so there is nothing to learn from')


def _has_content(message: Mapping[str, Any]) -> bool:
    """Whether the content is text; a call of a tool needs none."""
    content = message.get("content")
    return isinstance(content, str) or (content is None and message["role"] == "assistant" and _calls(message))


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool((message.get("content") or "").strip()) or _calls(message)


def _calls(message: Mapping[str, Any]) -> bool:
    calls = message.get("tool_calls")
    return isinstance(calls, list) and bool(calls)


def _checked_tools(tools: Any, name: str, where: str) -> list[Any]:
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(f'{where}: "{name}" must be a list of objects, each a tool')
    _check_unicode(tools, where)
    return tools


def check_text(value: Any, key: str, where: str) -> None:
    """Raise InputError unless ``value``, found under ``key``, is a text that a tokenizer can read and not blank."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f'{where}: "{key}" must be a text that is not empty')
    _check_unicode(value, where)


def _check_unicode(value: Any, where: str) -> None:
    """Raise InputError for a text, at any depth, that is not Unicode."""
    remaining = [value]
    while remaining:
        part = remaining.pop()
        if isinstance(part, str):
            try:
                part.encode()
            except UnicodeEncodeError as error:
                half = part[error.start]
                raise InputError(f"{where}: has half a character, {half!a}, which no tokenizer can read") from error
        elif isinstance(part, list | tuple):
            remaining += part
        elif isinstance(part, Mapping):
            remaining += [*part, *part.values()]


def _quoted(form: Mapping[str, str]) -> str:
    return " with ".join(f'"{source.split("+")[0]}"' for source in form.values())


def _listed(names: Iterable[Any]) -> str:
    shown = [reprlib.repr(name).replace("'", '"') for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
