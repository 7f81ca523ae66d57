"""Tokens of rendered conversations, and which of them carry loss."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from perta_fast.data.turns import Turns, shared_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = tuple[Sequence[int], list[tuple[int, int]]]  # token ids; from and to which of them there is a loss


class _Unclear(Exception):
    """Offsets do not say which token a character belongs to: some tokenizers leave white space out of them."""


def encode_turns(texts: Sequence[Turns], tokenizer: "PreTrainedTokenizerBase") -> list[Encoded]:
    """Tokenise texts in one call. A token that holds a character with loss carries it.

    A token that would reach across a border is not made: the text is cut there, as the model reads and writes it.
    """
    if not tokenizer.is_fast:
        return [_by_beginnings(turns, tokenizer) for turns in texts]
    batch = tokenizer([turns.text for turns in texts], add_special_tokens=False, return_attention_mask=False)
    assert batch.encodings is not None
    encoded = []
    for turns, encoding in zip(texts, batch.encodings, strict=True):
        try:
            encoded.append(_by_offsets(turns, encoding))
        except _Unclear:
            encoded.append(_by_beginnings(turns, tokenizer))
    return encoded


def _by_offsets(turns: Turns, encoding: Any) -> Encoded:
    """By the characters of each token. Raises _Unclear if they do not tell, or a token crosses a border."""
    text, ids = turns.text, encoding.ids
    for border in turns.borders:
        if 0 < border < len(text):
            token = encoding.char_to_token(border)
            if token is None or encoding.token_to_chars(token)[0] < border:
                raise _Unclear
            if text[border - 1] == " " and encoding.char_to_token(border - 1) is None:  # it may be that token's
                raise _Unclear
    ranges = []
    for begin, end in turns.spans:
        first = encoding.char_to_token(begin)
        stop = encoding.char_to_token(end) if end < len(text) else len(ids)
        if first is None or stop is None:
            raise _Unclear
        if stop < len(ids) and encoding.token_to_chars(stop)[0] < end:
            stop += 1
        ranges.append((first, stop))
    return ids, ranges


def _by_beginnings(turns: Turns, tokenizer: "PreTrainedTokenizerBase") -> Encoded:
    """By the tokens that the beginnings of a text have."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    cuts = [0, len(turns.text)]
    whole = tokens(turns.text)
    if any(whole[: len(before)] != before for before in (tokens(turns.text[:border]) for border in turns.borders)):
        cuts[1:1] = [border for border in turns.borders if 0 < border < len(turns.text)]
    ids: list[int] = []
    ranges = []
    for start, stop in pairwise(cuts):
        piece = turns.text[start:stop]
        part = tokens(piece)
        for span in turns.spans:
            begin, end = (min(max(place - start, 0), len(piece)) for place in span)
            if begin < end:
                first = shared_start(part, tokens(piece[:begin]))
                ended = tokens(piece[:end])
                last = shared_start(part, ended)
                last += last < len(ended)  # a token that reaches out of the span is in it too
                ranges.append((len(ids) + first, len(ids) + last))
        ids += part
    return ids, ranges
