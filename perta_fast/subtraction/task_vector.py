"""Whether a task vector is zero, so that a run would change nothing; asked before the work begins. No torch."""

from collections.abc import Iterable, Iterator

import numpy as np

from perta_fast.checkpoints.low_rank import LowRank
from perta_fast.checkpoints.safetensors_file import TensorEntry, read_values
from perta_fast.errors import InputError
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.matching import TensorMatch

_SAMPLE = 1 << 14  # elements that are looked at first, at both ends of a tensor: tuning changes nearly all
_CHUNK = 1 << 20

Pair = tuple[TensorEntry, TensorEntry]  # the values of tuned and base for one tensor


def check_task_vector(sources: Sources, advice: str = "") -> None:
    """Raise InputError, with the cause and ``advice``, if the run would subtract nothing from any tensor."""
    matches = [match for match in sources.matches if match.copied is None]
    pairs = [(match.tuned, match.base) for match in matches if match.tuned is not None and match.base is not None]
    updates = [match.low_rank for match in matches if match.low_rank is not None]
    if is_nonzero(pairs, updates) or any(_is_changed_by_peft(sources, match) for match in matches):
        return
    uncovered = any(match.copied == "not covered by the importance" for match in sources.matches)
    where = " in all tensors that the importances cover" if uncovered else ""
    raise InputError(_cause(sources, where) + advice)


def _is_changed_by_peft(sources: Sources, match: TensorMatch) -> bool:
    if match.merged is None or match.base is None or sources.adapter is None:
        return False
    return sources.adapter.adds_to(match.merged, read_values(match.base, 0, match.common))


def _cause(sources: Sources, where: str) -> str:
    tuned, base = sources.tuned.path, sources.base.path
    if sources.adapter_config is not None:
        made = any(match.merged is not None for match in sources.matches)
        reason = "what it adds is zero but for rounding" if made else "factors A or B are all zero"
        return f"{tuned}: nothing would change{where}: {reason}, as before training; give an adapter that was trained"
    if not any(match.copied is None for match in sources.matches):
        return f"{sources.model.path}: nothing would change: {_all_copied(sources)}"
    same = "is the same checkpoint as base" if tuned.samefile(base) else f"has the same values as {base}"
    return (
        f"{tuned}: nothing would change: it {same}{where}, so the task vector is zero; for tuned, give the "
        "checkpoint that was tuned on the forget data"
    )


def _all_copied(sources: Sources) -> str:
    reasons = dict.fromkeys(str(match.copied) for match in sources.matches)
    return f"of every tensor, {' or '.join(reasons)}" if reasons else "it holds no tensor"


def is_nonzero(pairs: Iterable[Pair], updates: Iterable[LowRank] = ()) -> bool:
    """Whether some element of a task vector is not zero, at the first one that shows it.

    pairs: floating-point tensors; beyond the end of the shorter one nothing is compared. updates: of low rank; factors
    whose product vanishes though neither is zero count as not zero. Raises RunError if a file cannot be read.
    """
    if any(map(adds, updates)):
        return True
    apart = [(tuned, base) for tuned, base in pairs if _place(tuned) != _place(base)]
    return any(_differ(*pair, *ends) for pair in apart for ends in _samples(*pair)) or any(
        _differ(*pair, begin, min(begin + _CHUNK, _common(*pair)))
        for pair in apart
        for begin in range(0, _common(*pair), _CHUNK)
    )


def adds(update: LowRank) -> bool:
    """Whether an update of low rank changes anything: its scale and both factors are not zero."""
    return update.scale != 0 and all(bool(factor.any()) for factor in update.factors())


def _place(entry: TensorEntry) -> tuple[int, ...]:
    """Where the bytes lie, whatever the name of the file."""
    status = entry.path.stat()
    return status.st_dev, status.st_ino, entry.begin


def _common(tuned: TensorEntry, base: TensorEntry) -> int:
    return min(tuned.count, base.count)


def _samples(tuned: TensorEntry, base: TensorEntry) -> Iterator[tuple[int, int]]:
    count = _common(tuned, base)
    yield 0, min(_SAMPLE, count)
    yield max(0, count - _SAMPLE), count


def _differ(tuned: TensorEntry, base: TensorEntry, begin: int, end: int) -> bool:
    first, second = (read_values(entry, begin, end) for entry in (tuned, base))
    return bool(np.any(first != second))
