"""ROUGE-L: as open-unlearning computes it, and with words of any script.

The tokenizer of rouge-score keeps a to z and 0 to 9 alone, after lower-casing. Of equal texts in Japanese or Russian
nothing is left to compare, so they score 0, as if the model had forgotten them.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import regex

ANY_SCRIPT = "_any_script"  # at the end of the name of a metric

# Scripts that are written without spaces between words.
_UNSPACED = "".join(
    rf"\p{{Script={name}}}"
    for name in (
        *("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar"),
        *("Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet", "Javanese", "Balinese"),
    )
)
_CHARACTER = r"\p{L}\p{M}\p{N}"  # of words: letters, the marks on them, numbers
_TOKEN = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[[{_CHARACTER}]--[{_UNSPACED}]]+", regex.VERSION1)
_SEEN = regex.compile("[a-z0-9]")
_OF_WORDS = regex.compile(f"[{_CHARACTER}]")
_INVISIBLE = regex.compile(r"\p{Cf}")  # joiners and marks of direction, which some writers leave out


def rouge_l(reference: str, text: str) -> tuple[float, float]:
    """ROUGE-L recall and F1 of ``text`` with stemmed words (rouge-score); 0 if either text has no word of a-z0-9."""
    return _scores(_scorer(any_script=False), reference, text)


def rouge_l_any_script(reference: str, text: str) -> tuple[float, float]:
    """``rouge_l`` with words of any script: equal texts score 1, whatever they hold.

    The same as ``rouge_l`` for a reference that ``is_seen_whole``.
    """
    return _scores(_scorer(any_script=not is_seen_whole(reference)), reference, text)


def is_seen_whole(reference: str) -> bool:
    """Whether ``rouge_l`` compares every word of a reference whole: it has no letter or digit outside a-z0-9."""
    seen, of_words = _counted(reference)
    return 0 < seen == of_words


def is_blind(reference: str) -> bool:
    """Whether ``rouge_l`` sees less than half of a reference's letters and digits, or none."""
    seen, of_words = _counted(reference)
    return 2 * seen < of_words or seen == 0


def blind_note(name: str, blind: int, count: int) -> str:
    """What to say of a metric that ``is_blind`` for so many of its references."""
    return (
        f"warning: {name}: of {blind} of {count} answers it sees less than half, since ROUGE keeps the letters a-z and "
        f'digits alone: there it can say "forgotten" where nothing is. {name}{ANY_SCRIPT} has words of any script'
    )


def any_script_tokens(text: str) -> list[str]:
    """The words of a text, in lower case; words of a-z0-9 are stemmed as rouge-score stems them.

    A script without spaces between words (Chinese, Japanese, Thai, ...) gives a token for each character, with the
    marks on it. Forms of one letter are made equal (Unicode NFKC). A text without words gives its other characters.
    """
    normal = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).lower()
    words = _TOKEN.findall(normal)
    return [_stemmed(word) for word in words] if words else [letter for letter in normal if not letter.isspace()]


def _counted(reference: str) -> tuple[int, int]:
    """How many letters and digits of a text ``rouge_l`` keeps, and how many there are."""
    lower = reference.lower()
    return len(_SEEN.findall(lower)), len(_OF_WORDS.findall(lower))


def _stemmed(word: str) -> str:
    ascii_tokens: Sequence[str] = _default_tokenizer().tokenize(word) if word.isascii() else [word]
    return ascii_tokens[0]


def _scores(scorer: Any, reference: str, text: str) -> tuple[float, float]:
    score = scorer.score(reference, text)["rougeL"]
    return float(score.recall), float(score.fmeasure)


@cache
def _default_tokenizer() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)


@cache
def _scorer(*, any_script: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True, tokenizer=_AnyScript() if any_script else None)


class _AnyScript:
    """``any_script_tokens`` as a tokenizer of rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return any_script_tokens(text)
