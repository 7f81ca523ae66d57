"""Conversations in a chat template that marks itself what the assistant generates ({% generation %})."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from perta_fast.data.turn_tokens import Encoded
from perta_fast.data.turns import is_learned, shared_start, without_nulls
from perta_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_marks(tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Any] | None) -> bool:
    """Whether the template says what is generated, and the tokenizer can say it of tokens."""
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError:  # of several named templates none is the default, which the rendering will say of the row
        return False
    return tokenizer.is_fast and bool(_MARK.search(template))


def encode_marked(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, tokenizer: "PreTrainedTokenizerBase", where: str
) -> list[Encoded]:
    """The tokens of a conversation, with loss where the template's own mask is 1; none if it marks a turn nowhere.

    One pair, or one for each turn, as ``ChatTemplate.turns``.
    """

    def render(count: int, prompt: bool = False) -> tuple[list[int], list[int]]:
        settings = {} if tools is None else {"tools": tools}
        try:
            made = tokenizer.apply_chat_template(
                shown[:count],
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                add_generation_prompt=prompt,
                **settings,
            )
        except Exception as error:  # a template is a program and may fail in any way
            raise InputError(f"{where}: the chat template refuses these messages: {error}") from error
        return list(made["input_ids"]), list(made["assistant_masks"])

    shown = without_nulls(messages)
    turns: list[Encoded] = []
    for k, message in enumerate(messages):
        if not is_learned(message):
            continue
        ids, mask = render(k + 1)
        start = shared_start(ids, render(k, prompt=True)[0])
        edges = [n for n in range(start, len(ids) + 1) if (n < len(ids) and mask[n]) != (n > start and mask[n - 1])]
        if not edges:
            return []
        turns.append((ids, list(zip(edges[::2], edges[1::2], strict=True))))
    last = turns[-1][0]
    if all(last[: ranges[-1][1]] == ids[: ranges[-1][1]] for ids, ranges in turns):
        return [(last, [piece for _, ranges in turns for piece in ranges])]
    return turns
