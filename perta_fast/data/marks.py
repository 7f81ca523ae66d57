"""The marks of a tokenizer in a text: added tokens, such as ``<|im_end|>``, some of which stop the model."""

import re
from collections.abc import Collection
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Marks:
    """The added tokens of a tokenizer. stops: ids of those that end what the model generates, beside its own end."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stops: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = {*stops, tokenizer.eos_token_id} - {None}
        self._closings: dict[str, tuple[int, int] | None] = {}

    @cached_property
    def _any(self) -> re.Pattern[str]:
        names = sorted((name for name in self._tokenizer.get_added_vocab() if name.strip()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    def at(self, text: str, begin: int) -> str | None:
        """The mark that ``text`` has at ``begin``."""
        found = self._any.match(text, begin)
        return None if found is None else found.group()

    def stops(self, mark: str | None) -> bool:
        """Whether the model stops after this mark."""
        return mark is not None and self._tokenizer.convert_tokens_to_ids(mark) in self._stops

    def closing(self, rest: str) -> tuple[int, int] | None:
        """Where the end of a turn lies in what a template writes after its content; None if there is no end.

        It is the first run of marks, up to one that stops the model. If none of the run does, and other words lead to
        one that does, it reaches there. Without marks it is all that is written.
        """
        if rest not in self._closings:
            self._closings[rest] = self._find_closing(rest)
        return self._closings[rest]

    def _find_closing(self, rest: str) -> tuple[int, int] | None:
        begin = len(rest) - len(rest.lstrip())
        if begin == len(rest):
            return None
        end = begin
        while (mark := self.at(rest, end)) is not None:
            end += len(mark)
            if self.stops(mark):
                return begin, end
        if end == begin:
            return begin, len(rest.rstrip())
        stop = self.first_stop(rest, end)
        if stop is None or not rest[end:stop].strip():  # the end of text after all
            return begin, end
        return begin, stop + len(self.at(rest, stop) or "")

    def first_stop(self, text: str, begin: int) -> int | None:
        """Where the first mark after ``begin`` stands that stops the model."""
        return next((found.start() for found in self._any.finditer(text, begin) if self.stops(found.group())), None)

    def last(self, text: str) -> int:
        """Where the last mark stands, if ``text`` ends in one but for white space; else where it ends."""
        ending = len(text.rstrip())
        return next((found.start() for found in self._any.finditer(text) if found.end() == ending), ending)

    def outside(self, text: str, place: int) -> int:
        """``place``, or the last place before it that lies in no mark and in no word."""
        if place in (0, len(text)) or text[place - 1].isspace():
            return place
        begin = max((k + 1 for k in range(place) if text[k].isspace()), default=0)
        for found in self._any.finditer(text, begin):
            if found.start() >= place:
                break
            begin = found.end() if found.end() <= place else found.start()
        return begin
