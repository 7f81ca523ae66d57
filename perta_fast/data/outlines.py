"""Rendered conversations with a sign in place of each content, which show where contents stand.

A sign stands between white space of a known form, so that it also shows what a template strips off a content.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_EDGE = "\n\n\n\t\n\n\n"
_EDGE_STRIPPED = "\t\n\n\n"  # what stripping line breaks leaves of it
_SIGN = re.compile("\ue0a7([0-9]+)\ue0a8")


def sign(index: int) -> str:
    """What stands for the content of message ``index``."""
    return f"{_EDGE}\ue0a7{index}\ue0a8{_EDGE}"


def has_sign(text: str) -> bool:
    return bool(_SIGN.search(text))


@dataclass(frozen=True)
class Hole:
    """Where the content of message ``index`` stands, and what is stripped off its sides.

    left, right: "" for nothing, else the characters that go; None for white space, as of ``str.strip``.
    """

    index: int
    left: str | None
    right: str | None

    def fill(self, content: str) -> str:
        """``content`` as the template writes it."""
        left = content if self.left == "" else content.lstrip(self.left)
        return left if self.right == "" else left.rstrip(self.right)


@dataclass(frozen=True)
class Outline:
    """A rendered text without the contents: ``literals[k]`` comes before ``holes[k]``, the last one after all."""

    literals: tuple[str, ...]
    holes: tuple[Hole, ...]

    @classmethod
    def of(cls, text: str) -> "Outline":
        """From a text that was rendered with signs."""
        parts = _SIGN.split(text)  # literal, index, literal, index, ..., literal
        literals, holes = parts[::2], []
        for k, index in enumerate(parts[1::2]):
            left, literals[k] = _stripped(literals[k])
            right, after = _stripped(literals[k + 1][::-1])
            literals[k + 1] = after[::-1]
            holes.append(Hole(int(index), left, right))
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
