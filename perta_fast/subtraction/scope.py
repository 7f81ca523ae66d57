"""Which parameters a run changes: ``--only`` and ``--leave``. Torch is not imported."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.tied import has_rows_of_tokens, is_tied_use, other_uses, ties_embeddings, token_counts
from perta_fast.dtypes import COPIED
from perta_fast.errors import InputError, shell_command

Patterns = str | Sequence[str] | None
EMBEDDINGS, NORMS = "embeddings", "norms"  # words that stand for a group of parameters in every family
# The last word of a module's name, but for the number of one in a list: ln_1, norm_f, q_norm, layer_norms.0.
_NORM = re.compile(r"(?:.*\.)?(?:[^.]*norm[^.]*|ln(?:_[^.]*|\d*)|[^.]*_ln)(?:\.\d+)?\.[^.]*", re.IGNORECASE)

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Names:
    """The tensors that patterns are matched with.

    shapes: by name. uses: by name, the other names of a tied matrix, those that are not in ``shapes`` too. tokens:
    numbers of rows that a matrix with a row a token can have. where: what messages call the model. listing: the
    command that lists its names, if there is one.
    """

    shapes: Mapping[str, tuple[int, ...]]
    uses: Mapping[str, Collection[str]] = field(default_factory=dict)
    tokens: Collection[int] = ()
    where: object = "the module"
    listing: str = ""

    @classmethod
    def of(cls, model: Checkpoint, tied: bool) -> "Names":
        """The floating-point tensors of a checkpoint. tied: whether its embedding and head are one matrix."""
        shapes = {name: entry.shape for name, entry in model.tensors.items() if entry.dtype not in COPIED}
        uses = other_uses(model, tied)
        for name in shapes:  # as a wrapper has named it in the file
            stored = model.tensors[name].stored_name
            if stored and stored != name:
                uses.setdefault(name, set()).add(stored)
        listing = shell_command("perta", "inspect", model.path, "--tensors")
        return cls(shapes, uses, token_counts(model), model.path, listing)

    def matching(self, pattern: str) -> set[str]:
        """The names that a pattern or the word of a group stands for; of a tied matrix, all that are stored."""
        if pattern == EMBEDDINGS:
            counts = {*self.tokens, *(shape[0] for name, shape in self.shapes.items() if shape and is_tied_use(name))}
            found = {name for name, shape in self.shapes.items() if has_rows_of_tokens(name, shape, counts)}
        elif pattern == NORMS:
            found = {name for name in self.shapes if _NORM.fullmatch(name)}
        else:
            found = {name for name in self.shapes if any(fnmatchcase(use, pattern) for use in self._all_uses(name))}
        return found | {use for name in found for use in self._all_uses(name) if use in self.shapes}

    def _all_uses(self, name: str) -> list[str]:
        return [name, *self.uses.get(name, ())]

    def advice(self, pattern: str) -> str:
        """What to write instead of a pattern that stands for no name."""
        listed = f"; this lists all names: {self.listing}" if self.listing else ""
        if pattern in (EMBEDDINGS, NORMS):
            return f"leave it out, or give patterns of names{listed}"
        if not set(pattern) & set("*?[") and (names := self.matching(f"*{pattern}*")):
            return f"a pattern is for whole names: *{pattern}* stands for {len(names)}, such as {min(names)}"
        if set(pattern) & set("{}"):
            return "braces mean nothing here: give several patterns, or [01] for 0 or 1"
        if names := {name for name in self.shapes if fnmatchcase(name.lower(), pattern.lower())}:
            return f"upper and lower case count: {min(names)} is a name"
        if near := get_close_matches(pattern.lower(), (EMBEDDINGS, NORMS), 1, 0.75):
            return f"did you mean {near[0]}?"
        words = _NUMBER.sub("0", pattern.strip("*."))
        parts: dict[str, str] = {}  # as many words of a name as the pattern has, and the first such name of any layer
        for name in self.shapes:
            split, count = _NUMBER.sub("0", name).split("."), words.count(".") + 1
            for first in range(len(split) - count + 1):
                parts.setdefault(".".join(split[first : first + count]), name)
        close = dict.fromkeys(parts[part] for part in get_close_matches(words, parts, 3, 0.5))
        example = f"close to it: {', '.join(close)}" if close else f"one of its names: {min(self.shapes, default='')}"
        return example + listed


@dataclass(frozen=True)
class Scope:
    """Which parameters a run changes: those that match a pattern of ``only``, or all, but for those of ``leave``.

    A pattern is for whole names, as of a shell: ``*``, ``?`` and ``[...]``; or it is the word of a group.
    """

    only: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()

    @classmethod
    def of(cls, only: Patterns, leave: Patterns) -> "Scope":
        """From one text, with commas between patterns, or a list. Raises InputError for anything else."""
        if only is not None and not isinstance(only, str) and not len(only):
            raise InputError(
                "‹only› is an empty list, which would change nothing; leave it out to change all parameters"
            )
        return cls(_listed("only", only), _listed("leave", leave))

    def left(self, names: Names) -> set[str]:
        """The names of the parameters that stay as they are.

        Raises InputError for a pattern that no name matches, and if all parameters would stay.
        """
        if not self.only and not self.leave:
            return set()
        only, leave = (
            {name for pattern in patterns for name in _matching(option, pattern, names)}
            for option, patterns in (("only", self.only), ("leave", self.leave))
        )
        left = leave | (names.shapes.keys() - only if self.only else set())
        if left == names.shapes.keys():
            given = [f"‹only› {','.join(self.only)}"] * bool(only) + [f"‹leave› {','.join(self.leave)}"] * bool(leave)
            raise InputError(
                f"{' with '.join(given)}: leaves every parameter of {names.where} alone, so nothing would change; give "
                "patterns that stand for fewer names"
            )
        return left

    def check(self, path: Path) -> None:
        """Raise InputError as ``left``, if a model's directory has weights; for an estimate it may have none."""
        if self != EVERYTHING and any(path.glob("*.safetensors")):
            model = Checkpoint.open(path)
            self.left(Names.of(model, ties_embeddings(model)))


EVERYTHING = Scope()


def _matching(option: str, pattern: str, names: Names) -> set[str]:
    found = names.matching(pattern)
    if not found:
        raise InputError(f"‹{option}› {pattern}: no parameter of {names.where} is meant; {names.advice(pattern)}")
    return found


def _listed(option: str, patterns: Patterns) -> tuple[str, ...]:
    listed = patterns.split(",") if isinstance(patterns, str) else list(patterns or ())
    for pattern in listed:
        if not isinstance(pattern, str) or not pattern.strip():
            raise InputError(f"{option} has the pattern {pattern!r}; give names of parameters, in which * is any text")
    return tuple(pattern.strip() for pattern in listed)
