"""Rows to samples: token ids, and labels where there is a loss."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from perta_fast.data.rows import Row
from perta_fast.data.turn_tokens import Encoded, encode_turns
from perta_fast.data.turns import ChatTemplate, Turns
from perta_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token without a loss, as in torch and transformers
_ROWS_AT_ONCE = 512  # whose texts are tokenised in one call


@dataclass(frozen=True)
class Sample:
    """One tokenised sample: ``labels[i]`` is ``input_ids[i]`` or ``IGNORED``. Nothing is shifted yet.

    truncated: whether its row was cut to a length. share: its part of the labels of its row, less than 1 where each
    turn of a conversation is a sample of its own. Losses are weighted by it, so that the row counts once.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    truncated: bool = False
    share: float = 1.0

    @property
    def label_count(self) -> int:
        """Tokens that the loss is averaged over: the first token is never predicted."""
        predicted = self.labels[1:]
        return len(predicted) - predicted.count(IGNORED)

    def pieces(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[str, bool]]:
        """The text in pieces, and whether each carries loss."""
        begin, before = 0, ""
        for end in range(1, len(self.labels) + 1):
            carries = self.labels[begin] != IGNORED
            if end == len(self.labels) or (self.labels[end] != IGNORED) != carries:
                text = tokenizer.decode(self.input_ids[:end])
                if not text.startswith(before):  # a character's bytes lie on both sides
                    before, text = "", tokenizer.decode(self.input_ids[begin:end])
                yield text.removeprefix(before), carries
                begin, before = end, tokenizer.decode(self.input_ids[:end])

    def marked(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The text, with what carries loss in ⟦ ⟧: the check to make before an hour of gradients."""
        return "".join(f"⟦{text}⟧" if carries else text for text, carries in self.pieces(tokenizer))


def row_count(samples: Sequence[Sample]) -> int:
    """The number of rows that ``samples`` were made of."""
    return round(sum(sample.share for sample in samples))


def truncated_count(samples: Sequence[Sample]) -> int:
    """The number of rows that were cut."""
    return sum(samples[numbers[0]].truncated for numbers in by_row(samples))


def by_row(samples: Sequence[Sample]) -> Iterator[range]:
    """The numbers of the samples of each row, whose shares add up to 1."""
    begin, share = 0, 0.0
    for k, sample in enumerate(samples):
        share += sample.share
        if share > 1 - 1e-6:  # shares are rounded
            yield range(begin, k + 1)
            begin, share = k + 1, 0.0


def encode(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int, stops: Collection[int] = ()
) -> list[Sample]:
    """Tokenise rows; cut samples at ``max_length`` tokens and mark those as truncated.

    A row gives one sample, or, if the chat template shows earlier turns of a conversation in another way later, one for
    each turn of the assistant. stops: tokens that end what the model generates, beside the tokenizer's own end.

    Raises InputError, naming the line, if no token with a loss remains, or the tokenizer cannot encode messages.
    """
    return list(chain.from_iterable(encode_rows(rows, tokenizer, max_length, stops)))


def encode_rows(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int, stops: Collection[int] = ()
) -> Iterator[list[Sample]]:
    """As ``encode``: the samples of one row after the other. A row that is tokenised has them, at any length."""
    if rows and rows[0].is_tokenised:
        yield from (list(row.content["samples"]) for row in rows)
        return
    encoder = _Encoder(tokenizer, stops)
    known = tuple(range(len(tokenizer)))  # one object for all equal ids: a third of the memory
    for begin in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[begin : begin + _ROWS_AT_ONCE]
        for row, parts in zip(some, encoder.encode(some), strict=True):
            yield _samples_of(row, parts, known, max_length)


def _samples_of(row: Row, parts: Sequence[Encoded], known: Sequence[int], max_length: int) -> list[Sample]:
    samples = []
    for whole_ids, ranges in parts:
        ids = whole_ids[:max_length]
        kept = tuple(map(known.__getitem__, ids)) if max(ids, default=0) < len(known) else tuple(ids)
        labels: tuple[int, ...] = ()
        for begin, end in ranges:
            labels += (IGNORED,) * (begin - len(labels)) + kept[begin:end]
        labels = (labels + (IGNORED,) * (len(kept) - len(labels)))[: len(kept)]
        samples.append(Sample(kept, labels, truncated=len(whole_ids) > max_length))
    counts = [sample.label_count for sample in samples]
    if not any(counts):
        limit = f" within the first {max_length} tokens" if any(sample.truncated for sample in samples) else ""
        raise InputError(f"{row.where}: has no token to compute a loss on{limit}")
    if len(samples) == 1:
        return samples
    whole, cut = sum(counts), any(sample.truncated for sample in samples)
    return [
        Sample(sample.input_ids, sample.labels, cut, count / whole)
        for sample, count in zip(samples, counts, strict=True)
        if count
    ]


class _Encoder:
    """Encodes rows of all forms with one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stops: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, stops) if tokenizer.chat_template else None

    def encode(self, rows: Sequence[Row]) -> list[list[Encoded]]:
        """The tokens of each row's samples. Texts of conversations are tokenised together."""
        encoded: list[list[Encoded]] = []
        texts: list[Turns] = []
        owners: list[list[Encoded]] = []  # where the tokens of each text go
        for row in rows:
            parts = self._of_row(row)
            own = [part for part in parts if not isinstance(part, Turns)]
            encoded.append(own)
            texts += [part for part in parts if isinstance(part, Turns)]
            owners += [own] * (len(parts) - len(own))
        for owner, part in zip(owners, encode_turns(texts, self._tokenizer) if texts else [], strict=True):
            owner.append(part)
        return encoded

    def _of_row(self, row: Row) -> Sequence[Encoded | Turns]:
        content = row.content
        if "text" in content:
            ids = list(self._tokenizer(content["text"])["input_ids"])
            return [(ids, [(0, len(ids))])]
        if "messages" in content:
            messages = content["messages"]
        elif self._template is None:
            return [_encode_plain_question(content["question"], content["answer"], self._tokenizer)]
        else:
            messages = [
                {"role": "user", "content": content["question"]},
                {"role": "assistant", "content": content["answer"]},
            ]
        if self._template is None:
            raise InputError(
                f"{row.where}: has messages, but the tokenizer has no chat template; "
                'give {"question", "answer"} or {"text"} lines, or a model with a chat template'
            )
        return self._template.turns(messages, content.get("tools"), row.where)


def _encode_plain_question(question: str, answer: str, tokenizer: "PreTrainedTokenizerBase") -> Encoded:
    start = f"Question: {question}\nAnswer:"
    prompt, whole = (opening_tokens(text, tokenizer) for text in (start, f"{start} {answer}"))
    reply = whole[len(prompt) :]
    if whole[: len(prompt)] != prompt:  # a token spans both: tokenise them separately
        reply = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        reply = [*reply, tokenizer.eos_token_id]
    return [*prompt, *reply], [(len(prompt), len(prompt) + len(reply))]


def opening_tokens(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens of a text that goes on: without the end token that some tokenizers put after every text."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def prompt_of(sample: Sample) -> tuple[int, ...]:
    """The tokens before the first label."""
    return sample.input_ids[: next(k for k, label in enumerate(sample.labels) if label != IGNORED)]
