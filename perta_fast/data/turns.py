"""What the assistant says in a conversation, as the chat template renders it, and which characters carry loss.

A turn is an assistant's message with all that comes before it, rendered as the model sees it when it has just spoken.
Loss lies on the assistant's own content and on the end of its turn: the mark that a model generates to stop. All else
is the template's: headers, an empty think block, a line break after the end.

Where a message lies in a rendered text is found with an outline (``outlines``). For most templates it depends on
nothing but the roles, so it is made once. A text that is not its outline with the contents put in (a template may read
the contents) is looked at by itself.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perta_fast.data.marked_template import generated, marks_itself
from perta_fast.data.marks import Marks
from perta_fast.data.outlines import Outline, has_sign, sign
from perta_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

_REASONING = ("reasoning_content", "reasoning", "thinking")  # what the assistant says beside the content
_CALLS = ("tool_calls", "function_call")
_PLAIN = {"role", "content"}  # what a message has that a pattern by roles can stand for


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
class _Pattern:
    """How the last turn of a conversation is rendered if it is content alone. own: the number of its hole."""

    text: Outline  # up to the turn, and with it
    prompt: Outline  # what the model generates the turn from
    own: int

    @property
    def same_start(self) -> bool:
        """Whether ``text`` shows the conversation before the turn as ``prompt`` does."""
        count = len(self.prompt.holes)
        literals = self.text.literals[:count] == self.prompt.literals[:count]
        return literals and self.text.holes[:count] == self.prompt.holes and self.own == count

    @property
    def header(self) -> str:
        """What the prompt ends with, after the last content."""
        return self.prompt.literals[-1]

    @property
    def rest(self) -> str:
        """What is written after the content."""
        return self.text.literals[self.own + 1]

    def head(self, messages: Sequence[Message]) -> str:
        """What is written before the content."""
        text, places = self.text.fill(_contents(messages))
        return text[: places[self.own][0]]


@dataclass(frozen=True)
class _Place:
    """Where a turn lies in ``text``. prompt: what it is generated from. same_start: as of a pattern."""

    text: str
    begin: int
    end: int
    prompt: str
    same_start: bool
    header: str


class ChatTemplate:
    """A tokenizer's chat template, and what it makes of conversations.

    stops: tokens that end what the model generates, beside the tokenizer's own end.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stops: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._marks = Marks(tokenizer, stops)
        self._marked: dict[bool, bool] = {}  # by whether there are tools, which may have a template of their own
        self._patterns: dict[tuple[str, ...], _Pattern | None] = {}
        self._unwritten_ends: dict[tuple[bool, tuple[str, ...]], str] = {}

    def turns(self, messages: Sequence[Message], tools: Sequence[Any] | None, where: str) -> list[Turns]:
        """One text with all turns, or one for each turn if the template shows an earlier turn in another way later.

        Turns of weight 0 carry no loss. Raises InputError, naming ``where``, if the template refuses the messages, or
        a turn cannot be found in its text.
        """
        spoken = [k for k, message in enumerate(messages) if _is_learned(message)]
        if not spoken:
            raise InputError(f"{where}: the assistant says nothing that carries loss")
        shown = list(map(_for_template, messages))
        turns = [self._turn(shown[: k + 1], tools, where) for k in spoken]
        last = turns[-1]
        if all(last.text.startswith(turn.text[: turn.end]) for turn in turns):
            spans, borders = zip(*((turn.spans, turn.borders) for turn in turns), strict=True)
            return [Turns(last.text, tuple(sum(spans, ())), tuple(sum(borders, ())))]
        return turns

    def _turn(self, messages: Sequence[Message], tools: Sequence[Any] | None, where: str) -> Turns:
        """The last of ``messages``, an assistant's, in its conversation."""
        text = self._render(messages, tools, where)
        if self._has_marks(tools):
            prompt = self._prompt(messages, tools, where)
            begin = shared_start(text, prompt)
            spans = generated(self._tokenizer, messages, tools, begin)
            if any(_last_words(messages[-1]) in text[slice(*span)] for span in spans):
                return Turns(text, tuple(spans), (begin,))
        pattern = self._pattern(messages, tools)
        contents = _contents(messages)
        if pattern is not None and not _has_more(messages[-1]):
            expected, places = pattern.text.fill(contents)
            begin, end = places[pattern.own]
            if expected == text and begin < end:
                prompt = pattern.prompt.fill(contents)[0]
                if not pattern.same_start:
                    prompt = self._prompt(messages, tools, where)
                return self._closed(
                    _Place(text, begin, end, prompt, pattern.same_start, pattern.header), messages, tools
                )
        return self._closed(self._searched(text, messages, tools, pattern, where), messages, tools)

    def _has_marks(self, tools: Sequence[Any] | None) -> bool:
        if bool(tools) not in self._marked:
            self._marked[bool(tools)] = marks_itself(self._tokenizer, tools)
        return self._marked[bool(tools)]

    def _pattern(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> _Pattern | None:
        """None if an outline does not show where the last message lies."""
        if tools or any(message.keys() - _PLAIN for message in messages):
            return self._make_pattern(messages, tools, by_roles=False)
        roles = tuple(message["role"] for message in messages)
        if roles not in self._patterns:
            self._patterns[roles] = self._make_pattern(messages, None, by_roles=True)
        return self._patterns[roles]

    def _make_pattern(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, by_roles: bool
    ) -> _Pattern | None:
        """by_roles: for all conversations with these roles, so that what is empty in this one has a sign too."""
        signed = [
            {**message, "content": sign(k)} if by_roles or message.get("content") else message
            for k, message in enumerate(messages)
        ]
        own = {name: value for name, value in messages[-1].items() if name not in (*_REASONING, *_CALLS)}
        signed[-1] = {**own, "content": sign(len(messages) - 1)}
        try:
            text = Outline.of(self._render(signed, tools, ""))
            prompt = Outline.of(self._prompt(signed, tools, ""))
        except InputError:  # a template may ask more of a content than a sign has
            return None
        holes = [k for k, hole in enumerate(text.holes) if hole.index == len(messages) - 1]
        return _Pattern(text, prompt, holes[0]) if len(holes) == 1 else None

    def _searched(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, pattern: _Pattern | None, where: str
    ) -> _Place:
        """The last message in ``text``, where no pattern is what the template writes.

        Reasoning and calls of its own are said by the assistant too: such a turn begins where the prompt ends, or where
        the content would.
        """
        own, prompt = messages[-1], self._prompt(messages, tools, where)
        same_start, header = self._start(text, prompt, messages, tools, pattern, where)
        calls = any(own.get(name) for name in _CALLS)
        reasons = any(own.get(name) and self._shows(messages, tools, name) for name in _REASONING)
        if not calls and not reasons and (content := self._content_alone(text, messages, tools)):
            return _Place(text, *content, prompt, same_start, header)
        head = None if reasons or not calls or pattern is None else pattern.head(messages)
        if head is not None and text.startswith(head.rstrip()):
            begin = shared_start(text, head)
        elif text.startswith(prompt):
            begin = len(prompt)
        elif same_start:
            begin = self._marks.outside(text, shared_start(text, prompt))
        else:
            begin = _end_of_occurrence(text, header, prompt.count(header) if header else 0)
        end = self._end_of_content(text, begin, pattern)
        if begin < end and (calls or reasons or _last_words(own) in text[begin:end]):
            return _Place(text, begin, end, prompt, same_start, header)
        raise InputError(
            f"{where}: what the assistant says is not found in what the chat template makes of it; give its turns "
            'lines of their own, as {"question", "answer"}, or a {"text"} line'
        )

    def _start(
        self,
        text: str,
        prompt: str,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        pattern: _Pattern | None,
        where: str,
    ) -> tuple[bool, str]:
        """Whether ``text`` shows the conversation before the turn as ``prompt`` does, and the header of the turn."""
        if pattern is not None and pattern.header and pattern.prompt.fill(_contents(messages))[0] == prompt:
            return pattern.same_start, pattern.header
        conversation = self._render(messages[:-1], tools, where) if len(messages) > 1 else ""
        begun = self._marks.outside(prompt, shared_start(conversation, prompt))
        return text.startswith(prompt[:begun]), prompt[begun:]

    def _content_alone(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> tuple[int, int] | None:
        """From where to where the last content lies, by a sign in place of it alone; None if that does not show it."""
        signed = self._try([*messages[:-1], {**messages[-1], "content": sign(0)}], tools)
        outline = Outline.of(signed or "")
        if len(outline.holes) != 1:
            return None
        head, tail = outline.literals
        begin, end = len(head), len(text) - len(tail)
        return (begin, end) if text.startswith(head) and text.endswith(tail) and begin < end else None

    def _shows(self, messages: Sequence[Message], tools: Sequence[Any] | None, name: str) -> bool:
        """Whether the template writes this entry of the last message."""
        signed = self._try([*messages[:-1], {**messages[-1], name: sign(0)}], tools)
        return signed is not None and has_sign(signed)

    def _end_of_content(self, text: str, begin: int, pattern: _Pattern | None) -> int:
        """Where the last turn's end begins: as in the pattern, before the first mark that stops, or the last mark."""
        if pattern is not None and text.endswith(pattern.rest):
            return len(text) - len(pattern.rest)
        stop = self._marks.first_stop(text, begin)
        return self._marks.last(text) if stop is None else stop

    def _closed(self, place: _Place, messages: Sequence[Message], tools: Sequence[Any] | None) -> Turns:
        """A turn with its end, generated from its prompt."""
        text, begin, end = place.text, place.begin, place.end
        closing = self._marks.closing(text[end:])
        if closing is None:
            mark = self._unwritten_end(text[:end], messages, tools)
            text, closing = text[:end] + mark, (0, len(mark))
        if not place.same_start:  # the conversation before the turn is that of the prompt
            start = place.prompt + _gap(text[:begin], place.prompt, place.header)
            text, begin, end = start + text[begin:], len(start), end + len(start) - begin
        border = shared_start(text[:begin], place.prompt)
        if border < begin and not text[border:begin].isspace():  # the template put something after the prompt
            border = begin
        if text.startswith(place.prompt) and begin < len(place.prompt) < end:  # the prompt opens what is said
            begin = border = len(place.prompt)
        first, last = (end + offset for offset in closing)
        spans = ((begin, last),) if first == end else ((begin, end), (first, last))
        return Turns(text, tuple(span for span in spans if span[0] < span[1]), (border,))

    def _unwritten_end(self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None) -> str:
        """The end of a turn that the template does not close: what a next turn begins with, if that stops the model."""
        calls = any(messages[-1].get(name) for name in _CALLS)
        key = (calls, tuple(message["role"] for message in messages))
        if key not in self._unwritten_ends:
            following = {"role": "tool" if calls else "user", "content": "?"}
            longer = self._try([*messages, following], tools) or ""
            mark = None
            if longer.startswith(text):
                rest = longer[len(text) :].lstrip()
                mark = self._marks.at(rest, 0)
            stops = self._marks.stops(mark)
            self._unwritten_ends[key] = str(mark if stops else self._tokenizer.eos_token or "")
        return self._unwritten_ends[key]

    def _prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None, where: str) -> str:
        """What the last of ``messages`` is generated from."""
        return self._render(messages[:-1], tools, where, prompt=True)

    def _try(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> str | None:
        try:
            return self._render(messages, tools, "")
        except InputError:
            return None

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, where: str, prompt: bool = False
    ) -> str:
        settings = {} if tools is None else {"tools": tools}
        text: str = rendered(self._tokenizer, messages, where, tokenize=False, add_generation_prompt=prompt, **settings)
        return text


def rendered(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], where: str, **settings: Any) -> Any:
    """Messages by the chat template. Raises InputError, naming ``where``, if it refuses them."""
    try:
        return tokenizer.apply_chat_template(list(messages), **settings)
    except Exception as error:  # a template is a program and may fail in any way
        raise InputError(f"{where}: the chat template refuses these messages: {error}") from error


def shared_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters, or tokens, both begin with."""
    limit = min(len(one), len(other))
    if one[:limit] == other[:limit]:
        return limit
    return next(k for k, (first, second) in enumerate(zip(one, other, strict=False)) if first != second)


def _end_of_occurrence(text: str, part: str, number: int) -> int:
    """Where occurrence ``number`` of ``part`` in ``text`` ends, counted from 1; the end of ``text`` without one."""
    end = 0
    for _ in range(number):
        begin = text.find(part, end)
        if begin < 0:
            return len(text)
        end = begin + len(part)
    return end or len(text)


def _gap(head: str, prompt: str, header: str) -> str:
    """What a template writes between ``prompt`` and the content, of what it writes before it, ``head``."""
    if header and (begin := head.rfind(header)) >= 0:
        return head[begin + len(header) :]
    return head[len(head.rstrip()) :] if prompt == prompt.rstrip() else ""


def _contents(messages: Sequence[Message]) -> list[str]:
    return [message.get("content") or "" for message in messages]


def _for_template(message: Message) -> dict[str, Any]:
    """A message as templates take it: without weight, and with a content, which a call may lack."""
    kept = {name: value for name, value in message.items() if name != "weight" and value is not None}
    return {"content": "", **kept}


def _has_more(message: Message) -> bool:
    """Whether the assistant reasons or calls tools, beside the content."""
    return any(message.get(name) for name in (*_REASONING, *_CALLS))


def _is_learned(message: Message) -> bool:
    """Whether a message is the assistant's, says something, and is not left out by its weight."""
    says = bool((message.get("content") or "").strip()) or _has_more(message)
    return message["role"] == "assistant" and says and message.get("weight", 1) != 0


def _last_words(message: Message) -> str:
    """The last line of what is said after all reasoning: a template may change what comes before it."""
    content: str = message.get("content") or ""
    return content.rpartition("</think>")[2].strip().rpartition("\n")[2].strip()
