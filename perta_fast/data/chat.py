"""What a run tells a tokenizer's chat template: a system prompt, and one date for the whole run."""

import copy
import datetime
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from perta_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

_FORMS = ("%Y-%m-%d", "%d %b %Y", "%d %B %Y", "%B %d, %Y", "%b %d, %Y")
_CLOCK = "strftime_now"  # the function that templates ask for the date, as transformers names it
_VARIABLES = ("date_string", "current_date")  # the variables that templates read instead, if they are given
_clock = datetime.datetime.now  # tests put another one here
_LONGEST_SHOWN = 80  # characters of a system prompt


def today() -> datetime.date:
    """The date on this machine. Whatever needs today's date asks here."""
    return _clock().date()


def parse_date(text: str) -> datetime.date:
    """The date that ``text`` says. Raises InputError, which lists the forms, if it is none."""
    for form in _FORMS:
        try:
            return datetime.datetime.strptime(text.strip(), form).date()
        except (ValueError, AttributeError):
            continue
    raise InputError(
        f"‹date_string› is {reprlib.repr(text)}; write a date in one of the forms 2025-04-10, 10 Apr 2025, "
        "10 April 2025, April 10, 2025"
    )


@dataclass(frozen=True)
class Told:
    """What a chat template was told.

    chat_template: whether any row went through one; False also where that is not known. system_prompt: None if there
    was none. date_string: as it was given, if the template reads a date. date: what it was told as the date, in its
    own form if that is one of ``parse_date``, or as ``date_string``; None if it did not ask.
    """

    chat_template: bool = False
    system_prompt: str | None = None
    date_string: str | None = None
    date: str | None = None

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> "Told":
        """From the metadata of an importance, or its record in a report; what is missing there is not known."""
        used = table.get("chat_template") in (True, "True")
        return cls(used, *(table.get(name) for name in ("system_prompt", "date_string", "date")))

    def as_strings(self) -> dict[str, str]:
        """For metadata of safetensors files; what is None or False is left out."""
        return {name: str(value) for name, value in asdict(self).items() if value is not None and value is not False}

    @property
    def day(self) -> datetime.date | None:
        """``date``, whatever its form."""
        return None if self.date is None else parse_date(self.date)

    def again(self) -> "ChatSettings":
        """Settings that tell it the same on any day. Raises InputError if the date is none."""
        return ChatSettings.of(self.system_prompt, self.date_string, self.day)

    def in_words(self) -> str:
        """For a person; "" if there is nothing to say."""
        prompt = None if self.system_prompt is None else f"system prompt {shown(self.system_prompt)}"
        return ", ".join(filter(None, (prompt, self.date and f"date {self.date}")))


def told_date(told: Iterable[Told]) -> str | None:
    """What chat templates were told as the date; None if none asked."""
    return next((each.date for each in told if each.date is not None), None)


def shown(prompt: str) -> str:
    """A system prompt for a message: in quotes, and without its middle if it is long."""
    half = _LONGEST_SHOWN // 2
    return repr(prompt if len(prompt) <= _LONGEST_SHOWN else f"{prompt[:half]} ... {prompt[-half:]}")


@dataclass(frozen=True)
class ChatSettings:
    """What to tell chat templates.

    system_prompt: put before messages that do not begin with one. date_string: the date, in the form that a template
    shall have it in if it reads ``date_string``; it may be written as in ``parse_date``. day: the date of the run's
    start, for templates that ask the clock.
    """

    system_prompt: str | None = None
    date_string: str | None = None
    day: datetime.date | None = None

    @classmethod
    def of(cls, system_prompt: str | None, date_string: str | None, day: datetime.date | None = None) -> "ChatSettings":
        """day: None takes today. Raises InputError if the date is none, or the prompt no text for a tokenizer."""
        try:
            _ = system_prompt is None or system_prompt.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise InputError(
                f"‹system_prompt› is {reprlib.repr(system_prompt)}, no text that a tokenizer can read"
            ) from error
        if date_string is not None:
            parse_date(date_string)
        return cls(system_prompt, date_string, day or today())

    def given_to(self, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
        """A copy of a tokenizer whose chat template gets these settings; ``told`` says which it was told.

        Every template that asks for the date is told one, at midnight, however long the run lasts. Earlier settings of
        ``tokenizer`` are replaced. Raises InputError if there is no chat template to put them in, or it takes no system
        prompt.
        """
        applying = getattr(tokenizer, "apply_chat_template", None)
        if isinstance(applying, _Applying):
            tokenizer = applying.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            self.refuse_for("the tokenizer has no chat template to put it in")
            return tokenizer
        if self.system_prompt is not None:
            _check_takes_system_prompt(tokenizer, self.system_prompt)
        changed = copy.copy(tokenizer)
        changed.apply_chat_template = _Applying(tokenizer, self)
        return changed

    def refuse_for(self, what: str) -> None:
        """Raise InputError, as ``what`` goes through no chat template, if any of them is given."""
        names = [f"‹{name}›" for name in ("system_prompt", "date_string") if getattr(self, name) is not None]
        if names:
            raise InputError(f"{' and '.join(names)}: {what}; leave it out")


def told(tokenizer: Any) -> Told:
    """What the template of a tokenizer that got settings was told until now; of any other, nothing is known."""
    applying = getattr(tokenizer, "apply_chat_template", None)
    return applying.told if isinstance(applying, _Applying) else Told()


class _Applying:
    """``apply_chat_template`` of ``tokenizer`` with settings."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: ChatSettings) -> None:
        self.told = Told()
        self.tokenizer, self._settings = tokenizer, settings
        day = settings.day if settings.date_string is None else parse_date(settings.date_string)
        assert day is not None
        self._time = datetime.datetime.combine(day, datetime.time())
        self._clock_said: list[str] = []

    def __call__(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> Any:
        """As the tokenizer's own."""
        several = len(conversation) > 0 and isinstance(conversation[0], list | tuple)
        prompted = list(map(self._prompted, conversation)) if several else self._prompted(conversation)
        template = self.tokenizer.get_chat_template(chat_template, tools)
        if self._settings.date_string is not None:
            options = {"date_string": self._settings.date_string, "current_date": f"{self._time:%Y-%m-%d}", **options}
        with _clock_of(template, self._strftime) if _CLOCK in _names(template) else nullcontext():
            result = self.tokenizer.apply_chat_template(
                prompted, tools=tools, documents=documents, chat_template=template, **options
            )
        self._note(template)
        return result

    def _prompted(self, messages: Sequence[Message]) -> Sequence[Message]:
        prompt = self._settings.system_prompt
        if prompt is None or (messages and messages[0]["role"] in ("system", "developer")):
            return messages
        return [{"role": "system", "content": prompt}, *messages]

    def _strftime(self, format: str) -> str:
        """What templates call in place of the clock, maybe with the argument by name, as transformers names it."""
        text = self._time.strftime(format)
        self._clock_said.append(text)
        return text

    def _note(self, template: str) -> None:
        """Keep what the template was told."""
        now, given = self.told, self._settings.date_string
        if not now.chat_template:
            now = replace(now, chat_template=True, system_prompt=self._settings.system_prompt)
        if given is not None and now.date is None and not _names(template).isdisjoint((_CLOCK, *_VARIABLES)):
            now = replace(now, date_string=given, date=given)
        elif self._clock_said and now.date is None:
            now = replace(now, date=next(filter(self._is_the_day, self._clock_said), f"{self._time:%Y-%m-%d}"))
        self._clock_said.clear()
        self.told = now

    def _is_the_day(self, text: str) -> bool:
        try:
            return parse_date(text) == self._time.date()
        except InputError:
            return False


@contextmanager
def _clock_of(template: str, clock: Any) -> Iterator[None]:
    """Let a template ask ``clock`` for the date.

    Transformers passes no functions on to a template, and gives each compiled one, of which it keeps a copy, the clock
    of the system: the copy is given another one while it is used.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    names = _compile_jinja_template(template).globals
    before = names[_CLOCK]
    names[_CLOCK] = clock
    try:
        yield
    finally:
        names[_CLOCK] = before


@lru_cache
def _names(template: str) -> frozenset[str]:
    """The names of variables and functions in a template. Raises what jinja2 raises if it is none."""
    from jinja2.nodes import Name
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(template).environment.parse(template)
    return frozenset(node.name for node in tree.find_all(Name))


def _check_takes_system_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> None:
    """Raise InputError if the chat template refuses a system prompt, or leaves it out, before a plain question."""
    question = [{"role": "user", "content": "?"}]
    texts: list[str] = []
    for messages in (question, [{"role": "system", "content": prompt}, *question]):
        try:
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program and may fail in any way
            if not texts:
                return  # it wants more than a question; the rows will show
            raise InputError(
                f"‹system_prompt›: the chat template takes none ({error}); leave it out, or begin the questions with it"
            ) from error
    if texts[0] == texts[1] and prompt.strip() not in texts[1]:
        raise InputError(
            "‹system_prompt›: the chat template leaves it out of what the model reads; leave it out too, or begin the "
            "questions with it"
        )
