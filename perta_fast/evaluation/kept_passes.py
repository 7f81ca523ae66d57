"""Passes of a model over data, as parts that are kept, row by row until they are finished: the same bits come back."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from blake3 import blake3

from perta_fast.data.samples import Sample
from perta_fast.files.kept_parts import KeptParts
from perta_fast.files.kept_rows import KeptRows
from perta_fast.models.scores import TokenScores

_COLUMNS = {"log_probs": "float32", "hits": "bool", "standardised": "float32"}  # types of arrays


def kept_scores(
    kept: KeptParts | None, name: str, of: Any, score: Callable[[KeptRows], list[TokenScores]]
) -> list[TokenScores]:
    """The scores that ``score`` gives, or has given before. of: what was scored, as JSON has it."""
    if kept is None:
        return score(KeptRows())

    def make() -> list[Any]:
        with KeptRows(kept, name, _digest(of), _columns, _scores) as rows:
            return [_columns(scores) for scores in score(rows)]

    return [_scores(row) for row in kept_part(kept, name, of, make)]


def kept_part(kept: KeptParts | None, name: str, of: Any, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, or has given before for the same ``of``; JSON can express both."""
    if kept is None:
        return make()
    digest = _digest(of)
    part = kept.read(name)
    if part is None or part["of"] != digest:
        part = {"of": digest, "result": make()}
        kept.write(name, part)
    return part["result"]


def kept_by_row(kept: KeptParts | None, name: str, of: Any, make: Callable[[KeptRows], Any]) -> Any:
    """``kept_part`` of what JSON can express row by row too."""

    def whole() -> Any:
        with KeptRows(kept, name, _digest(of)) as rows:
            return make(rows)

    return kept_part(kept, name, of, whole)


def as_lists(samples: Sequence[Sample]) -> list[Any]:
    """Samples as JSON has them."""
    return [[sample.input_ids, sample.labels] for sample in samples]


def _digest(of: Any) -> str:
    return blake3(json.dumps(of).encode()).hexdigest()


def _columns(scores: TokenScores) -> dict[str, Sequence[float]]:
    """Float32 as Python's floats, which JSON writes exactly."""
    return {key: getattr(scores, key).tolist() for key in _COLUMNS}


def _scores(columns: Mapping[str, Sequence[float]]) -> TokenScores:
    import numpy as np

    return TokenScores(*(np.array(columns[key], dtype=kind) for key, kind in _COLUMNS.items()))
