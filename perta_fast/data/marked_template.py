"""Chat templates that mark themselves what the assistant generates, with {% generation %}."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def marks_itself(tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Any] | None) -> bool:
    """Whether the template says what is generated, and the tokenizer can say it of tokens."""
    return tokenizer.is_fast and bool(_MARK.search(tokenizer.get_chat_template(tools=tools)))


def generated(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, begin: int
) -> list[tuple[int, int]]:
    """From and to which character the template's own mask is 1, after character ``begin`` of the rendered text."""
    made = tokenizer.apply_chat_template(
        list(messages),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
        **({} if tools is None else {"tools": tools}),
    )
    spans: list[tuple[int, int]] = []
    start = 0  # of a token: white space is left out of the offsets of some tokenizers
    for masked, (_, end) in zip(made["assistant_masks"], made["offset_mapping"], strict=True):
        if masked and end > begin:
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((max(start, begin), end))
        start = end
    return spans
