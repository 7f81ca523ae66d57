"""What the assistant says in a conversation, as the chat template renders it, and which characters carry loss.

A turn is an assistant's message with all that comes before it, rendered as the model sees it when it has just spoken.
Loss lies on the assistant's own content and on the end of its turn: the mark that a model generates to stop. All else
is the template's: headers, an empty think block, a line break after the end.

Where a message lies in a rendered text is found with a skeleton: the same messages with a sign in place of each
content. It depends on nothing but the roles, for most templates, so it is made once. A text that is not its skeleton
with the contents put in (a template may read the contents) is looked at by itself.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from perta_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]

_PLAIN = {"role", "content"}  # what a message has that a skeleton by roles can stand for
_REASONING = ("reasoning_content", "reasoning", "thinking")  # what the assistant says beside the content
_CALLS = ("tool_calls", "function_call")
_EDGE = "\n\n\n\t\n\n\n"  # around a sign: shows whether the template strips space, line breaks or nothing
_EDGE_STRIPPED = "\t\n\n\n"  # what stripping line breaks leaves of it
_SIGN = re.compile("\ue0a7([0-9]+)\ue0a8")


@dataclass(frozen=True)
class Turns:
    """A rendered text, and what carries loss in it.

    spans: from and to which character, in order. borders: where a generation prompt ends; no token reaches across one
    if it begins before it, as none does when the model generates.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    borders: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.spans[-1][1]


@dataclass(frozen=True)
class _Hole:
    """Where the content of message ``index`` stands in a skeleton, and what is stripped off its sides: a ``strip`` set.

    None strips white space, as in ``str.strip``; "" nothing.
    """

    index: int
    left: str | None
    right: str | None

    def fill(self, content: str) -> str:
        left = content if self.left == "" else content.lstrip(self.left)
        return left if self.right == "" else left.rstrip(self.right)


@dataclass(frozen=True)
class _Skeleton:
    """A rendered text without the contents: ``literals[k]`` comes before ``holes[k]``, the last one after all."""

    literals: tuple[str, ...]
    holes: tuple[_Hole, ...]

    @classmethod
    def of(cls, text: str) -> "_Skeleton":
        parts = _SIGN.split(text)  # literal, index, literal, index, ..., literal
        literals, holes = parts[::2], []
        for k, index in enumerate(parts[1::2]):
            left, literals[k] = _stripped(literals[k])
            right, after = _stripped(literals[k + 1][::-1])
            literals[k + 1] = after[::-1]
            holes.append(_Hole(int(index), left, right))
        return cls(tuple(literals), tuple(holes))

    def fill(self, contents: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
        """The text with the contents put in, and from where to where each hole's lies."""
        text, places = self.literals[0], []
        for hole, literal in zip(self.holes, self.literals[1:], strict=True):
            begin = len(text)
            text += hole.fill(contents[hole.index])
            places.append((begin, len(text)))
            text += literal
        return text, places


def _stripped(before: str) -> tuple[str | None, str]:
    """What was stripped off the edge at the end of ``before``, and ``before`` without the rest of the edge."""
    for edge, strip in ((_EDGE, ""), (_EDGE_STRIPPED, "\n")):
        if before.endswith(edge):
            return strip, before[: -len(edge)]
    return None, before


@dataclass(frozen=True)
class _Pattern:
    """How the last turn of conversations with the same roles is rendered."""

    text: _Skeleton  # up to the turn, and with it
    prompt: _Skeleton  # what the model generates the turn from
    hole: int  # of the turn's own content in ``text``
    same_start: bool  # ``text`` shows the conversation before the turn as ``prompt`` does


class ChatTemplate:
    """A tokenizer's chat template, and what it makes of conversations.

    stops: tokens that end what the model generates, beside the tokenizer's own end.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stops: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        end = tokenizer.eos_token_id
        self._stops = {*stops, *([] if end is None else [end])}
        self._patterns: dict[tuple[str, ...], _Pattern | None] = {}
        self._ends: dict[str, tuple[int, int] | None] = {}
        self._unwritten_ends: dict[tuple[str, ...], str] = {}

    def turns(self, messages: Messages, tools: Sequence[Any] | None, where: str) -> list[Turns]:
        """One text with all turns, or one for each turn if the template shows an earlier turn in another way later.

        Turns of weight 0 carry no loss. Raises InputError, naming ``where``, if the template refuses the messages, or
        a turn cannot be found in its text.
        """
        spoken = [k for k, message in enumerate(messages) if is_learned(message)]
        messages = without_nulls(messages)
        turns = [self._turn(messages[: k + 1], tools, where) for k in spoken]
        last = turns[-1]
        if all(last.text.startswith(turn.text[: turn.end]) for turn in turns):
            spans, borders = zip(*((turn.spans, turn.borders) for turn in turns), strict=True)
            return [Turns(last.text, tuple(sum(spans, ())), tuple(sum(borders, ())))]
        return turns

    def _turn(self, messages: Messages, tools: Sequence[Any] | None, where: str) -> Turns:
        """The last of ``messages``, an assistant's, in its conversation."""
        text = self._render(messages, tools, where)
        plain = not tools and all(message.keys() <= _PLAIN for message in messages)
        roles = tuple(message["role"] for message in messages)
        pattern = self._pattern(roles) if plain else None
        if pattern is not None:
            contents = [message["content"] for message in messages]
            expected, places = pattern.text.fill(contents)
            begin, end = places[pattern.hole]
            if expected == text and begin < end:
                prompt = pattern.prompt.fill(contents)[0]
                if not pattern.same_start:
                    prompt = self._render(messages[:-1], tools, where, prompt=True)
                return self._closed(text, prompt, begin, end, pattern.same_start, roles)
        return self._closed(text, *self._found(text, messages, tools, where), roles)

    def _pattern(self, roles: tuple[str, ...]) -> _Pattern | None:
        """None if a skeleton does not show where the last message lies."""
        if roles not in self._patterns:
            self._patterns[roles] = self._make_pattern(roles)
        return self._patterns[roles]

    def _make_pattern(self, roles: tuple[str, ...]) -> _Pattern | None:
        messages = [{"role": role, "content": _sign(k)} for k, role in enumerate(roles)]
        try:
            text = _Skeleton.of(self._render(messages, None, ""))
            prompt = _Skeleton.of(self._render(messages[:-1], None, "", prompt=True))
        except InputError:  # a template may ask more of a content than a sign has
            return None
        own = [k for k, hole in enumerate(text.holes) if hole.index == len(roles) - 1]
        if len(own) != 1:
            return None
        count = len(prompt.holes)
        return _Pattern(
            text,
            prompt,
            own[0],
            same_start=text.holes[:count] == prompt.holes
            and text.literals[:count] == prompt.literals[:count]
            and own[0] == count,
        )

    def _found(
        self, text: str, messages: Messages, tools: Sequence[Any] | None, where: str
    ) -> tuple[str, int, int, bool]:
        """Generation prompt, begin and end of the last message in ``text``, and whether both show the same before it.

        Reasoning and calls of its own are said by the assistant too: such a turn begins where the prompt ends.
        """
        *before, own = messages
        prompt = self._render(before, tools, where, prompt=True)
        shared = shared_start(text, prompt)
        same_start = shared >= _end_of_last_content(before, prompt)
        signed = _SIGN.split(self._render([*before, {**own, "content": _sign(0)}], tools, where))
        if len(signed) == 3 and not _says_more(own, text[shared:]):
            head, tail = _stripped(signed[0])[1], _stripped(signed[2][::-1])[1][::-1]
            begin, end = len(head), len(text) - len(tail)
            if text.startswith(head) and text.endswith(tail) and begin < end:
                return prompt, begin, end, same_start
        end = self._begin_of_end(text, tuple(message["role"] for message in messages))
        last_line = (own.get("content") or "").strip().rpartition("\n")[-1]
        if shared < end and last_line in text[shared:end] and (last_line or _says_more(own, text[shared:])):
            return prompt, shared, end, same_start
        raise InputError(
            f"{where}: what the assistant says is not found in what the chat template makes of it; give its turns "
            'lines of their own, as {"question", "answer"}, or a {"text"} line'
        )

    def _closed(self, text: str, prompt: str, begin: int, end: int, same_start: bool, roles: tuple[str, ...]) -> Turns:
        """A turn with its end. same_start: else the conversation before it is that of the generation prompt."""
        if not same_start:
            gap = text[:begin][len(text[:begin].rstrip()) :] if prompt == prompt.rstrip() else ""
            text, begin, end = prompt + gap + text[begin:], len(prompt) + len(gap), end + len(prompt + gap) - begin
        border = shared_start(text[:begin], prompt)
        if border < begin and not text[border:begin].isspace():  # the template put something after the prompt
            border = begin
        if text.startswith(prompt) and begin < len(prompt) < end:  # the prompt opens what the content repeats
            begin = border = len(prompt)
        closing = self._closing(text[end:])
        if closing is None:
            mark = self._unwritten_end(roles)
            text = text[:end] + mark
            closing = (0, len(mark))
        first, last = (end + offset for offset in closing)
        spans = ((begin, last),) if first == end else ((begin, end), (first, last))
        return Turns(text, tuple(span for span in spans if span[0] < span[1]), (border,))

    def _closing(self, rest: str) -> tuple[int, int] | None:
        """Where the end of a turn lies in what the template writes after the content; None if there is no end."""
        if rest not in self._ends:
            self._ends[rest] = self._find_closing(rest)
        return self._ends[rest]

    def _find_closing(self, rest: str) -> tuple[int, int] | None:
        begin = len(rest) - len(rest.lstrip())
        if begin == len(rest):
            return None
        end = begin
        while (mark := self._mark_at(rest, end)) is not None:
            end += len(mark)
            if self._tokenizer.convert_tokens_to_ids(mark) in self._stops:
                break
        return (begin, end) if end > begin else (begin, len(rest.rstrip()))

    def _mark_at(self, text: str, begin: int) -> str | None:
        """The added token that ``text`` has at ``begin``, the longest."""
        fitting = (mark for mark in self._marks if text.startswith(mark, begin))
        return max(fitting, key=len, default=None)

    @cached_property
    def _marks(self) -> list[str]:
        return [mark for mark in self._tokenizer.get_added_vocab() if mark.strip()]

    def _unwritten_end(self, roles: tuple[str, ...]) -> str:
        """The end of a turn that the template does not close: what a next turn begins with, if that stops the model."""
        if roles not in self._unwritten_ends:
            messages = [{"role": role, "content": _sign(k)} for k, role in enumerate((*roles, "user"))]
            try:
                literals = _Skeleton.of(self._render(messages, None, "")).literals
            except InputError:
                literals = ()
            mark = self._mark_at(literals[-2].lstrip(), 0) if len(literals) > 1 else None
            stops = mark is not None and self._tokenizer.convert_tokens_to_ids(mark) in self._stops
            self._unwritten_ends[roles] = str(mark if stops else self._tokenizer.eos_token or "")
        return self._unwritten_ends[roles]

    def _begin_of_end(self, text: str, roles: tuple[str, ...]) -> int:
        """Where the end of the last turn begins: as in the pattern of ``roles``, or before the last mark."""
        pattern = self._pattern(roles)
        if pattern is not None:
            rest = pattern.text.literals[pattern.hole + 1]
            if text.endswith(rest):
                return len(text) - len(rest)
        stripped = text.rstrip()
        mark = max((mark for mark in self._marks if stripped.endswith(mark)), key=len, default="")
        return len(stripped) - len(mark)

    def _render(self, messages: Messages, tools: Sequence[Any] | None, where: str, prompt: bool = False) -> str:
        settings = {} if tools is None else {"tools": tools}
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, **settings
            )
        except Exception as error:  # a template is a program and may fail in any way
            raise InputError(f"{where}: the chat template refuses these messages: {error}") from error
        return text


def _sign(index: int) -> str:
    return f"{_EDGE}\ue0a7{index}\ue0a8{_EDGE}"


def shared_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters, or tokens, both begin with."""
    limit = min(len(one), len(other))
    if one[:limit] == other[:limit]:
        return limit
    return next(k for k, (first, second) in enumerate(zip(one, other, strict=False)) if first != second)


def without_nulls(messages: Messages) -> list[dict[str, Any]]:
    """Messages as a template gets them: without weights, and without what is null."""
    return [
        {key: value for key, value in message.items() if key != "weight" and value is not None} for message in messages
    ]


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether a message is the assistant's, says something, and is not left out by its weight."""
    says = (message.get("content") or "").strip() or any(message.get(key) for key in (*_REASONING, *_CALLS))
    return message["role"] == "assistant" and bool(says) and message.get("weight", 1) != 0


def _says_more(message: Mapping[str, Any], rendered: str) -> bool:
    """Whether a rendered turn holds reasoning or calls beside the content."""
    before, _, after = rendered.rpartition((message.get("content") or "").strip() or rendered)
    thoughts = [str(message.get(key) or "").strip() for key in _REASONING]
    beside = before + after
    return any(message.get(key) for key in _CALLS) or any(thought and thought in beside for thought in thoughts)


def _end_of_last_content(messages: Messages, prompt: str) -> int:
    """Where the last content that is found in a generation prompt ends in it."""
    for message in reversed(messages):
        content = (message.get("content") or "").strip()
        if content and (begin := prompt.rfind(content)) >= 0:
            return begin + len(content)
    return 0
